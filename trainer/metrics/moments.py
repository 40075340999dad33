"""Count, mean and covariance of a stream of vectors, in float64, merged over splits and ranks."""

from collections.abc import Callable

import torch
from torch import Tensor


class Moments:
    """Sums of (B, dims) rows about a fixed origin, so any split adds up to the same.

    cross: the whole covariance; otherwise variances only, which need dims numbers where the whole takes dims^2."""

    def __init__(self, *, cross: bool = True) -> None:
        self.cross = cross
        self.n: Tensor | None = None  # a tensor, so that nothing waits for the device
        self.sum = self.products = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """rows: (B, dims) of any float type, on any device; B may be 0."""
        assert rows.dim() == 2, f"rows of vectors, not {tuple(rows.shape)}"
        x = rows.detach().to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)
        n = torch.full((1,), len(x), dtype=torch.float64, device=x.device)
        products = x.T @ x if self.cross else x.square().sum(0)
        if self.n is None:
            self.n, self.sum, self.products = n, x.sum(0), products
        else:
            self.n, self.sum, self.products = self.n + n, self.sum + x.sum(0), self.products + products

    def merged(self, reduce: Callable[[Tensor], Tensor]) -> "Moments":
        """The same over all ranks; `reduce` sums a tensor over them. A collective: every rank has added something."""
        assert self.n is not None, "nothing was added on this rank; add its empty batch"
        parts = [self.n, self.sum, self.products.flatten()]
        n, total, products = torch.split(reduce(torch.cat(parts)), [len(part) for part in parts])
        merged = Moments(cross=self.cross)
        merged.n, merged.sum, merged.products = n.clone(), total.clone(), products.clone().view_as(self.products)
        return merged

    @property
    def count(self) -> int:
        """Rows added; waits for the device."""
        return 0 if self.n is None else int(self.n.item())

    def mean(self) -> Tensor:
        """(dims,)."""
        return self.sum / self._some()

    def variances(self) -> Tensor:
        """(dims,), over n."""
        n = self._some()
        squares = self.products.diagonal() if self.cross else self.products
        return (squares / n - (self.sum / n).square()).clamp(min=0.0)

    def covariance(self) -> Tensor:
        """(dims, dims), over n - 1; zeros for one row."""
        assert self.cross, "only variances were kept"
        n = self._some()
        centred = self.products - torch.outer(self.sum, self.sum) / n
        return 0.5 * (centred + centred.T) / (n - 1.0).clamp(min=1.0)

    def _some(self) -> Tensor:
        if self.n is None or self.count == 0:
            raise ValueError("statistics: no samples were added")
        return self.n
