"""Checkpoints: named, whole tensors and JSON, visible under their final name only when complete and flushed.

    <run>/checkpoints/000000064000/          64,000 images seen
        generator.safetensors                one file a name: "generator", "generator.ema", "generator.optimizer"
        state.json                           exact: floats round-trip, NaN is refused
        config.yaml                          the resolved configuration of the run
        manifest.json                        written last: size and sha256 of every file
        KEEP                                 there if retention must leave it alone (`touch` it by hand)

A checkpoint is written into a hidden folder beside its final place, every file is flushed to the disk, the folder is
renamed, and the parent is flushed: a kill at any moment leaves the older checkpoints and at most a hidden folder,
which `choose` removes. A folder that is not used any more but may matter is renamed, never deleted: `.damaged` (its
digests do not match) or `.superseded` (the run was resumed from an older one by name).

One process writes (rank 0, inside a RunLock); every rank may load. `choose` and `retain` rename: rank 0 too.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
from torch import Tensor

from trainer.durable import (
    JSON,
    damage,
    entries,
    exact,
    flush,
    manifest_text,
    read_manifest,
    sha256,
    write_tensors,
    write_text,
)

FOLDER = "checkpoints"
FINAL = re.compile(r"\d{12,}")  # images seen
ASIDE = re.compile(r"\d{12,}\.(damaged|superseded)(\.\d+)?")
TEMPORARY = (".saving-", ".removing-")
TENSORS = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns; all tensors on the CPU."""

    path: Path
    images: int
    """Images seen."""
    tensors: dict[str, dict[str, Tensor]]
    """For each name ("generator.ema") its tensors by the names of the bare module."""
    state: dict[str, JSON]
    config_text: str
    """The resolved configuration, YAML."""


def save(
    folder: Path,
    *,
    images: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    config_text: str,
) -> Path:
    """Writes `folder`/checkpoints/<images>/ and returns it; one that is already there and whole is left as it is.

    `state` holds str, bool, int, finite float, None, lists and dicts of str. ValueError names the key of anything else.
    OSError names the folder and leaves neither a temporary folder nor a change to the older checkpoints.
    """
    encoded = json.dumps(exact(state, "state"), allow_nan=False, indent=1) + "\n"
    for name, group in tensors.items():
        assert TENSORS.fullmatch(name), f"{name!r} is no name for a file of tensors"
        wrapped = [key for key in group if key.startswith("module.") or "_orig_mod" in key.split(".")]
        assert not wrapped, f"{name}: {wrapped[0]} is the name of a wrapper, not of the bare module"
    final = folder / FOLDER / f"{images:012d}"
    temporary = final.with_name(f"{TEMPORARY[0]}{final.name}-{os.getpid()}")
    try:
        if final.exists():
            if damage(final) is None:
                return final
            _aside(final, "damaged")
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            write_tensors(temporary / f"{name}.safetensors", group)
        write_text(temporary / "state.json", encoded)
        write_text(temporary / "config.yaml", config_text)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in entries(temporary)}
        write_text(temporary / "manifest.json", manifest_text(images=images, files=files))
        flush(temporary)
        temporary.rename(final)
        flush(final.parent)
        flush(folder)  # `checkpoints` itself may be new
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror or str(error)
        advice = f"checkpoint not saved, the older ones are intact ({reason}); free some space or choose another `run`"
        raise OSError(error.errno or errno.EIO, advice, str(final)) from error
    except BaseException:  # Ctrl-C in the middle
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(path: Path, *, only: Collection[str] | None = None, verify: bool = True) -> Checkpoint:
    """Reads a checkpoint folder onto the CPU; `only` limits the tensors to some names ("generator.ema" for sampling).

    `verify=False` skips the digests, for ranks that load what `choose` has just verified.
    ValueError if the folder is damaged or lacks one of `only`.
    """
    problem = damage(path) if verify else None
    if problem is not None:
        raise ValueError(f"{path}: {problem}; choose another checkpoint")
    manifest = read_manifest(path)
    stored = {name.removesuffix(".safetensors") for name in manifest.files if name.endswith(".safetensors")}
    missing = sorted(set(only or ()) - stored)
    if missing:
        raise ValueError(f"{path}: holds no {', '.join(missing)}; it has {', '.join(sorted(stored))}")
    names = sorted(stored if only is None else set(only))
    tensors = {name: safetensors.torch.load_file(path / f"{name}.safetensors", device="cpu") for name in names}
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    config_text = (path / "config.yaml").read_text(encoding="utf-8")
    return Checkpoint(path=path, images=manifest.images, tensors=tensors, state=state, config_text=config_text)


