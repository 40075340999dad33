"""What a wrong config answers: one line with the file, the key and the nearest valid key."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import ConfigDict, ValidationError

SYNONYMS = {
    "learning_rate": "lr", "batch_size": "batch", "epochs": "images", "num_epochs": "images", "steps": "images",
    "max_steps": "images", "beta": "weight", "output_dir": "run", "dataset": "data", "model": "method",
    "accumulate": "micro_batch", "gradient_accumulation_steps": "micro_batch", "mixed_precision": "precision",
    "grad_clip": "clip", "random_seed": "seed", "kl_weight": "kl.weight", "disc_start": "adversarial_from",
}  # fmt: skip
"""What other trainers call a key: a spelling that no edit distance finds."""


def forbid_unknown(root: type) -> None:
    """Makes pydantic refuse unknown keys, and inf and nan, in every dataclass that `root` reaches."""
    for cls in _dataclasses(root):
        cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


def explain(error: ValidationError, root: type, *, source: str, overrides: dict[str, str]) -> str:
    """All of pydantic's complaints, each as `file: key: what is wrong; nearest key`, joined by semicolons."""
    details = _told_once([(detail, *_key_path(detail["loc"], root)) for detail in error.errors()])
    said = (_one(detail, path, root, source=source, overrides=overrides) for detail, path in details)
    return "; ".join(said)


def _told_once(details: list[tuple[Any, list[str], int]]) -> list[tuple[Any, list[str]]]:
    """Of the members of a plain union such as int | tuple, each of which refuses the value, those that came furthest;
    what they say of one key is one complaint. details: the complaint, its path, how much of the path is the union's (0:
    none)."""
    furthest: dict[tuple[str, ...], int] = {}
    for _, path, depth in details:
        if depth:
            union = tuple(path[:depth])
            furthest[union] = max(furthest.get(union, 0), len(path))
    told: dict[tuple[str, ...], tuple[Any, list[str]]] = {}
    for number, (detail, path, depth) in enumerate(details):
        if depth and len(path) < furthest[tuple(path[:depth])]:
            continue
        name = tuple(path) if depth else (str(number),)
        if name in told:
            said = f"{told[name][0]['msg']} or {_lower(detail['msg'])}"
            told[name] = (detail | {"msg": said}, path)
        else:
            told[name] = (detail, path)
    return list(told.values())


def _one(detail: Any, path: list[str], root: type, *, source: str, overrides: dict[str, str]) -> str:
    if detail["type"] == "value_error":  # a __post_init__, whose text begins with the field
        path.append(str(detail["ctx"]["error"]).partition(":")[0])
    key = ".".join(path)
    given = any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in overrides)
    where = "command line" if given else source
    kind = detail["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: unknown key {key}{_nearest(path, root)}"
    if kind in ("missing", "missing_argument"):
        return f"{where}: key {key} is missing"
    if kind == "union_tag_not_found":
        return f"{where}: {key}.kind is missing: one of {_kinds(path, root)}"
    if kind == "union_tag_invalid":
        tag, expected = detail["ctx"]["tag"], detail["ctx"]["expected_tags"]
        close = difflib.get_close_matches(tag, [name.strip("' ") for name in expected.split(",")], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"{where}: {key}.kind: no {tag!r} here, only {expected}{hint}"
    if kind == "value_error":
        return f"{where}: {'.'.join([*path[:-1], str(detail['ctx']['error'])])}"
    value = detail["input"]
    shown = "" if isinstance(value, (dict, list)) else f", not {value!r}"
    if kind == "string_type" and isinstance(value, dict):
        shown = "; in quotes, as a colon makes a mapping of it"
    if kind.startswith("int_") and isinstance(value, float) and value.is_integer():
        shown += f"; write {value:.0f}"  # 1e3 is no whole number in YAML
    return f"{where}: {key}: {_lower(detail['msg'])}{shown}"


def _lower(message: str) -> str:
    return message[0].lower() + message[1:]


def _key_path(loc: tuple[str | int, ...], root: type) -> tuple[list[str], int]:
    """pydantic's location without the tags of unions that it puts between a key and the next, and how many parts of it
    lead to a union of plain types, such as int | tuple (0: none)."""
    path: list[str] = []
    depth = 0
    members: tuple[Any, ...] = (root,)
    for part in loc:
        tags = {getattr(member, "kind", None) for member in members}
        if len(members) > 1 and part in tags:
            members = tuple(member for member in members if getattr(member, "kind", None) == part)
            continue
        if isinstance(part, str) and members and not any(dataclasses.is_dataclass(member) for member in members):
            depth = len(path)  # a tag such as "int"
            continue
        path.append(str(part))
        if isinstance(part, int):  # of a tuple
            members = tuple(member for whole in members for kind in typing.get_args(whole) for member in _members(kind))
            continue
        hints = [typing.get_type_hints(m).get(str(part)) for m in members if dataclasses.is_dataclass(m)]
        members = tuple(member for hint in hints if hint is not None for member in _members(hint))
    return path, depth


def _nearest(path: list[str], root: type) -> str:
    wrong = path[-1]
    every = list(_keys(root))
    if ".".join(path) in every:
        return f"; another kind of {'.'.join(path[:-1])} has it, this one does not"
    siblings = [key for key in every if key.split(".")[:-1] == path[:-1]]
    leaves = {key.split(".")[-1]: key for key in siblings}
    close = difflib.get_close_matches(wrong.replace("-", "_"), leaves, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {leaves[close[0]]}?"
    name = SYNONYMS.get(wrong.replace("-", "_"), wrong)
    elsewhere = [key for key in every if key == name or key.endswith(f".{name}")]
    if not elsewhere:
        every_leaf = {key.split(".")[-1]: key for key in reversed(every)}
        close = difflib.get_close_matches(name, every_leaf, n=1, cutoff=0.75)
        elsewhere = [every_leaf[close[0]]] if close else []
    if elsewhere:
        return f"; did you mean {min(elsewhere, key=lambda key: (key.count('.'), key))}?"
    return f"; valid here: {', '.join(leaves)}" if leaves else ""


def _kinds(path: list[str], root: type) -> str:
    """The kinds that a union at `path` may be."""
    members: tuple[Any, ...] = (root,)
    for part in path:
        hints = [typing.get_type_hints(member).get(part) for member in members if dataclasses.is_dataclass(member)]
        members = tuple(member for hint in hints if hint is not None for member in _members(hint))
    return ", ".join(dict.fromkeys(repr(member.kind) for member in members if hasattr(member, "kind")))


def _keys(root: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a config can have, all members of a union included."""
    for name, hint in typing.get_type_hints(root).items():
        yield f"{prefix}{name}"
        for member in _members(hint):
            if dataclasses.is_dataclass(member):
                assert isinstance(member, type)
                yield from _keys(member, f"{prefix}{name}.")


def _dataclasses(root: type) -> Iterator[Any]:
    yield root
    for hint in typing.get_type_hints(root).values():
        for member in _members(hint):
            if dataclasses.is_dataclass(member):
                assert isinstance(member, type)
                yield from _dataclasses(member)


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is typing.Annotated:
        return _members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in _members(part))
    return (hint,)


def strip_usage(text: str) -> str:
    """argparse's help without its usage paragraph, which lists every flag in one heap."""
    _, _, rest = text.partition("\n\n")
    return rest
