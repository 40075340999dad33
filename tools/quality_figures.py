"""The figures of a run, as quality.json and as a table of several runs."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import durable
from trainer.metrics import fashion_cnn
from trainer.metrics.spectrum import Ratios


@dataclass(frozen=True)
class Quality:
    """Figures of one run. None: the method has no such thing."""

    fd_samples: float
    """Frechet distance of samples to the test images, on fd_fashion_cnn."""
    fd_reconstructions: float | None
    fd_floor: float
    """Of real training images: below it nothing is told apart."""
    samples: int
    reference: int
    """Test images, of which the reconstructions are too."""
    texture_samples: Ratios
    texture_reconstructions: Ratios | None
    psnr: float | None
    """dB, reconstructions from the posterior mean, mean over images."""
    same_class: float | None
    """Share of test images whose predicted class survives reconstruction."""
    elbo: float | None
    """Nats an image, one posterior sample."""
    kl: float | None
    bits_per_dim: float | None
    """Of minus the ELBO."""
    likelihood: str | None
    """What the nats are nats of."""
    class_shares: list[float]
    """Share of samples by predicted class; a tenth each in the data."""


def table(rows: dict[str, Quality]) -> str:
    """Markdown: a column a run. Distances carry their sample counts."""
    counts = {(q.samples, q.reference) for q in rows.values()}
    if len(counts) > 1:
        raise ValueError(f"samples: distances of {sorted(counts)} samples do not compare; measure all with one number")
    ((samples, reference),) = counts
    name = fashion_cnn.NAME
    lines: dict[str, list[str]] = {
        f"{name}, {samples:,} samples": [f"{q.fd_samples:.2f}" for q in rows.values()],
        f"{name}, {reference:,} reconstructions": [_number(q.fd_reconstructions, 2) for q in rows.values()],
        f"{name}, real against real": [f"{q.fd_floor:.3f}" for q in rows.values()],
        "samples / real: gradient, high, check, phase": [_ratios(q.texture_samples) for q in rows.values()],
        "reconstructions / real: the same": [_ratios(q.texture_reconstructions) for q in rows.values()],
        "PSNR, dB": [_number(q.psnr, 2) for q in rows.values()],
        "same class": [_number(q.same_class, 3) for q in rows.values()],
        "ELBO, nats": [_number(q.elbo, 1) for q in rows.values()],
        "KL, nats": [_number(q.kl, 1) for q in rows.values()],
        "bits a dimension": [_number(q.bits_per_dim, 4) for q in rows.values()],
        "likelihood": [q.likelihood or "-" for q in rows.values()],
        "class shares, least and most": [
            f"{min(q.class_shares):.3f}, {max(q.class_shares):.3f}" for q in rows.values()
        ],
    }
    head = ["", *rows]
    return "\n".join(
        "| " + " | ".join(row) + " |"
        for row in [head, ["---"] * len(head), *([key, *found] for key, found in lines.items())]
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratios(found: Ratios | None) -> str:
    return "-" if found is None else " / ".join(f"{value:.2f}" for value in found)


def write(path: Path, quality: Quality, **facts: Any) -> None:
    """quality.json, aside first: the figures and what they were measured with."""
    figures = asdict(quality)
    for key in ("texture_samples", "texture_reconstructions"):
        ratios = getattr(quality, key)
        figures[key] = None if ratios is None else ratios._asdict()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    durable.write_text(aside, json.dumps({**facts, **figures}, indent=1) + "\n")
    aside.rename(path)
