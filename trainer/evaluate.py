"""What a method is worth on the test split, measured on all ranks from the averaged weights."""

import contextlib
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from trainer.build import image_shape
from trainer.config import Config
from trainer.data import Batch, Feed, Interrupted, Stream, Transform
from trainer.kernels import noise
from trainer.losses.divergence import clamped_share
from trainer.losses.reconstruction import bits_per_dim, dequantize
from trainer.methods import Method
from trainer.metrics import psnr
from trainer.metrics.latent import ActiveUnits
from trainer.parallel.ranks import Ranks

SEED = 0  # of the posterior samples: two evaluations of one model agree exactly, whatever the run's seed


@torch.no_grad()
def evaluate(
    method: Method,
    networks: Mapping[str, nn.Module],
    stream: Stream,
    *,
    config: Config,
    limit: int | None,
    ranks: Ranks,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Means over the test split, or its first `limit` images; {} for a method without an encoder. A collective.

    psnr (dB): of reconstructions from the posterior mean, mean over images. nll, kl, nelbo (nats an image): see `elbo`.
    bits_per_dim/<likelihood>: of the nelbo, in the 8-bit scale. active_units: Burda et al. 2016, threshold 0.01.
    clamped: share of log-variances at the clamp; an encoder that saturates nears 1. stop: asked at each batch; where it
    says so on one rank, Interrupted on all.
    """
    if not hasattr(method, "encode"):
        return {}
    sums: dict[str, Tensor] = {}
    units, stopped = ActiveUnits(), False
    steps = None if limit is None else -(-limit // config.batch)
    with contextlib.closing(stream.evaluation(config.batch)) as batches:
        feed = Feed(islice(batches, steps), device=ranks.device, transform=Transform.plain(config.data))
        for given in feed:
            if stopped := stop():
                break
            weight = given.weight.double()
            mean, logvar = method.encode(networks, given.image)
            values = {
                "psnr": psnr(method.decode(networks, mean), given.image),
                "clamped": clamped_share(logvar),
                "count": torch.ones_like(weight),
            }
            bound = elbo(method, networks, given)
            if bound is not None:
                values["nll"], values["kl"] = bound
            for name, value in values.items():
                total = (value.double() * weight).sum()
                sums[name] = sums[name] + total if name in sums else total
            units.add(mean[given.weight > 0])
    ranks.agree(feed.fault)
    if ranks.largest(int(stopped)):
        raise Interrupted
    names = sorted(sums)
    total = ranks.sum(torch.stack([sums[name] for name in names]))
    found = dict(zip(names, total.tolist(), strict=True))
    count = found.pop("count")
    found = {name: value / count for name, value in found.items()}
    likelihood: Any = getattr(method, "likelihood", None)
    if likelihood is not None:
        found["nelbo"] = found["nll"] + found["kl"]
        bits = bits_per_dim(found["nelbo"], dims=image_shape(config).dims, discrete=likelihood.discrete)
        found[f"bits_per_dim/{likelihood.kind}"] = bits  # figures of two likelihoods do not compare
    found["active_units"] = float(units.merged(ranks.sum).count())
    found["images"] = count
    return found


@torch.no_grad()
def elbo(method: Method, networks: Mapping[str, nn.Module], batch: Batch) -> tuple[Tensor, Tensor] | None:
    """(nll, kl) in nats an image, (B,) each, at one posterior sample; minus the ELBO is their sum. None without one.

    A density sees images with noise of one level, without which its bits on 8-bit images have no bound (Theis et al.
    2016). Noise and posterior sample depend on the sample's index in the split alone."""
    if not hasattr(method, "elbo"):
        return None
    image = batch.image
    if not method.likelihood.discrete:  # type: ignore[attr-defined]  # what has an ELBO has a likelihood
        image = dequantize(image, noise.uniform(SEED, "dequantize", batch.index, tuple(image.shape[1:])))
    nll, kl = method.elbo(networks, image, noise.address(SEED, "evaluation", batch.index))
    return nll, kl
