"""Files of Debian packages, without root and without installing them; apt checks signatures and sha256."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tools.shards.fetch import TIMEOUT, kept, run


def unpacked(packages: Sequence[str], *, given: Path | None, cache: Path, into: Path) -> Path:
    """`into`, with the files of the packages below it: of the .deb files in `given`, else fetched by apt into `cache`.
    OSError: no apt, no network, no such package. ValueError: `given` lacks one."""
    if not shutil.which("dpkg-deb"):
        raise OSError("this machine has no dpkg-deb (Debian, Ubuntu and their kin have it)")
    if given is not None:
        files = [newest(given, name) for name in packages]
        missing = [name for name, file in zip(packages, files, strict=True) if file is None]
        if missing:
            raise ValueError(f"{given}: holds no .deb file of {', '.join(missing)}; fetch it with apt-get download")
    else:
        files = fetched(packages, cache)
    for file in files:
        run(["dpkg-deb", "-x", str(file), str(into)], into)
    return into


def newest(folder: Path, package: str) -> Path | None:
    """apt gives a file the time of its release."""
    return max(folder.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime, default=None)


def fetched(packages: Sequence[str], cache: Path) -> list[Path]:
    """The .deb files, with apt's state of its own where this machine's lists do not know the packages."""
    if not shutil.which("apt-get"):
        raise OSError("this machine has no apt-get")
    with kept(cache) as folder:
        private = []
        for part in ("state/lists/partial", "cache/archives/partial"):
            (folder / "apt" / part).mkdir(parents=True, exist_ok=True)
        for key, value in {
            "Dir::State": folder / "apt" / "state",
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": folder / "apt" / "cache",
        }.items():
            private += ["-o", f"{key}={value}"]
        # the folder is ours alone, so apt's own user cannot write there
        start = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2"]
        start += ["-o", f"Acquire::http::Timeout={TIMEOUT}"]
        try:
            run([*start, "download", *packages], folder)
        except OSError:
            run([*start, *private, "update"], folder)
            run([*start, *private, "download", *packages], folder)
        files = [newest(folder, name) for name in packages]
    if None in files:
        raise OSError("apt-get downloaded nothing")
    return [file for file in files if file is not None]
