"""Adversarial losses, by name: both players' sides, for logits where higher means more real. Both players minimise.

The discriminator's side takes the logits of one forward: B real ones, then k blocks of B fakes, each paired with the
real one of its row; ((1 + k) B,), or ((1 + k) B, h, w) of patches. It gives the loss (B,), averaged over a sample's
patches and over its k fakes, and the accuracies, each from one pass over the logits.
The generator's side takes fake logits, (k B,) or (k B, h, w), and gives (k B,).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


class Verdict(NamedTuple):
    """What a discriminator's logits say of it."""

    loss: Tensor
    """(B,)."""
    accuracy: dict[str, Tensor]
    """Shares in [0, 1], float32, without a graph: of `real` (B,) and `fake` (k B,) told by the logit's sign, or of
    `pairs` (k B,) in their right order, where only differences count and a sign means nothing."""


class AdversarialLoss(NamedTuple):
    """One game. `generator` takes the real logits as its second argument, which it needs only where `paired`."""

    discriminator: Callable[[Tensor, int], Verdict]
    """Of logits and B."""
    generator: Callable[[Tensor, Tensor | None], Tensor]
    paired: bool = False


def non_saturating_discriminator(logits: Tensor, batch: int) -> Verdict:
    """-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))) (Goodfellow et al. 2014, eq. 1)."""
    wrong = _wrong(logits, batch)
    return _by_sign(softplus(wrong), wrong)


def non_saturating_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """-log sigmoid(D(G(z))) (Goodfellow et al. 2014, section 3)."""
    return _each(softplus(-_full(fake)))


def hinge_discriminator(logits: Tensor, batch: int) -> Verdict:
    """max(0, 1 - D(x)) + max(0, 1 + D(G(z))) (Lim and Ye 2017); VQGAN and latent diffusion take half of it."""
    wrong = _wrong(logits, batch)
    return _by_sign(relu(1.0 + wrong), wrong)


def hinge_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """-D(G(z)) (Lim and Ye 2017)."""
    return _each(-_full(fake))


def least_squares_discriminator(logits: Tensor, batch: int) -> Verdict:
    """((D(x) - 1)^2 + D(G(z))^2) / 2 (Mao et al. 2017, eq. 9)."""
    wrong = _wrong(logits, batch)
    is_real = 0.5 - 0.5 * _signs(len(wrong), wrong.device)
    return _by_sign(0.5 * (is_real + wrong).square(), wrong)


def least_squares_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """(D(G(z)) - 1)^2 / 2 (Mao et al. 2017, eq. 9)."""
    return _each(0.5 * (_full(fake) - 1.0).square())


def wasserstein_discriminator(logits: Tensor, batch: int) -> Verdict:
    """D(G(z)) - D(x) (Arjovsky et al. 2017, eq. 2, minimised); needs a penalty."""
    wrong = _wrong(logits, batch)
    return _by_sign(wrong, wrong)


def relativistic_discriminator(logits: Tensor, batch: int) -> Verdict:
    """softplus(-(D(x) - D(G(z)))) of pairs (Huang et al. 2024, R3GAN; Jolicoeur-Martineau 2019)."""
    real, fake = torch.split(_rows(logits, batch), [1, len(logits) // batch - 1])
    wrong = fake - real
    return Verdict(softplus(wrong).mean((0, 2)), {"pairs": _right(wrong).flatten()})


def relativistic_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """softplus(-(D(G(z)) - D(x))) of pairs; real logits without a graph."""
    assert real is not None, "relativistic: the generator's loss needs the real logits"
    return _each(softplus(_pair(_full(real), fake) - _full(fake)))


LOSSES: dict[str, AdversarialLoss] = {
    "non_saturating": AdversarialLoss(non_saturating_discriminator, non_saturating_generator),
    "hinge": AdversarialLoss(hinge_discriminator, hinge_generator),
    "least_squares": AdversarialLoss(least_squares_discriminator, least_squares_generator),
    "wasserstein": AdversarialLoss(wasserstein_discriminator, hinge_generator),
    "relativistic": AdversarialLoss(relativistic_discriminator, relativistic_generator, paired=True),
}


@cache
def _signs(rows: int, device: torch.device) -> Tensor:
    """-1 for the row of the real logits, 1 for those of the fakes; (1 + k, 1, 1)."""
    return torch.tensor([-1.0] + [1.0] * (rows - 1), device=device).view(-1, 1, 1)


def _rows(logits: Tensor, batch: int) -> Tensor:
    """((1 + k) B, ...) -> (1 + k, B, patches), float32 or float64."""
    blocks, rest = divmod(len(logits), batch)
    assert rest == 0 and blocks > 1, f"{len(logits)} logits are no whole number of blocks of {batch}, real and fake"
    return _full(logits).reshape(blocks, batch, -1)


def _wrong(logits: Tensor, batch: int) -> Tensor:
    """How far each logit is on the wrong side: -D(x) of the real ones, D(G(z)) of the fakes; (1 + k, B, patches)."""
    rows = _rows(logits, batch)
    return rows * _signs(len(rows), rows.device)


def _by_sign(losses: Tensor, wrong: Tensor) -> Verdict:
    """The loss is the sum of the real image's and of the mean over its fakes."""
    real, fake = torch.split(_mean(losses), [1, len(losses) - 1])
    right = _right(wrong)
    return Verdict((real + fake.mean(0)).squeeze(0), {"real": right[0], "fake": right[1:].flatten()})


def _right(wrong: Tensor) -> Tensor:
    """The share of a sample's patches that are on the right side."""
    return _mean((wrong.detach() < 0).float())


def _mean(x: Tensor) -> Tensor:
    """Over patches."""
    return x.squeeze(2) if x.shape[2] == 1 else x.mean(2)


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pair(real: Tensor, fake: Tensor) -> Tensor:
    """`real` repeated to the length of `fake`, block by block."""
    assert real.shape[1:] == fake.shape[1:], f"logits {tuple(real.shape)} and {tuple(fake.shape)} cannot be paired"
    times, rest = divmod(len(fake), len(real))
    assert rest == 0, f"{len(fake)} fake logits are no whole number of blocks of {len(real)} real ones"
    return real if times == 1 else real.repeat(times, *[1] * (real.dim() - 1))


def _each(x: Tensor) -> Tensor:
    """(B, ...) -> (B,), the mean over patches."""
    return x if x.dim() == 1 else x.flatten(1).mean(1)