def choose(
    folder: Path,
    resume: Literal["auto", "never", "must"] | str | Path,
    *,
    log: Callable[[str], None] = print,
) -> Path | None:
    """The checkpoint to go on from, its digests verified, or None: start at 0 images. Rank 0 only, inside the RunLock.

    auto   the newest whole one of `folder`; None if there are none
    must   the same, but ValueError if there are none
    never  None; ValueError if there are any, so that nothing is mixed or overwritten
    PATH   this checkpoint folder, or the newest whole one of this run folder; ValueError if it is damaged or absent.
           Newer ones in `folder` are renamed `.superseded`.

    A damaged one is named through `log` and renamed `.damaged`, and the next older one is used. ValueError if
    checkpoints exist and none is whole: a run never begins again at 0 by itself.
    """
    for path in entries(folder / FOLDER):
        if path.name.startswith(TEMPORARY):  # what a kill left; we hold the lock, so nobody is writing it
            shutil.rmtree(path)
    own, aside = _found(folder)
    if resume == "never":
        if own or aside:
            raise ValueError(
                f"resume: never, but {folder / FOLDER} holds {len(own) + len(aside)} checkpoints; "
                "use resume: auto to go on, or another `run` folder to start afresh"
            )
        return None
    if resume not in ("auto", "must"):
        return _named(folder, Path(resume), own=own, aside=aside, log=log)
    chosen = newest(folder, rename=True, log=log)
    if chosen is None and resume == "must":
        raise ValueError(f"resume: must, but {folder / FOLDER} holds no checkpoint; use resume: auto, or correct `run`")
    return chosen


