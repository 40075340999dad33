"""The data of a run: WebDataset shards and how they are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ShardsConfig:
    """WebDataset shards in PATH/train/*.tar and PATH/test/*.tar, as `tandem data make` or any other maker wrote
    them."""

    path: Path
    """Folder that holds train/ and test/."""
    size: int | tuple[int, int]
    """Pixels: a side of square images, or (height, width). The shards must hold exactly this size."""
    kind: Literal["shards"] = "shards"
    """WebDataset shards."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: colour. Grey images are repeated where 3 are asked for; colour is refused where 1 is."""
    image: str = "auto"
    """Field of the shards that holds the image, such as png or left.png; auto takes the one with a known extension.
    Only for shards without an index."""
    flip: bool = False
    """Whether each image is mirrored left to right with probability 1/2, on the device."""
    window: int = 4
    """Shards whose samples are mixed. Shards that were shuffled when packed need few (4), sorted ones all."""
    readers: int = 2
    """Threads a rank that read and decode; none are started where the set is held in memory."""
    prefetch: int = 4
    """Batches a rank that are read ahead."""
    cache_mb: int = 1024
    """MiB a rank: a split whose pixels fit is decoded once and held in memory; 0 never."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Red, green, blue (0 to 255) behind transparent pixels."""
    max_bad_share: float = 0.01
    """Share of a split that may fail to decode before the run stops; one sample is always allowed unless this is 0. Bad
    samples are replaced by the next good one of the shards, and counted."""

    def __post_init__(self) -> None:
        for name, low in (("window", 1), ("readers", 1), ("prefetch", 1), ("cache_mb", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least {low}")
        if min(self.shape[:2]) < 1:
            raise ValueError(f"size: {self.size} must be at least 1 pixel")
        if not all(0 <= level <= 255 for level in self.background):
            raise ValueError(f"background: {self.background} must be three levels from 0 to 255")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share: {self.max_bad_share} must be from 0 to 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height, width, self.channels
