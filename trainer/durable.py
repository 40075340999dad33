"""Folders of files that are whole or known to be damaged: flushed writes, and a manifest with sizes and digests."""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

JSON: TypeAlias = "Mapping[str, JSON] | list[JSON] | str | int | float | bool | None"

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    images: int
    files: dict[str, tuple[int, str]]  # bytes, sha256


def manifest_text(*, images: int, files: Mapping[str, Mapping[str, object]]) -> str:
    """Its last key is the digest of the rest, so that a changed byte anywhere in it is seen."""
    content = {"format": FORMAT, "images": images, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1) + "\n"


def read_manifest(path: Path) -> Manifest:
    """ValueError if it is not what `manifest_text` wrote."""
    try:
        content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        whole = manifest_text(images=content["images"], files=content["files"])
        files = {name: (file["bytes"], file["sha256"]) for name, file in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("manifest.json is not readable") from error
    if content.get("format") != FORMAT:
        raise ValueError(f"manifest.json is of format {content.get('format')}, this version reads {FORMAT}")
    if json.loads(whole) != content or any(Path(name).name != name for name in files):
        raise ValueError("manifest.json was changed after it was written")
    return Manifest(images=content["images"], files=files)


def damage(path: Path, *, digests: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, in words, or None; `digests=False` compares sizes only.

    PermissionError is raised: a folder that we may not read is not a damaged one.
    """
    try:
        manifest = read_manifest(path)
        for name, (size, digest) in manifest.files.items():
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, its manifest says {size}"
            if digests and sha256(path / name) != digest:
                return f"the sha256 of {name} is not the one in its manifest"
    except PermissionError:
        raise
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def write_tensors(path: Path, group: Mapping[str, Tensor]) -> None:
    whole: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in group.items():
        here = tensor.detach().to("cpu").contiguous()
        if here.untyped_storage().data_ptr() in storages:  # tied weights: safetensors refuses shared memory
            here = here.clone()
        storages.add(here.untyped_storage().data_ptr())
        whole[name] = here
    try:
        safetensors.torch.save_file(whole, path)
    except SafetensorError as error:  # its I/O errors are no OSError: "... No space left on device (os error 28)"
        code = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number) if code else str(error), str(path)) from error
    flush(path)


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def exact(value: JSON, key: str) -> JSON:
    """`value` if JSON gives it back unchanged; ValueError names the key that it would change."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{key}: key {name!r} is not text; JSON would change it")
        return {name: exact(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [exact(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: {value} has no place in a checkpoint; the run is not healthy")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(f"{key}: {type(value).__name__} is not JSON")
