"""What tools/bench/gpu.py needs beside torch, triton and numpy, for a machine without a network: one folder.

    python -m tools.bench.carry wheels                              # here, for Python 3.12 there; 24 MB
    PYTHONPATH=wheels python -m tools.bench.gpu                     # there

The versions are those of tools/setup/constraints.txt. Packages that are only imported need not be carried:
tools/bench/stand_in.py has them.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trainer.errors import boundary

CONSTRAINTS = Path(__file__).parents[1] / "setup" / "constraints.txt"
PACKAGES = (
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"),  # configs
    *("PyYAML", "tyro", "docstring_parser", "typeguard", "safetensors"),
    *("pytest", "pytest-timeout", "pluggy", "iniconfig", "packaging", "Pygments", "hypothesis", "sortedcontainers"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_5_x86_64")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.carry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--python", default="3.12", help="version there (default: 3.12)")
    parser.add_argument("--list", action="store_true", help="say what it would be, and fetch nothing")
    return parser.parse_args(argv)


def pinned() -> list[str]:
    """PACKAGES with their versions. ValueError for one that constraints.txt does not know."""
    lines = [line.split(";")[0].strip() for line in CONSTRAINTS.read_text().splitlines()]
    known = {_plain(line.partition("==")[0]): line for line in lines if "==" in line}
    missing = [name for name in PACKAGES if _plain(name) not in known]
    if missing:
        raise ValueError(f"{CONSTRAINTS}: has no version of {missing[0]}; write it anew with tools/setup/setup.py")
    return [known[_plain(name)] for name in PACKAGES]


def _plain(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def main(argv: list[str]) -> int:
    given = parse(argv)
    wanted = pinned()
    if given.list:
        print("\n".join(wanted))
        return 0
    if given.folder.exists() and any(given.folder.iterdir()):
        raise ValueError(f"{given.folder}: is there and not empty; name a new folder")
    with tempfile.TemporaryDirectory(prefix="tandem-carry-") as folder:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        for package in wanted:  # one by one: pip refuses all where one needs another platform
            command = [
                sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                "--dest", folder, "--python-version", given.python, "--implementation", "cp", *platforms, package,
            ]  # fmt: skip
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise ValueError(f"{package}: {ended.stderr.strip().splitlines()[-1]}")
        given.folder.mkdir(parents=True, exist_ok=True)
        packed = 0
        for wheel in sorted(Path(folder).glob("*.whl")):
            packed += wheel.stat().st_size
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(given.folder)
    size = sum(path.stat().st_size for path in given.folder.rglob("*") if path.is_file())
    print(f"{given.folder}: {len(wanted)} packages, {packed / 1e6:.1f} MB packed, {size / 1e6:.1f} MB now")
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))
