"""KL(q(z|x) || p(z)) of a diagonal Gaussian posterior and a standard normal prior, in nats.

Kingma and Welling 2014, appendix B.

mean, logvar: (B, *latent). Float32 whatever comes in (float64 stays). logvar is clamped to [-30, 20], the field's range
(Rombach et al. 2022): everything is finite, and a value beyond gets no gradient; `clamped_share` shows it.
"""

import torch
from torch import Tensor

from trainer.kernels.reparameterize import LOGVAR_MAX, LOGVAR_MIN

LARGEST_HALF = torch.finfo(torch.float16).max


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """(B,): summed over latent dimensions."""
    return kl_per_dimension(mean, logvar).sum(1)


def kl_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """(B, dims): every element of the latent is a dimension, of a map too."""
    mean, logvar = _full(mean).flatten(1), _full(logvar).flatten(1).clamp(LOGVAR_MIN, LOGVAR_MAX)
    return 0.5 * (mean.square() + torch.expm1(logvar) - logvar)  # expm1: exact near logvar 0, where the prior is


def free_bits(kl_per_dimension: Tensor, nats: float) -> Tensor:
    """sum_j max(nats, KL_j), (B, dims) -> (B,): each dimension's first `nats` cost nothing.

    Kingma et al. 2016 (eq. 15) take the maximum of the batch's mean; here it is each sample's own. So the loss of a
    sample depends on no other, and micro-batches and ranks change nothing. Its mean is never below the paper's form
    (Jensen), and a sample under the floor feels no pull while others of its batch may."""
    return kl_per_dimension.clamp(min=nats).sum(1)


def clamped_share(logvar: Tensor) -> Tensor:
    """(B,): the share of a sample's log-variances at or beyond the clamp, 0 in health; a saturated encoder nears 1."""
    logvar = logvar.detach().flatten(1)
    return ((logvar <= LOGVAR_MIN) | (logvar >= LOGVAR_MAX)).float().mean(1)


def _full(x: Tensor) -> Tensor:
    """float32 at least; the gradient of a float16 input saturates, where e^12 / 2 would already be infinite."""
    full = x if x.dtype == torch.float64 else x.float()
    if x.dtype == torch.float16 and full.requires_grad:
        full.register_hook(_saturate)  # type: ignore[no-untyped-call]
    return full


def _saturate(gradient: Tensor) -> Tensor:
    return gradient.clamp(-LARGEST_HALF, LARGEST_HALF)
