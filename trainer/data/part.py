"""One set of a config: finds the index of a split, builds it where there is none, and checks that the shards are still
those that it names."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data import build as building
from trainer.data import contents, touched
from trainer.data.config import DataConfig
from trainer.data.contents import Contents
from trainer.data.scan import LABEL_FIELD, Wanted
from trainer.data.store import Store, is_folder, open_store
from trainer.data.table import Rows, Shard, read_table, table_bytes, table_name

UNFINISHED = ".unfinished"
"""Folder in DEST while `tandem data make` is at work there."""
SPLITS = ("train", "test")
"""What a run reads: they get one list of classes."""
AT_ONCE = 32 << 20  # bytes of tables in a folder that are verified before the first step; of more, as they are needed


@dataclass(frozen=True)
class Part:
    """A split of one set."""

    store: Store
    file: Callable[[str], Path]
    """index.json or a table on this machine: from beside the shards, or from the cache."""
    contents: Contents

    def table(self, shard: Shard) -> Rows:
        """Verified; in the numbers of this set. ValueError, OSError."""
        name = table_name(shard.name)
        try:
            path = self.file(name)
        except FileNotFoundError:
            advice = "copy it again, or run `tandem data index` on the set"
            raise ValueError(f"{self.store.name}/{name}: is missing; {advice}") from None
        return read_table(path, shard, classes=len(self.contents.classes), fields=len(self.contents.fields))


def open_part(config: DataConfig, path: str | Path, split: str) -> Part:
    """Everything is checked that can be before the first step. ValueError names what is wrong and what to do."""
    wanted = Wanted.of(config)
    folder = Path(path).expanduser() if is_folder(path) else None
    if folder is not None:
        _exists(folder, split)
    found = _find(config, path, split, wanted)
    if found is None:
        with touched.locked(touched.cache_of(config, path)):
            found = _find(config, path, split, wanted)  # another process may have built it
            if found is None:
                _build(config, path, split, wanted)
                found = _find(config, path, split, wanted)
    assert found is not None
    if folder is not None:
        _check(found, folder / split, config, path)
    return found


def renew(config: DataConfig, path: str | Path) -> list[Part]:
    """Scans all splits of a set again, whatever index they have; the options and reports of makers are kept, and names
    of classes where labels are numbers."""
    wanted = Wanted.of(config)
    with touched.locked(touched.cache_of(config, path)):
        splits = _splits(config, path)
        if not splits:
            raise ValueError(f"{path}: holds no .tar files in train/ or test/; make them with `tandem data make`")
        old = [_old(config, path, split) for split in splits]
        names: list[tuple[str, ...]] = [tuple(map(str, one.get("classes", ()))) for one in old]
        building.build(
            [_target(config, path, split, wanted, one) for split, one in zip(splits, old, strict=True)],
            wanted,
            names=max(names, key=len),
        )
    if is_folder(path):
        for split in splits:
            (Path(path).expanduser() / split / "index.npz").unlink(missing_ok=True)  # of format 1
    return [open_part(config, path, split) for split in splits]


def _build(config: DataConfig, path: str | Path, split: str, wanted: Wanted) -> None:
    """The index of a split and of its sister, where they have none; classes are those of a split that has one."""
    classes: tuple[str, ...] | None = None
    missing = [split]
    for other in _splits(config, path, SPLITS):
        if other != split:
            found = _find(config, path, other, wanted)
            if found is None:
                missing.append(other)
            else:
                classes = found.contents.classes
    building.build([_target(config, path, one, wanted, {}) for one in missing], wanted, classes=classes)


def _target(config: DataConfig, path: str | Path, split: str, wanted: Wanted, old: Mapping[str, Any]) -> building.Split:
    """Beside the shards where that can be written, else in the cache."""
    store = open_store(config, path, split)
    beside = is_folder(path) and os.access(store.name, os.W_OK)
    target = Path(store.name) if beside else _cache(config, path, split, wanted)
    return building.Split(
        store=store, target=target, options=dict(old.get("options", {})), report=dict(old.get("report", {}))
    )


def _splits(config: DataConfig, path: str | Path, names: Sequence[str] | None = None) -> list[str]:
    """Those that have shards. names: to look for; None: all of a folder, SPLITS of a URL."""
    if not is_folder(path):
        return [name for name in names or SPLITS if _shards(open_store(config, path, name))]
    folder = Path(path).expanduser()
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return [name for name in found if (names is None or name in names) and any((folder / name).glob("*.tar"))]


def _shards(store: Store) -> list[str]:
    try:
        return store.shards()
    except FileNotFoundError:
        return []


def _cache(config: DataConfig, path: str | Path, split: str, wanted: Wanted) -> Path:
    """In the cache each choice of fields has an index of its own."""
    choice = hashlib.sha256(json.dumps(wanted.reading).encode()).hexdigest()[:8]
    return touched.cache_of(config, path) / choice / split


def _old(config: DataConfig, path: str | Path, split: str) -> dict[str, Any]:
    """What an index of any format says; {} where there is none or it cannot be read."""
    try:
        found = json.loads(open_store(config, path, split).file(contents.NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _find(config: DataConfig, path: str | Path, split: str, wanted: Wanted) -> Part | None:
    """The index beside the shards if it is of these fields, else the one in the cache; None: there is none."""
    store = open_store(config, path, split)
    again = f"run `tandem data index {path}`"
    refusal: ValueError | None = None
    try:
        found = contents.read(store.file(contents.NAME), again)
        _agree(found, wanted, store.name, path)
        return Part(store, store.file, found)
    except FileNotFoundError:
        pass
    except ValueError as error:
        refusal = error
    cache = _cache(config, path, split, wanted)
    if (cache / contents.NAME).exists():
        return Part(store, lambda name: cache / name, contents.read(cache / contents.NAME, again))
    if refusal:
        raise refusal
    return None


def _agree(found: Contents, wanted: Wanted, name: str, path: str | Path) -> None:
    """ValueError where the index is of other fields than the config asks for."""
    if wanted.image != "auto" and wanted.image.lower() not in (*found.fields, found.reading["image"]):
        raise ValueError(
            f"data.image: {wanted.image} is no field of {name} (found: {', '.join(found.fields)}); "
            f"run `tandem data index {path} --image {wanted.image}`, or set data.image to auto"
        )
    made = str(found.reading["label"])
    if wanted.label not in ("auto", made) and not (wanted.label == LABEL_FIELD and made == "auto"):
        raise ValueError(
            f"data.label: the labels of {name} were taken from {made}; "
            f"run `tandem data index {path} --label {wanted.label}`, or set data.label to {made}"
        )


def _exists(path: Path, split: str) -> None:
    if not path.is_dir():
        raise ValueError(
            f"data.path: {path} does not exist; make it with `tandem data make fashion-mnist {path}` "
            f"or `tandem data make folder SRC {path}`"
        )
    if (path / UNFINISHED).exists():
        raise ValueError(f"data.path: {path} is unfinished; run the `tandem data make` command that began it again")
    folder = path / split
    if not folder.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        raise ValueError(
            f"data.path: {path} has no {split} split (found: {', '.join(found) or 'nothing'}); "
            f"make it with `tandem data make`"
        )
    if not (folder / contents.NAME).exists() and not any(folder.glob("*.tar")):
        raise ValueError(
            f"data.path: {folder} holds no index.json and no .tar files; make them with `tandem data make`"
        )


def _check(part: Part, folder: Path, config: DataConfig, path: str | Path) -> None:
    """The shards of a folder against their index: missing, cut, changed, too many; and the tables, where that is
    quick."""
    shards = part.contents.shards
    again = f"run `tandem data index {path}`"
    touched.verify(folder, part.file(contents.NAME).parent, shards, config, again)
    strange = sorted({file.name for file in folder.glob("*.tar")} - {shard.name for shard in shards})
    if strange:
        raise ValueError(
            f"{folder}: holds {len(strange)} shards that its index does not name, such as {strange[0]}; "
            f"{again}, or take them away"
        )
    if sum(table_bytes(shard.samples) for shard in shards) <= AT_ONCE:
        for shard in shards:
            part.table(shard)
