"""YAML as a config means it: 1.2 scalars, no duplicate keys, and "a.b=c" on top. PyYAML alone reads 1e-4 as text, `on`
as true, and keeps the last of two equal keys."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

DEPTH = 32
"""Levels of keys and lists in a config; a loss in a method in a config is at 3."""
VALUES = 10_000
"""Values in a config, each alias counted as all that it stands for: ten lines can stand for gigabytes."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2, without duplicate keys, of bounded depth and size."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  none of 1.1's: they are listed below
    yaml_constructors: ClassVar[dict[Any, Any]] = {None: yaml.SafeLoader.construct_undefined}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._size: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._values
        self._depth += 1
        if self._depth > DEPTH:
            raise _fault(f"nested more than {DEPTH} deep", event)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if node not in self._size:
                raise _fault("a value that holds itself", event)
            self._values += self._size[node]
        else:
            self._values += 1
        if self._values > VALUES:
            problem = f"more than {VALUES} values, counting what each alias stands for"
            raise _fault(problem, event)
        self._depth -= 1
        if node is not None:
            self._size.setdefault(node, self._values - before)
        return node


_INT = r"[-+]?[0-9][0-9_]*"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_BOOL = r"true|True|TRUE|false|False|FALSE"
_NULL = r"~|null|Null|NULL|"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(rf"^(?:{_BOOL})$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(rf"^(?:{_NULL})$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^(?:{_INT})$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT})$"), list("-+0123456789."))


def _fault(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """at: the node or event whose place is told."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _text(loader: _Loader, node: yaml.Node, pattern: str | None = None) -> str:
    """The text of a scalar; an explicit tag, such as !!int, does not make one that does not match."""
    text = str(loader.construct_scalar(node))  # type: ignore[arg-type]  # raises for other nodes
    if pattern is not None and not re.fullmatch(pattern, text):
        raise _fault(f"{text[:40]!r} is no {node.tag}", node)
    return text


def _int(loader: _Loader, node: yaml.Node) -> int:
    text = _text(loader, node, _INT).replace("_", "")
    if len(text) > 40:  # from 4,300 digits on Python refuses, without a place
        raise _fault(f"a number of {len(text)} digits", node)
    return int(text)  # 010 is ten, as in YAML 1.2


def _float(loader: _Loader, node: yaml.Node) -> float:
    text = _text(loader, node, _FLOAT).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _bool(loader: _Loader, node: yaml.Node) -> bool:
    return _text(loader, node, _BOOL).lower() == "true"


def _null(loader: _Loader, node: yaml.Node) -> None:
    _text(loader, node, _NULL)


def _sequence(loader: _Loader, node: yaml.Node) -> list[Any]:
    return loader.construct_sequence(node, deep=True)  # type: ignore[arg-type]  # raises for other nodes


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _fault(f"this is no {node.tag}", node)
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise _fault(f"key {key!r} is not text", key_node)
        if key in found:
            raise _fault(f"key {key!r} stands twice", key_node)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


for _name, _construct in (
    ("str", _text), ("int", _int), ("float", _float), ("bool", _bool), ("null", _null), ("seq", _sequence),
    ("map", _mapping),
):  # fmt: skip
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _construct)


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

    def represent_str(self, data: str) -> yaml.ScalarNode:
        rare = any(sign in data for sign in "\x85\u2028\u2029")  # line breaks to PyYAML, which folds them into spaces
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if rare else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def merge(tree: dict[str, Any], overrides: list[str]) -> dict[str, str]:
    """Sets each "a.b=value" in `tree`, in place; returns {"a.b": the override as given}.

    ValueError where an override is no assignment, or goes through a key that holds a plain value."""
    given = {}
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*", key):
            raise ValueError(f"command line: {text!r} is no key=value, such as optim.lr=2e-4")
        *parents, leaf = key.split(".")
        if len(parents) >= DEPTH:
            raise ValueError(f"command line: {key[:40]}...: nested more than {DEPTH} deep")
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
