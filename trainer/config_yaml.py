"""YAML as a config means it: 1.2 scalars, no duplicate keys, and "a.b=c" on top. PyYAML alone reads 1e-4 as text, `on`
as true, and keeps the last of two equal keys."""

import json
import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2 and without duplicate keys."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  none of 1.1's: they are listed below


_INT = r"[-+]?[0-9][0-9_]*"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_BOOL = r"true|True|TRUE|false|False|FALSE"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(rf"^(?:{_BOOL})$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^(?:{_INT})$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT})$"), list("-+0123456789."))


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(node.value).replace("_", ""))  # 010 is ten, as in YAML 1.2


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a file. ValueError with file, line and column where it does not parse."""
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from None
    return loads(text, source=str(path))


def loads(text: str, *, source: str) -> dict[str, Any]:
    """The mapping in `text`; `source` is named in errors."""
    found = _parse(text, source)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{source}: a config is a mapping of keys to values, not {type(found).__name__}")
    return found


def write(tree: dict[str, Any]) -> str:
    """YAML that `read` takes back, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for something else, and only that."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def merge(tree: dict[str, Any], overrides: list[str]) -> dict[str, str]:
    """Sets each "a.b=value" in `tree`, in place; returns {"a.b": the override as given}.

    ValueError where an override is no assignment, or goes through a key that holds a plain value."""
    given = {}
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*", key):
            raise ValueError(f"command line: {text!r} is no key=value, such as optim.lr=2e-4")
        *parents, leaf = key.split(".")
        node = tree
        for i, name in enumerate(parents):
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"command line: {key}: {'.'.join(parents[: i + 1])} holds a value, not keys")
        node[leaf] = _parse(value, f"command line: {key}")
        given[key] = text
    return given


def to_json(tree: dict[str, Any]) -> str:
    return json.dumps(tree)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise ValueError(f"{source}{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None
