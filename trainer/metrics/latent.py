"""What the latent space is used for: active units, streaming and over ranks."""

from collections.abc import Callable

from torch import Tensor

from trainer.metrics.moments import Moments

ACTIVE = 0.01  # variance of the posterior's mean over the data, Burda et al. 2016


class ActiveUnits:
    """Cov_x(E_q(u|x)[u]) of each latent dimension (Burda et al. 2016, section 5.2); above 0.01 it is active."""

    def __init__(self) -> None:
        self._moments = Moments(cross=False)

    def add(self, mean: Tensor) -> None:
        """Posterior means (B, *latent), B may be 0."""
        self._moments.add(mean.flatten(1))

    def merged(self, reduce: Callable[[Tensor], Tensor]) -> "ActiveUnits":
        """The same over all ranks; `reduce` sums a tensor over them. A collective."""
        merged = ActiveUnits()
        merged._moments = self._moments.merged(reduce)
        return merged

    def variances(self) -> Tensor:
        """(dims,) float64, over the samples added."""
        return self._moments.variances()

    def count(self) -> int:
        """Active dimensions."""
        return int((self.variances() > ACTIVE).sum())
