"""The data of a run: where WebDataset shards are and how they are read."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer import bounds

Fit = Literal["exact", "resize", "center", "random"]
LONGEST = 65_535  # pixels of a side: what a JPEG can hold


def _placed(config: object, name: str) -> None:
    """ValueError where the field's value can be no place of this machine."""
    text = str(getattr(config, name))
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{name}: {text} begins with the home of a user that is not known here") from None
    if "\0" in text:
        raise ValueError(f"{name}: {text!r} has a zero byte in it")


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """Shards behind a URL: whole ones are fetched into a folder that the ranks of a machine share."""

    cache: Path = Path("~/.cache/tandem")
    """Folder for fetched shards, and for the index of shards in folders that cannot be written."""
    cache_gb: float = 50.0
    """GB of shards that stay there; those read longest ago go first. Must hold two windows of shards; at most 1e9."""
    ahead: int = 4
    """Shards that a machine fetches before they are needed; at most 256."""
    timeout: float = 60.0
    """Seconds after which a request is given up that brought no byte, or less than 64 KiB; at most a day."""
    retries: int = 5
    """Further tries after a failed request, with growing pauses; at most 1,000."""

    def __post_init__(self) -> None:
        bounds.at_least(0, self, "ahead", "retries")
        bounds.above_zero(self, "cache_gb", "timeout")
        bounds.at_most(256, self, "ahead")
        bounds.at_most(1000, self, "retries")
        bounds.at_most(86_400, self, "timeout")
        bounds.at_most(1e9, self, "cache_gb")
        _placed(self, "cache")


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What a shard may hold; more is refused by name, before it is read."""

    member_mb: float = 64.0
    """MB of a member of a shard; at most 1e6."""
    members: int = 64
    """Members of a sample."""
    megapixels: float = 64.0
    """Million pixels of data.size, and of an image by its header; at most 5,000."""

    def __post_init__(self) -> None:
        bounds.at_least(1, self, "members")
        bounds.above_zero(self, "member_mb", "megapixels")
        bounds.at_most(1e6, self, "member_mb")
        bounds.at_most(5_000, self, "megapixels")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How shards are read, whatever they are."""

    size: int | tuple[int, int]
    """Pixels that the networks see: a side of square images, or (height, width); at most 65,535 a side."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: colour. Grey images among coloured ones are repeated; a set that is all grey wants 1."""
    fit: Fit = "exact"
    """From the images of the shards to `size`. exact: they must be of that size. resize: scaled (antialiased) until
    `size` is just covered, the centre cut out. center, random: that part cut out unscaled; random by position, and the
    centre in an evaluation."""
    flip: bool = False
    """Whether each image is mirrored left to right with probability 1/2, on the device."""
    image: str = "auto"
    """Field of the shards that holds the image, such as png or left.png; auto takes the one with a known extension.
    Only for shards without an index."""
    label: str = "auto"
    """Field that holds the class: auto takes cls where there is one; json:species takes that key of the json.
    Only for shards without an index."""
    ignore: tuple[str, ...] = ()
    """Fields that are passed over although their kind is refused, such as pyd. Only for shards without an index."""
    tail: Literal["carry", "drop"] = "carry"
    """Of an epoch that the batch does not divide. carry: its last images begin the batch that the next epoch fills.
    drop: they are not seen in this epoch; in another they are others."""
    window: int | Literal["all"] = 4
    """Shards whose samples are mixed. Shards that were shuffled when packed need few (4), sorted ones all."""
    readers: int = 2
    """Threads a rank that read and decode, at most 256; none are started where the set is held in memory."""
    prefetch: int = 4
    """Batches a rank that are read ahead; memory must hold them."""
    cache_mb: int = 1024
    """MiB a rank: a split whose pixels fit is decoded once and held in memory; 0 never."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Red, green, blue (0 to 255) behind transparent pixels."""
    max_bad_fraction: float = 0.01
    """Share of a split that may fail to decode before the run stops; one sample is always allowed unless this is 0. Bad
    samples are replaced by the next good one of the shards, counted, and kept in the run's folder."""
    verify: Literal["touched", "size"] = "touched"
    """Before the first step every shard's size is compared with its index. touched: a shard that was written after its
    index is compared by sha256 too."""
    allow_pipe: bool = False
    """Whether `path` may start a program (pipe:). Must stand in the YAML file itself."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """Shards behind a URL."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """What a shard may hold."""

    def __post_init__(self) -> None:
        bounds.at_least(1, self, "readers", "prefetch")
        bounds.at_most(256, self, "readers")
        bounds.at_least(0, self, "cache_mb")
        if self.window != "all" and self.window < 1:
            raise ValueError(f"window: {self.window} must be at least 1, or all")
        if min(self.shape[:2]) < 1:
            raise ValueError(f"size: {self.size} must be at least 1 pixel")
        height, width, _ = self.shape
        if max(height, width) > LONGEST:
            raise ValueError(f"size: {self.size} must be at most {LONGEST:,} pixels")
        if height * width > self.limits.megapixels * 1e6:
            raise ValueError(
                f"size: {height} x {width} pixels are more than limits.megapixels, {self.limits.megapixels:g}, allows"
            )
        if not all(0 <= level <= 255 for level in self.background):
            raise ValueError(f"background: {self.background} must be three levels from 0 to 255")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction: {self.max_bad_fraction} must be from 0 to 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels that the networks see."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height, width, self.channels


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """One set of a mixture."""

    path: str | Path
    """Folder or URL that holds train/ and test/."""
    weight: float = 1.0
    """Share of the images that come from this set, relative to the others' weights."""

    def __post_init__(self) -> None:
        bounds.above_zero(self, "weight")
        _placed(self, "path")


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(Reading):
    """WebDataset shards in PATH/train/*.tar and PATH/test/*.tar, as `tandem data make` or any other maker wrote
    them."""

    path: str | Path
    """Folder or URL (https://, s3://, gs://, any of fsspec) that holds train/ and test/."""
    kind: Literal["shards"] = "shards"
    """WebDataset shards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _placed(self, "path")

    @property
    def sets(self) -> tuple[SetConfig, ...]:
        """As of a mixture: the one set."""
        return (SetConfig(path=self.path),)


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(Reading):
    """Several sets, mixed by weights in an order that depends on the seed alone."""

    sets: tuple[SetConfig, ...]
    """The sets. A test split is all of theirs, one after the other."""
    kind: Literal["mixture"] = "mixture"
    """Several sets of WebDataset shards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sets) < 2:
            raise ValueError(f"sets: {len(self.sets)} set is no mixture; name at least two, or take kind: shards")
        places = [os.path.normpath(os.path.expanduser(one.path)) for one in self.sets]  # noqa: PTH111  or a URL
        twice = next((one.path for n, one in enumerate(self.sets) if places[n] in places[:n]), None)
        if twice is not None:
            raise ValueError(f"sets: {twice} stands there twice; name it once, with the weight of both")


def of_set(config: "DataConfig", path: str | Path) -> ShardsConfig:
    """One other set, read as `config` says."""
    return ShardsConfig(path=path, **{field.name: getattr(config, field.name) for field in fields(Reading)})


DataConfig = Annotated[ShardsConfig | MixtureConfig, Field(discriminator="kind")]
"""What `data:` of a config may be."""
