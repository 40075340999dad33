"""Frechet distance between two sets of features, as Gaussians (Heusel et al. 2017, eq. 6).

A value means something only beside its feature network and its sample count: few samples add to it, so values of
different counts are not compared. FID is its name for Inception's features alone; ours carry their network's name.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.metrics.moments import Moments


class Frechet(NamedTuple):
    """A distance and the sample counts that belong to it."""

    value: float
    samples: int
    reference: int
    dims: int

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.samples:,} against {self.reference:,})"


def frechet(samples: Moments, reference: Moments) -> Frechet:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), real and finite for any number of samples, in float64.

    Warns where a set is no larger than the number of features: its covariance is singular, the value far too large.
    """
    m1, m2, c1, c2 = samples.mean(), reference.mean(), samples.covariance(), reference.covariance()
    if m1.shape != m2.shape:
        raise ValueError(f"frechet: features of {len(m1)} and {len(m2)} dimensions; take both from one network")
    fewest = min(samples.count, reference.count)
    if fewest <= len(m1):
        warnings.warn(
            f"frechet: {fewest} samples in {len(m1)} dimensions say little; take several times more", stacklevel=2
        )
    # tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): no root of a matrix that is singular or,
    # by rounding, not symmetric, which is where the usual form turns complex
    cross = torch.linalg.svdvals(_root(c1).T @ _root(c2)).sum()
    value = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2.0 * cross
    return Frechet(float(value), samples.count, reference.count, len(m1))


def _root(covariance: Tensor) -> Tensor:
    """R with R R^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0.0).sqrt()
    return root
