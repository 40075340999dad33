"""Adversarial losses, by name: both players' sides, for logits where higher means more real.

real: (B,) logits, or (B, h, w) of patches; fake: (k*B,) or (k*B, h, w), k blocks of B in the same order, each paired
with the real logits. Losses are (k*B,), averaged over a sample's patches; both players minimise.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


class AdversarialLoss(NamedTuple):
    """One game. `generator` takes the real logits as its second argument, which it needs only where `paired`."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor | None], Tensor]
    paired: bool = False


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))) (Goodfellow et al. 2014, eq. 1)."""
    return _each(_pair(softplus(-_full(real)), fake) + softplus(_full(fake)))


def non_saturating_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """-log sigmoid(D(G(z))) (Goodfellow et al. 2014, section 3)."""
    return _each(softplus(-_full(fake)))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """max(0, 1 - D(x)) + max(0, 1 + D(G(z))) (Lim and Ye 2017); VQGAN and latent diffusion take half of it."""
    return _each(_pair(relu(1.0 - _full(real)), fake) + relu(1.0 + _full(fake)))


def hinge_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """-D(G(z)) (Lim and Ye 2017)."""
    return _each(-_full(fake))


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """((D(x) - 1)^2 + D(G(z))^2) / 2 (Mao et al. 2017, eq. 9)."""
    return _each(0.5 * (_pair((_full(real) - 1.0).square(), fake) + _full(fake).square()))


def least_squares_generator(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """(D(G(z)) - 1)^2 / 2 (Mao et al. 2017, eq. 9)."""
    return _each(0.5 * (_full(fake) - 1.0).square())


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """D(G(z)) - D(x) (Arjovsky et al. 2017, eq. 2, minimised); needs a penalty."""
    return _each(_full(fake) - _pair(_full(real), fake))


def relativistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-(D(x) - D(G(z)))) of pairs (Huang et al. 2024, R3GAN; Jolicoeur-Martineau 2019)."""
    return _each(softplus(_full(fake) - _pair(_full(real), fake)))


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
