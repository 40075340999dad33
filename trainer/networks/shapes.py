"""The shape of an image, and what a network says about a shape that it cannot take."""

from typing import NamedTuple


class ImageShape(NamedTuple):
    """Channels, height and width of an image, in pixels: the order of NCHW without N."""

    channels: int
    height: int
    width: int

    @property
    def dims(self) -> int:
        """Elements of one image: what nats are divided by to give bits a dimension."""
        return self.channels * self.height * self.width


def check_divisible(image: ImageShape, *, factor: int) -> None:
    """Refuses an image whose height or width `factor` does not divide, naming the nearest sizes that work.

    Nothing is padded or cropped in silence: a padded pixel would count in a loss, a cropped one in no metric.
    """
    sizes = (image.height, image.width)
    if all(size % factor == 0 for size in sizes):
        return
    below = tuple(size // factor * factor for size in sizes)
    above = tuple(-(-size // factor) * factor for size in sizes)
    nearest = [f"{height} x {width}" for height, width in (below, above) if height and width]
    raise ValueError(
        f"size: {image.height} x {image.width} (height x width) is not divisible by {factor}, by which the network's"
        f" multipliers shrink it; nearest that work: {' or '.join(nearest)}"
    )
