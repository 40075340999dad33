"""Debian packages of few files, for tests."""

import subprocess
from pathlib import Path


def package(tree: Path, name: str, into: Path) -> Path:
    """`into`, with a .deb file that holds the files of `tree`."""
    (tree / "DEBIAN").mkdir()
    lines = [f"Package: {name}", "Version: 1.0", "Architecture: all", "Maintainer: none <none@example.org>"]
    (tree / "DEBIAN" / "control").write_text("\n".join([*lines, "Description: a test", ""]))
    into.mkdir(exist_ok=True)
    command = ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(into / f"{name}_1.0_all.deb")]
    subprocess.run(command, check=True, capture_output=True)
    return into
