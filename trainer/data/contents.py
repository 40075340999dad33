"""index.json, format 2: what a split holds, beside its shards.

samples, classes, image (height, width, channels: smallest and largest; fields), reading (the image, label and ignore
of the scan), options and report of the maker, shards (name, samples, bytes, sha256, sha256 of the table).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer import durable
from trainer.data import table, tar
from trainer.data.config import LONGEST
from trainer.data.table import Shard, Span, Spans

FORMAT = 2
NAME = "index.json"
AS_MADE: Mapping[str, Any] = {"image": "auto", "label": "auto", "ignore": []}
_DIGEST = re.compile(r"[0-9a-f]{64}")
MOST = 1 << 60  # samples and bytes that an index may state


@dataclass(frozen=True, kw_only=True)
class Contents:
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    fields: tuple[str, ...]
    """Image fields; the tables hold numbers into it."""
    spans: Spans
    reading: Mapping[str, Any] = field(default_factory=lambda: AS_MADE)
    options: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


NOTHING = Contents(shards=(), classes=(), fields=(), spans=Spans())


def write(path: Path, contents: Contents, *, aside: Path | None = None) -> None:
    """Flushed under another name, `aside`, then renamed. A shard a line."""
    aside = aside or path.with_name(f".{path.name}.part")
    head = {
        "format": FORMAT,
        "samples": contents.samples,
        "classes": contents.classes,
        "image": {**contents.spans._asdict(), "fields": contents.fields},
        "reading": contents.reading,
        "options": contents.options,
        "report": contents.report,
    }
    shards = ",\n".join(f"  {json.dumps(shard._asdict())}" for shard in contents.shards)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "shards": [\n{shards}\n ]\n}}\n'
    durable.write_text(aside, text)
    aside.replace(path)
    durable.flush(path.parent)


def read(path: Path, again: str) -> Contents:
    """ValueError, ending with `again` (what to do): not readable, of another format, with a shard elsewhere."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise _Unfit(f"is of format {content['format']}, this version reads {FORMAT}")
        found = _contents(content)
        if found.samples != content["samples"]:
            raise _Unfit(f"states {content['samples']} samples, its shards hold {found.samples}")
    except _Unfit as error:
        raise ValueError(f"{path}: {error}; {again}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: is not readable ({type(error).__name__}: {error}); {again}") from None
    return found


def remains(path: Path) -> Contents:
    """Of an index of any format, damaged or not, what outlives a renewal: classes, reading, options, report."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = {}
    if not isinstance(content, dict):
        content = {}
    parts: tuple[tuple[str, Callable[[Any], Any], Any], ...] = (
        ("classes", _shown, []),
        ("reading", _reading, AS_MADE),
        ("options", dict, {}),
        ("report", dict, {}),
    )
    kept = {}
    for name, parse, default in parts:
        try:
            kept[name] = parse(content.get(name, default))
        except (KeyError, TypeError, ValueError):
            kept[name] = parse(default)
    return replace(NOTHING, **kept)


class _Unfit(Exception):
    """Readable, but not what it must be."""


def _contents(content: Mapping[str, Any]) -> Contents:
    shards = tuple(
        Shard(_text(s["name"]), _count(s["samples"], 1), _count(s["bytes"]), _digest(s["sha256"]), _digest(s["table"]))
        for s in content["shards"]
    )
    for shard in shards:
        if fault := table.name_fault(shard.name):
            raise _Unfit(fault)
        if shard.samples * tar.BLOCK > shard.bytes:
            raise _Unfit(f"states {shard.samples} samples in the {shard.bytes} bytes of {shard.name}")
    if len({shard.name for shard in shards}) < len(shards):
        raise _Unfit("names a shard twice")
    classes = _shown(content["classes"])
    if len(set(classes)) < len(classes):
        raise _Unfit("names a class twice")
    image = content["image"]
    spans = Spans(_span(image["height"]), _span(image["width"]), _span(image["channels"], 3))
    return Contents(
        shards=shards,
        classes=classes,
        fields=_shown(image["fields"]),
        spans=spans,
        reading=_reading(content["reading"]),
        options=dict(content["options"]),
        report=dict(content["report"]),
    )


def _reading(value: Any) -> dict[str, Any]:
    return {"image": _text(value["image"]), "label": _text(value["label"]), "ignore": list(_texts(value["ignore"]))}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r:.40} is no list")
    return tuple(map(_text, values))


def _shown(values: Any) -> tuple[str, ...]:
    """Names that stand in messages and on the board: whoever wrote them steers no terminal."""
    return tuple(map(tar.shown, _texts(values)))


def _digest(value: Any) -> str:
    """A sha256. It becomes part of a file's name in the cache."""
    if not _DIGEST.fullmatch(_text(value)):
        raise _Unfit(f"holds {tar.shown(value)!r:.40} for a sha256, which has 64 digits from 0 to f")
    return str(value)


def _count(value: Any, least: int = 0, most: int = MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise TypeError(f"{value!r:.40} is no number from {least} to {most}")
    return value


def _span(value: Any, most: int = LONGEST) -> Span | None:
    if value is None:
        return None
    low, high = value
    return Span(_count(low, 1, most), _count(high, low, most))
