"""What must fit when a run goes on from a checkpoint: the configuration and the names and shapes of tensors."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePath
from typing import Any

from torch import Tensor

ABSENT = "(absent)"
SHOWN = 4  # names listed in an error before "and N more"


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every field that differs between two nested configurations.

    Values are compared as YAML would hold them: a tuple is its list, a path its text; 1 and 1.0 are equal, 1 and true
    are not. Lists are compared whole. A field that one side lacks has the value "(absent)" there.
    """
    before, after = _flat(old), _flat(new)
    keys = [*before, *(key for key in after if key not in before)]
    pairs = ((key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys)
    return [(key, a, b) for key, a, b in pairs if a != b or _has_bool(a) != _has_bool(b)]


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """One line `key: old -> new` for every change under a dotted prefix in `allowed` ("optim" allows "optim.lr").

    ValueError names every other change, because the run would not be the one that the checkpoint belongs to.
    """
    lines: list[str] = []
    refused: list[str] = []
    for key, before, after in changed(old, new):
        fine = any(key == prefix or key.startswith(f"{prefix}.") for prefix in allowed)
        (lines if fine else refused).append(f"{key}: {before} -> {after}")
    if refused:
        raise ValueError(
            f"resume: the configuration differs from the checkpoint's in what may not change: {'; '.join(refused)}; "
            "restore these values, or start a new run with checkpoint.init_from"
        )
    return lines


def match(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    """ValueError unless both have the same names with the same shapes; `what` names the checkpoint and the network."""
    problems = [
        *_list("missing", [name for name in expected if name not in found]),
        *_list("unexpected", [name for name in found if name not in expected]),
        *_list(
            "of another shape",
            [
                f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in found and found[name].shape != tensor.shape
            ],
        ),
    ]
    if problems:
        raise ValueError(f"{what} is a checkpoint of another model: {'; '.join(problems)}")


def _list(title: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{title}: {', '.join(names[:SHOWN])}{more}"] if names else []


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value]


def _has_bool(value: Any) -> Any:
    """The shape of `value` with True where a bool stands, because Python holds 1 == True."""
    return [_has_bool(item) for item in value] if isinstance(value, list) else isinstance(value, bool)
