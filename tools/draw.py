"""tandem sample | reconstruct | interpolate RUN: pictures from a trained run, by its averaged weights."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.data import Stream, Transform, to_device, to_uint8
from trainer.data.config import of_set
from trainer.generate import Trained, home, load
from trainer.pictures import Picture, grid, pairs, write_png

LARGEST = 10_000  # images of one picture; more than any screen shows
DEFAULT_OUT = "RUN/pictures/{}.png"


def sample(argv: list[str]) -> int:
    """tandem sample"""
    parser = _parser("sample", "Draws images from the prior.", "tandem sample runs/vaegan_fashion --count 64 --seed 3")
    parser.add_argument("--count", type=int, default=96, metavar="N", help="images (default: 96)")
    parser.add_argument("--columns", type=int, default=12, metavar="N", help="images a row (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents; image i is the same for any --count")
    options = parser.parse_args(argv)
    _positive(options.count, "--count")
    _positive(options.columns, "--columns")

    def draw(run: Trained) -> Picture:
        return grid(torch.cat(list(run.sample(options.count, seed=options.seed))), columns=options.columns)

    return _write(options, "sample", draw, f"{options.count} samples, seed {options.seed}")


def reconstruct(argv: list[str]) -> int:
    """tandem reconstruct"""
    parser = _parser(
        "reconstruct",
        "Draws test images over their reconstructions from the posterior mean.",
        "tandem reconstruct runs/vaegan_fashion --count 24 --data data/fashion-mnist",
    )
    parser.add_argument("--count", type=int, default=48, metavar="N", help="the first of the split (default: 48)")
    parser.add_argument("--columns", type=int, default=12, metavar="N", help="images a row (default: 12)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="shards (default: the run's own)")
    parser.add_argument("--split", default="test", metavar="NAME", help="train or test (default: test)")
    options = parser.parse_args(argv)
    _positive(options.count, "--count")
    _positive(options.columns, "--columns")

    def draw(run: Trained) -> Picture:
        data = run.config.data if options.data is None else of_set(run.config.data, options.data)
        stream = Stream(data, split=options.split, batch=1, rank=0, world=1, seed=0)
        given = to_device(stream.first(options.count), device=run.device, transform=Transform.plain(data))
        stream.close()
        rebuilt = run.reconstruct(given)
        if rebuilt is None:
            raise ValueError(f"{options.run}: a {run.config.method.kind} has no encoder, so it reconstructs nothing")
        return pairs(to_uint8(given.image), rebuilt, columns=options.columns)

    return _write(options, "reconstruct", draw, f"{options.count} images of {options.split} over their reconstructions")


def interpolate(argv: list[str]) -> int:
    """tandem interpolate"""
    parser = _parser(
        "interpolate",
        "Draws walks between latents from the prior, on the sphere that they lie on (slerp).",
        "tandem interpolate runs/vaegan_fashion --rows 8 --steps 12",
    )
    parser.add_argument("--rows", type=int, default=6, metavar="N", help="walks (default: 6)")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="images a walk, ends included (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the latents at the ends")
    options = parser.parse_args(argv)
    _positive(options.rows, "--rows")
    _positive(options.rows * options.steps, "--rows times --steps")
    if options.steps < 2:
        raise ValueError(f"--steps: {options.steps} is no walk; at least 2, its two ends")

    def draw(run: Trained) -> Picture:
        return grid(run.interpolate(rows=options.rows, columns=options.steps, seed=options.seed), columns=options.steps)

    return _write(options, "interpolate", draw, f"{options.rows} walks of {options.steps} images, spherical")


def _parser(verb: str, description: str, example: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"tandem {verb}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"PNG to write (default: {DEFAULT_OUT.format(verb)})")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    return parser


def _positive(value: int, name: str) -> None:
    if not 1 <= value <= LARGEST:
        raise ValueError(f"{name}: {value} makes no picture; 1 to {LARGEST:,}")


def _write(options: argparse.Namespace, verb: str, draw: Callable[[Trained], Picture], what: str) -> int:
    run = load(options.run)
    # the name of the default tells nothing of the seed, so the newest drawing takes its place
    if options.out is not None and options.out.suffix.lower() != ".png":
        raise ValueError(f"--out: {options.out} is no name of a PNG file; end it in .png")
    path = options.out or home(run.path) / "pictures" / f"{verb}.png"
    write_png(path, draw(run), overwrite=options.overwrite or options.out is None)
    print(f"{path}: {what}, by {run.path} ({run.images:,} images seen)")
    return 0
