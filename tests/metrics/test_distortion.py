"""PSNR: the mean over images of each image's own, whatever the batch (F5-4)."""

import pytest
import torch

from trainer.metrics import psnr
from trainer.metrics.spectrum import Texture


def off_by(*errors: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [-1, 1] whose errors are these on the scale [0, 1], where the peak is 1."""
    y = torch.full((len(errors), 1, 4, 4), -1.0, dtype=torch.float64)
    return y + 2 * torch.tensor(errors, dtype=torch.float64).view(-1, 1, 1, 1), y


def test_the_figure_is_the_mean_of_logarithms_in_every_split() -> None:
    x, y = off_by(0.5, 0.1)
    assert psnr(x, y).tolist() == pytest.approx([6.0206, 20.0], abs=1e-4)
    # F5-4: mean squared errors of 0.5 and 0.1 give 5.229 dB pooled
    squared = off_by(0.5**0.5, 0.1**0.5)
    together = psnr(*squared)
    assert together.mean().item() == pytest.approx(6.505, abs=5e-4)
    apart = [psnr(a, b).item() for a, b in zip(squared[0].split(1), squared[1].split(1), strict=True)]
    assert together.tolist() == apart


def test_ten_images_in_batches_of_four_give_the_figure_of_one_batch() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.rand(10, 3, 5, 4, generator=rng) * 2 - 1 for _ in range(2))
    parts = torch.cat([psnr(a, b) for a, b in zip(x.split(4), y.split(4), strict=True)])
    assert torch.equal(psnr(x, y), parts)


def test_identical_images_have_the_documented_finite_cap() -> None:
    x = torch.rand(2, 1, 4, 4)
    assert psnr(x, x).tolist() == [100.0, 100.0]


def test_values_beyond_the_range_count_as_a_viewer_sees_them() -> None:
    x, y = torch.full((1, 1, 2, 2), 1.5), torch.full((1, 1, 2, 2), 1.0)
    assert psnr(x, y).item() == 100.0


@pytest.mark.parametrize(
    ("x", "y", "word"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5), r"\(2, 1, 4, 5\)"),
        (torch.zeros(4, 4), torch.zeros(4, 4), "(B, C, H, W)"),
    ],
)
def test_what_cannot_be_compared_is_refused(x: torch.Tensor, y: torch.Tensor, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        psnr(x, y)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 8, 8), 1.2), "1.2"),
        (torch.full((1, 3, 8, 8), -128.0), "-128"),
        (torch.full((1, 3, 8, 8), float("nan")), "nan"),
    ],
)
def test_images_out_of_range_are_refused_with_what_was_found(image: torch.Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=f"psnr: .*{found}"):
        psnr(torch.zeros(1, 3, 8, 8), image)
    with pytest.raises(ValueError, match=f"spectrum: .*{found}"):
        Texture().add(image)
