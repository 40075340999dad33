"""Emoji: 3,786 pictures of 64 x 64 as Google and as Twitter draw them, with names and categories.

From the npm packages emoji-datasource-google and -twitter. Both have the same file names, so that `--style pairs` gives
image-to-image pairs.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tools.shards import named, npm
from tools.shards.encode import encode
from tools.shards.folder import divide, natural, order
from tools.shards.npm import Package
from tools.shards.pack import Bar, Packed, Plan
from trainer.data import convert

PACKAGES = {
    "google": Package(
        "emoji-datasource-google", "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==", 74,
    ),
    "twitter": Package(
        "emoji-datasource-twitter", "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==", 62,
    ),
}  # fmt: skip
STYLES = {"google": ("google",), "twitter": ("twitter",), "pairs": ("google", "twitter")}
LICENCES = {
    "google": "Apache-2.0 (Noto Emoji, Google)",
    "twitter": "CC BY 4.0 (Twemoji, Twitter and other contributors)",
}
SIDES = ("left", "right")
MAX_PIXELS = 1 << 16
TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark",
}  # fmt: skip
"""Fitzpatrick modifiers (Unicode Technical Standard 51, 2.4)."""
_SAME = re.compile(r"-(FE0F|1F3F[B-F]|200D-26(40|42)(-FE0F)?)(?![0-9A-F])")
"""What makes another drawing of the same thing: presentation, skin tone, a sign of gender."""
_PERSON = re.compile(r"(?<![0-9A-F])1F46[89](?![0-9A-F])")


class Emoji(NamedTuple):
    key: str
    """Code points in lower case, as the packages name the file."""
    base: str
    """What all drawings of the same thing have in common: they stay on one side of the split."""
    metadata: dict[str, Any]


def make(options: argparse.Namespace, *, bar: Bar, say: Callable[[str], int]) -> int:
    """`tandem data make emoji`."""
    styles = STYLES[options.style]
    packages = [PACKAGES[style] for style in styles]
    wanted = {
        **named.settings(options, "style"),
        "packages": [f"{package.name}@{package.version}" for package in packages],
    }
    if named.is_complete(options, wanted, say):
        return 0
    paths = npm.archives(packages, given=options.given, cache=options.cache, say=say)
    trees = [
        npm.members(path, lambda name, style=style: name == "emoji.json" or name.startswith(f"img/{style}/64/"))  # type: ignore[misc]
        for path, style in zip(paths, styles, strict=True)
    ]
    pictures = [
        {name.rpartition("/")[2].removesuffix(".png"): data for name, data in tree.items() if name.endswith(".png")}
        for tree in trees
    ]
    found = list(emojis(json.loads(trees[0]["emoji.json"]), pictures))
    categories = sorted({emoji.metadata["category"] for emoji in found}, key=natural)

    def encoded(split: str, number: int, emoji: Emoji) -> Packed:
        images = [_image(picture[emoji.key], options) for picture in pictures]
        label = categories.index(emoji.metadata["category"])
        if len(images) == 1:
            return Packed(emoji.key, *images[0][:2], label, emoji.metadata, images[0].shape)
        (left, right), (first, second) = images, SIDES
        further = {f"{second}.{right.field}": right.data}
        return Packed(emoji.key, f"{first}.{left.field}", left.data, label, emoji.metadata, left.shape, extra=further)

    plan = Plan(
        splits=_splits(found, options),
        classes=tuple(categories),
        options=wanted,
        notes={
            "licence": "; ".join(LICENCES[style] for style in styles) + "; names and categories: MIT (Cal Henderson)",
            "source": ", ".join(f"npm {package.name} {package.version}" for package in packages),
        },
    )
    what = "pairs: left as Google draws it, right as Twitter" if len(styles) > 1 else "emoji"
    return named.finish(options, plan, encoded, what=what, bar=bar, say=say)


def emojis(table: Sequence[Mapping[str, Any]], pictures: Sequence[Mapping[str, bytes]]) -> Iterator[Emoji]:
    """The emoji of emoji.json that every package has a picture of, in the table's order, each with its skin tones.
    Equal pictures have one base, whatever their code points."""
    rows = [(entry, tones, image) for entry in table for tones, image in _images(entry)]
    rows = [row for row in rows if all(row[2] in drawn for drawn in pictures)]
    bases: dict[str, str] = {}
    first: dict[bytes, str] = {}
    for entry, _, image in rows:
        base = _root(bases, _base(entry))
        for drawn in pictures:
            seen = _root(bases, first.setdefault(hashlib.sha256(drawn[image]).digest(), base))
            bases[max(base, seen)] = base = min(base, seen)
    for entry, tones, image in rows:
        metadata = {
            "name": entry["name"].lower(),
            "short_name": entry["short_name"],
            "category": entry["category"],
            "subcategory": entry["subcategory"],
            "skin_tones": tones,
        }
        yield Emoji(image, _root(bases, _base(entry)), metadata)


def _images(entry: Mapping[str, Any]) -> Iterator[tuple[list[str], str]]:
    """(skin tones, name of the picture) of an entry."""
    yield [], entry["image"].removesuffix(".png")
    for modifiers, variation in entry.get("skin_variations", {}).items():
        yield [TONES[modifier] for modifier in modifiers.split("-")], variation["image"].removesuffix(".png")


def _base(entry: Mapping[str, Any]) -> str:
    """Of an entry, not of its variations: a handshake of two tones is written as two hands."""
    return _PERSON.sub("1F9D1", _SAME.sub("", entry["unified"].upper()))


def _root(bases: dict[str, str], base: str) -> str:
    """The base that `base` was joined to."""
    while bases.get(base, base) != base:
        base = bases[base]
    return base


def _splits(found: Sequence[Emoji], options: argparse.Namespace) -> dict[str, list[Emoji]]:
    """By base."""
    by_key = {emoji.key: emoji for emoji in found}
    sides = divide(dict.fromkeys(emoji.base for emoji in found), options.seed, options.val_fraction)
    splits = {}
    for split, bases in sides.items():
        here = set(bases)
        keys = [emoji.key for emoji in found if emoji.base in here]
        splits[split] = [by_key[key] for key in order(keys, options.seed, shuffle=options.shuffle)]
    return {split: emoji for split, emoji in splits.items() if emoji}


def _image(data: bytes, options: argparse.Namespace) -> Any:
    image = convert.pixels(convert.open_image(data, max_pixels=MAX_PIXELS), data, background=(255, 255, 255)).image
    return encode(convert.resize(convert.with_channels(image, 3), options.size), options.format)
