"""npm packages of a fixed version and sha512: as an archive, or installed for a node program."""

import base64
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tools.shards.fetch import download, kept, run, sha512

REGISTRY = "https://registry.npmjs.org/"


class Package(NamedTuple):
    name: str
    version: str
    integrity: str
    """As the registry states it: sha512- and base64."""
    megabytes: int

    @property
    def file(self) -> str:
        """As `npm pack` names it."""
        return f"{self.name.replace('@', '').replace('/', '-')}-{self.version}.tgz"


def archives(
    packages: Sequence[Package], *, given: Path | None, cache: Path, say: Callable[[str], int], registry: str = REGISTRY
) -> list[Path]:
    """The packages' .tgz files, of the right sha512: from `given`, else from `cache`, else from the registry, at once.
    ValueError says what is missing or another file."""
    if given is not None:
        for package in packages:
            fault = _fault(given / package.file, package)
            if fault:
                raise ValueError(
                    f"{given / package.file}: {fault}; `npm pack {package.name}@{package.version}` gets it"
                )
        return [given / package.file for package in packages]
    with kept(cache) as folder:
        wanted = [package for package in packages if _fault(folder / package.file, package)]
        for package in wanted:
            say(f"fetching {package.name} {package.version}, {package.megabytes} MB, from the npm registry")
        with ThreadPoolExecutor(max(1, len(wanted))) as pool:
            list(pool.map(lambda package: _fetch(package, folder, registry), wanted))
        return [folder / package.file for package in packages]


def _fault(path: Path, package: Package) -> str | None:
    if not path.is_file():
        return "is missing"
    if f"sha512-{base64.b64encode(sha512(path)).decode()}" != package.integrity:
        return "is not the published file (its sha512 differs)"
    return None


def _fetch(package: Package, folder: Path, registry: str) -> None:
    """By npm where it is there, since it knows the user's mirror and proxy; else from the registry."""
    tried = []
    for fetch in (_by_npm, _by_https):
        path = folder / package.file
        try:
            fetch(package, folder, registry)
        except OSError as error:
            tried.append(str(error))
            continue
        fault = _fault(path, package)
        if fault is None:
            return
        path.unlink(missing_ok=True)
        tried.append(fault)
    raise ValueError(
        f"{package.name} {package.version}: cannot be fetched ({'; '.join(tried)}); "
        f"bring {package.file} from a machine with network and name its folder with --from"
    )


def _by_npm(package: Package, folder: Path, registry: str) -> None:
    if not shutil.which("npm"):
        raise OSError("this machine has no npm")
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        run(["npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}"], Path(aside))
        os.replace(Path(aside) / package.file, folder / package.file)  # noqa: PTH105


def _by_https(package: Package, folder: Path, registry: str) -> None:
    name = f"{package.name.rpartition('/')[2]}-{package.version}.tgz"
    download(f"{registry}{package.name}/-/{name}", folder / package.file)


def members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """{name below the package: content} of the wanted regular files; nothing is written to disk."""
    found = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isreg() and wanted(name):
                file = archive.extractfile(member)
                assert file is not None
                found[name] = file.read()
    return found


def installed(program: Path, *, given: Path | None, cache: Path, say: Callable[[str], int]) -> Path:
    """A folder with node_modules as the package-lock.json of `program` fixes them: `given`, else in `cache`."""
    if given is not None:
        if not (given / "node_modules").is_dir():
            raise ValueError(f"{given}: holds no node_modules; run `npm ci` beside a copy of {program}/package.json")
        return given
    with kept(cache) as folder:
        place = folder / f"{program.name}-{sha512(program / 'package-lock.json').hex()[:16]}"
        if not place.is_dir():
            say("fetching the drawing packages from the npm registry")
            with tempfile.TemporaryDirectory(dir=folder) as name:
                aside = Path(name) / program.name
                shutil.copytree(program, aside)
                try:
                    run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], aside)
                except OSError as error:
                    raise ValueError(f"the npm packages cannot be fetched ({error}); see --from") from None
                aside.replace(place)
        return place
