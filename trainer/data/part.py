"""One set of a config: finds the index of a split, builds it where there is none, and checks that the shards are still
those that it names."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.data import build as building
from trainer.data import contents, touched
from trainer.data.config import DataConfig
from trainer.data.contents import Contents
from trainer.data.scan import LABEL_FIELD, Wanted
from trainer.data.store import Local, Store, is_folder, open_store
from trainer.data.table import Rows, Shard, read_table, table_bytes, table_name

UNFINISHED = ".unfinished"
"""Folder in DEST while `tandem data make` is at work there."""
SPLITS = ("train", "test")
"""What a run reads: they get one list of classes."""
AT_ONCE = 32 << 20  # bytes of tables in a folder that are verified before the first step; of more, as they are needed


@dataclass(frozen=True)
class Part:
    """A split of one set."""

    path: str
    """Of the set, as the config has it."""
    store: Store
    file: Callable[[str], Path]
    """index.json or a table on this machine: from beside the shards, or from the cache."""
    contents: Contents
    cached: bool = False
    """Whether the index lies in the cache."""

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
    store = open_store(config, path, split)
    cache = _cache(config, path, split, wanted)
    found = _find(store, cache, wanted, path)
    if found is None:
        with touched.locked(touched.cache_of(config, path)):
            found = _find(store, cache, wanted, path)  # another process may have built it
            if found is None:
                _build(config, path, split, wanted)
                found = _find(store, cache, wanted, path)
    assert found is not None
    _check(found, folder and folder / split, config)
    return found


def renew(config: DataConfig, path: str | Path) -> list[Part]:
    """Scans all splits of a set again, whatever index they have. Kept of an old one: the options and report of the
    maker, the names of classes where labels are numbers, and its fields where the config says auto."""
    if is_folder(path):
        _finished(Path(path).expanduser())
    with touched.locked(touched.cache_of(config, path)):
        splits = splits_of(config, path)
        old = [_old(open_store(config, path, split)) for split in splits]
        config = _as_before(config, old)
        wanted = Wanted.of(config)
        targets = [_target(config, path, split, wanted, one) for split, one in zip(splits, old, strict=True)]
        building.build(targets, wanted, names=max((one.classes for one in old), key=len))
    if is_folder(path):
        for split in splits:
            (Path(path).expanduser() / split / "index.npz").unlink(missing_ok=True)  # of format 1
    return [open_part(config, path, split) for split in splits]


def _old(store: Store) -> Contents:
    try:
        return contents.remains(store.file(contents.NAME))
    except FileNotFoundError:
        return contents.NOTHING


def _as_before(config: DataConfig, old: Sequence[Contents]) -> DataConfig:
    reading = next((one.reading for one in old if one.reading != contents.AS_MADE), contents.AS_MADE)
    return replace(
        config,
        image=reading["image"] if config.image == "auto" else config.image,
        label=reading["label"] if config.label == "auto" else config.label,
        ignore=config.ignore or tuple(reading["ignore"]),
    )


def _build(config: DataConfig, path: str | Path, split: str, wanted: Wanted) -> None:
    """The index of a split and of its sister, where they have none; classes are those of a split that has one."""
    classes: tuple[str, ...] | None = None
    missing = [split]
    for other in SPLITS:
        if other != split and _holds(open_store(config, path, other)):
            found = _find(open_store(config, path, other), _cache(config, path, other, wanted), wanted, path)
            if found is None:
                missing.append(other)
            else:
                classes = found.contents.classes
    building.build([_target(config, path, one, wanted, contents.NOTHING) for one in missing], wanted, classes=classes)


def _target(config: DataConfig, path: str | Path, split: str, wanted: Wanted, old: Contents) -> building.Split:
    """Beside the shards where that can be written, else in the cache."""
    store = open_store(config, path, split)
    beside = is_folder(path) and os.access(store.name, os.W_OK)
    target = Path(store.name) if beside else _cache(config, path, split, wanted)
    return building.Split(store=store, target=target, options=old.options, report=old.report)


def splits_of(config: DataConfig, path: str | Path) -> list[str]:
    """All that have shards or an index; of a URL, those of SPLITS. ValueError where there are none."""
    names = list(SPLITS)
    if is_folder(path):
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"{path}: does not exist; make it with `tandem data make`")
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = [name for name in names if _holds(open_store(config, path, name))]
    if not found:
        raise ValueError(f"{path}: holds no split (train/, test/) with .tar files; make it with `tandem data make`")
    return found


def _holds(store: Store) -> bool:
    """Whether the split has an index or shards."""
    with contextlib.closing(store):
        try:
            return bool(store.file(contents.NAME))
        except FileNotFoundError:
            return bool(_shards(store))


def _shards(store: Store) -> list[str]:
    try:
        return store.shards()
    except (FileNotFoundError, ValueError):  # a source that has no such split
        return []


def _cache(config: DataConfig, path: str | Path, split: str, wanted: Wanted) -> Path:
    """In the cache each choice of fields has an index of its own."""
    choice = hashlib.sha256(json.dumps(wanted.reading).encode()).hexdigest()[:8]
    return touched.cache_of(config, path) / choice / split


def _find(store: Store, cache: Path, wanted: Wanted, path: str | Path) -> Part | None:
    """The index beside the shards if it is of these fields, else the one in the cache; None: there is none."""
    again = f"run `tandem data index {path}`"
    refusal: ValueError | None = None
    try:
        found = contents.read(store.file(contents.NAME), again)
        _agree(found, wanted, store.name, path)
        return Part(str(path), store, store.file, found)
    except FileNotFoundError:
        pass
    except ValueError as error:
        refusal = error
    if (cache / contents.NAME).exists():
        found = contents.read(cache / contents.NAME, again)
        return Part(str(path), store, lambda name: cache / name, found, cached=True)
    if refusal:
        raise refusal
    return None


def _agree(found: Contents, wanted: Wanted, name: str, path: str | Path) -> None:
    """ValueError where the index is of other fields than the config asks for."""
    image = wanted.image.lower()
    if image not in ("auto", str(found.reading["image"]).lower()) and found.fields != (image,):
        raise ValueError(
            f"data.image: {wanted.image} is no field of all samples of {name} (found: {', '.join(found.fields)}); "
            f"run `tandem data index {path} --image {wanted.image}`, or set data.image to auto"
        )
    made = str(found.reading["label"])
    if wanted.label not in ("auto", made) and not (wanted.label == LABEL_FIELD and made == "auto"):
        raise ValueError(
            f"data.label: the labels of {name} were taken from {made}; "
            f"run `tandem data index {path} --label {wanted.label}`, or set data.label to {made}"
        )


def _exists(path: Path, split: str) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"data.path: {path} is a file; name the folder that holds train/ and test/")
    if not path.is_dir():
        raise ValueError(
            f"data.path: {path} does not exist; make it with `tandem data make fashion-mnist {path}` "
            f"or `tandem data make folder SRC {path}`"
        )
    _finished(path)
    folder = path / split
    if not folder.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        raise ValueError(
            f"data.path: {path} has no {split} split (found: {', '.join(found) or 'nothing'}); "
            f"make it with `tandem data make`"
        )
    if not (folder / contents.NAME).exists() and not Local(folder).shards():
        packed = sorted(entry.name for entry in folder.iterdir() if re.search(r"\.(tar\.\w+|tgz|zip)$", entry.name))
        advice = f"unpack to plain .tar what is compressed, such as {packed[0]}" if packed else ""
        raise ValueError(
            f"data.path: {folder} holds no index.json and no .tar files; "
            f"{advice or 'make them with `tandem data make`'}"
        )


def _finished(path: Path) -> None:
    if (path / UNFINISHED).exists():
        raise ValueError(f"data.path: {path} is unfinished; run the `tandem data make` command that began it again")


def _check(part: Part, folder: Path | None, config: DataConfig) -> None:
    """The shards against their index: missing, cut, changed, too many; and the tables, where that is quick. folder:
    None for those of a URL, which are compared when they are fetched."""
    shards = part.contents.shards
    again = f"run `tandem data index {part.path}`"
    if folder is not None:
        touched.verify(folder, part.file(contents.NAME).parent, shards, config, again)
    there = part.store.shards() if folder is not None or part.cached else []
    strange = sorted(set(there) - {shard.name for shard in shards})
    if strange:
        raise ValueError(
            f"{part.store.name}: holds shards that its index does not name ({len(strange)}, such as {strange[0]}); "
            f"{again}, or take them away"
        )
    if folder is not None and sum(table_bytes(shard.samples) for shard in shards) <= AT_ONCE:
        touched.refuse([fault for shard in shards if (fault := _damage(part, shard))])


def _damage(part: Part, shard: Shard) -> str | None:
    try:
        part.table(shard)
    except ValueError as error:
        return str(error)
    return None
