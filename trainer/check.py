"""tandem check CONFIG [key=value ...] [--processes N[,N...]]

Says what a config would do, without training: sizes, cost, memory, communication, batches; tries two updates and a
checkpoint.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer import build, check_costs, checkpoint
from trainer import config as configuration
from trainer.check_watch import Watched, watch
from trainer.config import Config
from trainer.data import Stream, Transform, to_device
from trainer.health import NonFinite
from trainer.methods import Method
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start
from trainer.saving import Saver
from trainer.step import means

EXAMPLE = """\
example:
  tandem check configs/vaegan_fashion.yaml --processes 2 batch=128
  tandem check configs/vaegan_fashion.yaml --processes 2 parallel.kind=deepspeed parallel.stage=2
  tandem check configs/vaegan_fashion.yaml --processes 1,2,8,64,1024
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem check",
        description="Says what a config would do, without training, and tries two updates and a checkpoint.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--processes",
        type=numbers,
        metavar="N[,N...]",
        help="ranks to plan for (default: the config's, or 1); several: memory and communication of every backend too",
    )
    options = parser.parse_intermixed_args(argv)
    config, said = build.resolve(configuration.load(options.config, options.overrides))
    sizes = options.processes or [config.parallel.processes or 1]
    found = check(config, world=sizes[0], worlds=sizes if len(sizes) > 1 else ())
    table = Table(title=str(options.config), show_header=False, title_justify="left")
    for name, value in found.rows.items():
        table.add_row(name, value)
    Console().print(table, *said, sep="\n")
    if found.worlds:
        head, *rows = found.worlds
        table = Table(
            *head,
            title=f"MB a rank: at the peak of an update, without activations / between / sent\n{found.share}",
            title_justify="left",
        )
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    return 0


def numbers(text: str) -> list[int]:
    """For argparse: 1,2,8."""
    found = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of processes, or several as in 1,2,8; 1 is the least")
    return found


@dataclasses.dataclass(frozen=True)
class Found:
    """What `tandem check` prints."""

    rows: dict[str, str]
    """Name -> figure with its unit."""
    worlds: list[list[str]]
    """Memory and communication of every backend on other numbers of ranks, a row a backend below its heading."""
    share: str
    """What each of these ranks does: as many images as on the first number, so that the batch grows with the ranks."""


def check(config: Config, *, world: int, worlds: Sequence[int] = ()) -> Found:
    """Two updates of one rank's share are taken for real, on one process. worlds: other numbers of ranks to compare."""
    micro_batches, share = config.micro_batches(world), config.share(world)
    ranks = start(DDPConfig(processes=1))
    try:
        # the batches of one rank among `world`; without the others the updates are this rank's alone
        train, test = (
            Stream(config.data, split=split, batch=config.batch, rank=0, world=world, seed=config.seed)
            for split in ("train", "test")
        )
        method = build.build_method(config, device=ranks.device)
        networks = build.build_networks(method, seed=config.seed)
        transform = Transform.training(config.data, seed=config.seed)
        batches = (to_device(raw, device=ranks.device, transform=transform) for raw in train.batches(0))
        seen = watch(config, method, networks, ranks, batches, world=world, images=_late(config, method))
        losses = means(seen.run.kept, ranks)
        cpu, lazy = ranks.device.type == "cpu", _lazy(method)
        image = build.image_shape(config)
        rows = {
            "method": config.method.kind,
            "networks": ", ".join(
                f"{name} {sum(p.numel() for p in network.parameters()):,} parameters"
                for name, network in networks.items()
            ),
            "image": f"{image.channels} x {image.height} x {image.width}",
            "latent": " x ".join(map(str, method.latent_size)),
            "global batch": f"{config.batch} images: {_count(world, 'rank')} x "
            f"{_count(micro_batches, 'micro-batch')} of {share // micro_batches}",
            "budget": f"{config.images:,} images, {config.updates:,} updates, "
            f"{config.images / train.samples:.1f} epochs",
            "an epoch": f"{train.samples:,} images; {test.samples:,} to test on",
            "cost": _cost(seen.operations, lazy=lazy, share=share),
            "backend": check_costs.describe(config.parallel, world=world),
            **check_costs.rows(
                seen.networks, config.parallel, world=world, activations=seen.activations, lazy=lazy, cpu=cpu
            ),
            "two updates": ", ".join(
                f"{name.removeprefix('loss/')} {value:.4g}"
                for name, value in losses.items()
                if name.startswith("loss/")
            ),
            "a checkpoint": _try_checkpoint(config, ranks, seen, train),
        }
        hint = config.method.likelihood.hint(image.channels) if hasattr(config.method, "likelihood") else None
        if hint is not None:
            rows["hint"] = hint
        train.close()
        test.close()
        compared = check_costs.worlds(seen.networks, config.parallel, worlds, lazy=lazy, cpu=cpu) if worlds else []
        each = f"each with {share} images in {_count(micro_batches, 'micro-batch')}, as on {_count(world, 'rank')}"
        return Found(rows, compared, each)
    finally:
        ranks.close()


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{plural}"


def _lazy(method: Method) -> int:
    """Updates from one penalty to the next."""
    critic = getattr(method, "critic", None)
    return 1 if critic is None else int(critic.lazy)


def _late(config: Config, method: Method) -> int:
    """Images seen at which every phase and term takes part: past all ramps, and a penalty in the first update."""
    period = config.batch * _lazy(method)
    return -(-config.images // period) * period


def _cost(updates: list[int], *, lazy: int, share: int) -> str:
    """updates: operations of one with the penalties and of the next, which has none where the interval is longer."""
    total = (updates[0] + (lazy - 1) * updates[1]) / lazy
    note = f"; the mean of {lazy} updates, one of them with penalties" if lazy > 1 else ""
    return f"{total / share / 1e6:,.1f} MFLOPs an image, forward and backward of all phases{note}"


def _try_checkpoint(config: Config, ranks: Ranks, seen: Watched, stream: Stream) -> str:
    """Writes and reads one where the run's would lie, and leaves nothing behind."""
    existing = next(path for path in [config.run, *config.run.parents] if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".tandem-check-", dir=existing) as folder:
        trial = dataclasses.replace(config, run=Path(folder))
        nonfinite = NonFinite(patience=config.log.patience)
        saver = Saver(trial, ranks=ranks, engines=seen.engines, run=seen.run, nonfinite=nonfinite, stream=stream)
        saver.save(0, metrics={}, seconds=0.0)
        assert saver.path is not None
        checkpoint.load(saver.path)
        size = sum(path.stat().st_size for path in saver.path.iterdir())
    kept = config.checkpoint
    needed, room = checkpoint.needs(config.run, size, keep_last=kept.keep_last, keep_best=kept.keep_best)
    return (
        f"{size / 1e6:,.1f} MB, written and read; the run needs {needed / 1e6:,.1f} MB for its checkpoints, "
        f"there are {room / 1e6:,.1f} MB"
    )
