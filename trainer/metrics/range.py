"""What every metric asks of its images (F5-3)."""

from torch import Tensor


def check_range(image: Tensor, *, name: str = "images") -> None:
    """ValueError where an image is no float or leaves [-1.05, 1.05], naming what was found; waits for the device.

    An image in [0, 1] cannot be told from a bright one: only the caller can know.
    """
    if not image.is_floating_point():
        raise ValueError(f"{name}: {image.dtype} is no image in [-1, 1]; convert it with trainer.data.to_float")
    if image.numel() == 0:
        return
    low, high = (float(v) for v in image.detach().aminmax())
    if not (low >= -1.05 and high <= 1.05):
        raise ValueError(f"{name}: values from {low:.4g} to {high:.4g} leave [-1, 1]; scale or clamp them first")