def newest(folder: Path, *, rename: bool = False, log: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint of a run folder, damaged ones above it named through `log`; None if it has none.

    `rename` keeps the damaged ones aside: for the owner of the folder. ValueError if there are some and none is whole.
    """
    own, aside = _found(folder)
    problems: list[tuple[Path, str]] = []
    for path in own:
        problem = damage(path)
        if problem is not None:
            problems.append((path, problem))
            continue
        for bad, what in problems:
            kept = f"kept as {_aside(bad, 'damaged').name}" if rename else "left alone"
            log(f"checkpoint {bad} is damaged ({what}): {kept}, using the older {path}")
        return path
    if own or aside:
        told = "; ".join(f"{bad.name}: {what}" for bad, what in problems) or ", ".join(path.name for path in aside)
        raise ValueError(
            f"{folder / FOLDER}: checkpoints exist but none can be loaded ({told}); "
            "repair one, or choose another `run` folder to start afresh"
        )
    return None


def retain(folder: Path, *, keep_last: int, best: str | None = None, higher_is_better: bool = False) -> list[Path]:
    """Removes old checkpoints and returns their paths; call it after `save` has returned. Rank 0 only.

    Kept: the last `keep_last` complete ones; the one with the best number under the dotted key `best` of its state (the
    lowest, or the highest; of equal ones the newer); those that are marked; everything set aside.
    """
    assert keep_last >= 1, "the newest checkpoint is always kept"
    own, _ = _found(folder)
    whole = [path for path in own if damage(path, digests=False) is None]
    kept = set(whole[:keep_last]) | {path for path in whole if (path / "KEEP").exists()}
    scores = {path: score for path in whole if best is not None and (score := _number(path, best)) is not None}
    if scores:
        kept.add((max if higher_is_better else min)(scores, key=lambda path: scores[path]))
    removed = [path for path in whole if path not in kept]
    for path in removed:
        doomed = path.with_name(f"{TEMPORARY[1]}{path.name}-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    return removed


def size_bytes(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes on disk of a checkpoint of these tensors, a little above the truth: data, headers, 1 MB for the rest."""
    return 1_000_000 + sum(t.numel() * t.element_size() + 256 for group in tensors.values() for t in group.values())


def room_for(folder: Path, size_bytes: int, *, keep_last: int, keep_best: bool) -> None:
    """ValueError as `needs` has it. OSError, naming the folder, if it cannot be written."""
    probe = folder / FOLDER / f"{TEMPORARY[0]}probe-{os.getpid()}"
    try:
        probe.mkdir(parents=True)
        probe.rmdir()
    except OSError as error:
        advice = f"the run's folder cannot be written ({error.strerror}); choose another `run`"
        raise OSError(error.errno or errno.EIO, advice, str(probe.parent)) from error
    needs(folder, size_bytes, keep_last=keep_last, keep_best=keep_best)


def needs(folder: Path, size_bytes: int, *, keep_last: int, keep_best: bool) -> tuple[int, int]:
    """(bytes that the run's checkpoints take at most, bytes that there are for them); changes nothing on disk.

    ValueError, with both numbers, where there are too few. An old one is removed only after the new one is complete,
    hence one more than are kept. What the run's own hold, but for the marked ones, counts as room."""
    place = folder / FOLDER
    ours = [path for path in entries(place) if not ASIDE.fullmatch(path.name) and not (path / "KEEP").exists()]
    there = next(path for path in (place, *place.absolute().parents) if path.is_dir())
    room = shutil.disk_usage(there).free + sum(file.stat().st_size for path in ours for file in entries(path))
    needed = (count := keep_last + keep_best + 1) * size_bytes
    if room < needed:
        raise ValueError(
            f"checkpoint: {place} has room for {room / 1e6:.1f} MB, but {count} checkpoints (keep_last {keep_last}"
            f"{' + the best' * keep_best} + the one being written) of {size_bytes / 1e6:.1f} MB need "
            f"{needed / 1e6:.1f} MB; lower keep_last or choose another `run`"
        )
    return needed, room


def _named(folder: Path, path: Path, *, own: list[Path], aside: list[Path], log: Callable[[str], None]) -> Path:
    """What `resume: PATH` means; see `choose`."""
    inside = path.resolve().parent == (folder / FOLDER).resolve()
    if (own or aside) and not inside and path.resolve() != folder.resolve():
        raise ValueError(
            f"resume: {path} belongs to another run, but {folder / FOLDER} already holds checkpoints; "
            "use resume: auto to go on with these, or another `run` folder"
        )
    if (path / "manifest.json").exists():
        problem = damage(path)
        if problem is not None:
            raise ValueError(f"resume: {path} is damaged ({problem}); choose another checkpoint")
        chosen = path
    else:
        found = newest(path, rename=path.resolve() == folder.resolve(), log=log)
        if found is None:
            raise ValueError(f"resume: {path} is neither a checkpoint nor a run folder with checkpoints")
        chosen = found
    images = read_manifest(chosen).images
    for newer in own:
        if int(newer.name) > images and newer.exists():
            log(f"checkpoint {newer} is newer than {chosen}: kept as {_aside(newer, 'superseded').name}")
    return chosen


def _found(folder: Path) -> tuple[list[Path], list[Path]]:
    """The checkpoints of a run folder, newest (most images) first, and those that were set aside."""
    paths = entries(folder / FOLDER)
    own = sorted((path for path in paths if FINAL.fullmatch(path.name)), key=lambda path: int(path.name), reverse=True)
    return own, [path for path in paths if ASIDE.fullmatch(path.name)]


def _aside(path: Path, why: Literal["damaged", "superseded"]) -> Path:
    target = path.with_name(f"{path.name}.{why}")
    count = 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}.{why}.{count}")
    path.rename(target)
    flush(path.parent)
    return target


def _number(path: Path, key: str) -> float | None:
    """The number under a dotted key of a checkpoint's state."""
    value = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
