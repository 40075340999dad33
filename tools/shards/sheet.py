"""Sheets of pictures with words: a contact sheet of a split, and what else is shown of data."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tools.shards import classes
from tools.shards.walk import Chunk, spread, walk
from tools.shards.words import counted
from trainer.data import index as indices
from trainer.data.config import ShardsConfig
from trainer.pictures import Picture, write_png

CELL = 112
"""Pixels of a side of a cell; images are enlarged by a whole factor or made smaller to fit."""
COLUMNS = 12
MOST_ROWS = 24
"""Classes that get a row of their own; of more, images get their class's name below."""
FLAT_ROWS = 8
GAP, TEXT, TITLE = 6, 13, 17  # pixels
PAPER, BEHIND, INK, FAINT = (255, 255, 255), (240, 240, 240), (30, 30, 30), (120, 120, 120)


class Tile(NamedTuple):
    picture: NDArray[np.uint8]
    """(H, W, 1 or 3)."""
    caption: tuple[str, ...] = ()
    """Lines below it."""


def check_name(path: Path) -> None:
    """Before hours of work: ValueError for a name that is not of a PNG file."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: is no name of a PNG file; end it in .png")


def contact(config: ShardsConfig, split: str, *, path: Path, seed: int, threads: int) -> str:
    """Draws images of a split, chosen by the seed: a row a class, or any with their class below. Returns a line that
    says what was drawn."""
    index = indices.load(config, split)
    named = bool(index.classes)
    by_row = named and len(index.classes) <= MOST_ROWS
    each = COLUMNS if by_row else COLUMNS * FLAT_ROWS
    samples = classes.some(index, each=each, seed=seed) if by_row else spread(index.samples, each, seed=seed)
    tiles: dict[int, list[Tile]] = {}
    for chunk in walk(index, config, look=_same, threads=threads, samples=np.sort(samples)):
        for row, image in zip(chunk.rows, chunk.images, strict=True):
            label = int(row["label"])
            caption = () if by_row or not named else (index.classes[label] if label >= 0 else "no label",)
            tiles.setdefault(label if by_row else 0, []).append(Tile(fit(image, CELL), caption))
    index.close()
    drawn = sum(map(len, tiles.values()))
    title = f"{index.store(0).name}   {drawn:,} of {counted(index.samples, 'image')}, seed {seed}"
    if by_row:
        order = sorted(tiles, key=lambda label: (label < 0, label))
        names = [index.classes[label] if label >= 0 else "no label" for label in order]
        picture = draw(title, [tiles[label] for label in order], names=names)
    else:
        every = tiles.get(0, [])
        picture = draw(title, [every[at : at + COLUMNS] for at in range(0, len(every), COLUMNS)])
    write_png(path, picture, overwrite=True)
    return f"{path}: {counted(drawn, 'image')} of {split}, seed {seed}"


def _same(chunk: Chunk) -> Chunk:
    return chunk


def fit(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(H, W, C) made to fit a square of `side`: enlarged by a whole factor, so that pixels stay what they are, or made
    smaller."""
    longer = max(image.shape[:2])
    if longer <= side:
        factor = side // longer
        return image.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = (max(1, round(part * side / longer)) for part in image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small).reshape(height, width, -1)


def beside(left: NDArray[np.uint8], right: NDArray[np.uint8], *, gap: int) -> NDArray[np.uint8]:
    """Two pictures (H, W, 1 or 3) as one (H, W, 3), each in the middle of a square, `gap` pixels apart."""
    side = max(*left.shape[:2], *right.shape[:2])
    both = np.full((side, 2 * side + gap, 3), PAPER, np.uint8)
    for picture, start in ((left, 0), (right, side + gap)):
        both[:, start : start + side] = BEHIND
        height, width = picture.shape[:2]
        top, at = (side - height) // 2, start + (side - width) // 2
        both[top : top + height, at : at + width] = picture  # grey is repeated
    return both


def draw(
    title: str, rows: Sequence[Sequence[Tile]], *, names: Sequence[str] = (), note: str = "", behind: bool = True
) -> Picture:
    """(H, W, 3) uint8: rows of tiles under a title. names: one a row, to its left. behind: whether tiles lie on grey
    squares, so that images of other shapes stand out."""
    font, large = (ImageFont.load_default(size) for size in (TEXT, TITLE))
    cell_width, cell_height = (
        max([CELL, *(tile.picture.shape[axis] for row in rows for tile in row)]) for axis in (1, 0)
    )
    captions = max([0, *(len(tile.caption) for row in rows for tile in row)])
    left = GAP + (GAP + min(200, int(max(map(font.getlength, names)))) if names else 0)
    top = 2 * GAP + TITLE + (TEXT + GAP if note else 0) + GAP
    step_x, step_y = cell_width + GAP, cell_height + GAP + captions * (TEXT + 3)
    width = max(left + step_x * max([1, *map(len, rows)]), int(large.getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (width, top + step_y * max(1, len(rows)) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), title, INK, large)
    pen.text((GAP, 2 * GAP + TITLE), note, FAINT, font)
    for number, row in enumerate(rows):
        y = top + number * step_y
        if names:
            pen.text((GAP, y + cell_height // 2 - TEXT // 2), _cut(names[number], left - 2 * GAP, font), INK, font)
        for column, tile in enumerate(row):
            x = left + column * step_x
            if behind:
                pen.rectangle((x, y, x + cell_width - 1, y + cell_height - 1), BEHIND)
            height, wide = tile.picture.shape[:2]
            colour = tile.picture if tile.picture.shape[2] == 3 else tile.picture.repeat(3, axis=2)
            sheet.paste(Image.fromarray(colour), (x + (cell_width - wide) // 2, y + (cell_height - height) // 2))
            for line, text in enumerate(tile.caption):
                at = y + cell_height + 2 + line * (TEXT + 3)
                pen.text((x, at), _cut(text, cell_width, font), INK if line == 0 else FAINT, font)
    return np.asarray(sheet)


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
