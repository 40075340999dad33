"""TensorBoard's event files on disk: names in order, and cutting what a resumed run will write again.

A file is a chain of records (TFRecord): uint64 length, uint32 masked CRC of the length, the event, uint32 masked CRC of
the event. Events that stay are copied byte by byte; only their length's CRC is checked: CRC in Python is slow.
"""

import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.custom_scalar.metadata import PLUGIN_NAME as LAYOUT_PLUGIN
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME as HPARAMS_PLUGIN
from tensorboard.summary.writer.record_writer import RecordWriter

PREFIX = "events.out.tfevents."  # TensorBoard reads every file whose name holds "tfevents"
ASIDE = "events.superseded."
WRITTEN_ANEW = {HPARAMS_PLUGIN, LAYOUT_PLUGIN}  # readers take the first that they find, so a new start replaces them
HEADER = struct.Struct("<QI")


def event_files(folder: Path) -> list[Path]:
    """In the order of writing, which is the order of their names."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(PREFIX) and path.is_file())


def new_name(folder: Path) -> str:
    """A name that sorts behind all event files of the folder, even if this machine's clock is behind another's."""
    stamps = [re.match(r"\d+(\.\d+)?", path.name.removeprefix(PREFIX)) for path in event_files(folder)]
    latest = max((float(stamp[0]) for stamp in stamps if stamp), default=0.0)
    return f"{PREFIX}{max(time.time(), latest + 1e-3):017.6f}.{socket.gethostname()}.{os.getpid()}"


def set_aside(folder: Path, *, log: Callable[[str], None]) -> None:
    """Renames all event files so that TensorBoard does not read them; nothing is deleted."""
    for path in event_files(folder):
        target = path.with_name(path.name.replace(PREFIX, ASIDE, 1))
        path.rename(target)
        log(f"board {path} is of a start that left no checkpoint: kept as {target.name}")


def cut(folder: Path, *, images: int, log: Callable[[str], None]) -> dict[str, int]:
    """Removes every record beyond `images`, and any that repeats a step of its tag, from the event files of `folder`.

    Returns the last step of each tag. A file is rewritten aside and renamed, and only if something in it goes; a kill
    in between leaves some files cut and the others as they were, and the next resume does the rest. Half a record at
    the end of a file, left by a kill, goes too, and so does all that follows a record that cannot be read.
    """
    last: dict[str, int] = {}
    for path in event_files(folder):
        temporary = folder / ".cut"
        dropped = 0
        with path.open("rb") as source, temporary.open("wb") as target:
            for event, record in _records(source):
                kept = _kept(event, images=images, last=last)
                if kept is event:
                    target.write(record)
                    continue
                dropped += 1
                if kept is not None:
                    RecordWriter(target).write(kept.SerializeToString())
            target.flush()
            os.fsync(target.fileno())
            unread = dropped == 0 and target.tell() < path.stat().st_size
        if dropped or unread:
            temporary.replace(path)
            log(f"board {path.name}: {dropped or 'unreadable'} records that will be written again removed")
        else:
            temporary.unlink()
    return last


def _kept(event: Any, *, images: int, last: dict[str, int]) -> Any | None:
    """The event itself if all of it stays, a smaller one if some of its values do, None if nothing does."""
    if event.step > images:
        return None
    if event.HasField("session_log") and last:  # a restart makes readers drop what precedes; nothing is left to drop
        return None
    if not event.HasField("summary"):
        return event
    values = []
    for value in event.summary.value:
        fresh = event.step > last.get(value.tag, -1)
        if fresh and value.metadata.plugin_data.plugin_name not in WRITTEN_ANEW:
            last[value.tag] = event.step
            values.append(value)
    if len(values) == len(event.summary.value):
        return event
    if not values:
        return None
    rest = Event(wall_time=event.wall_time, step=event.step)
    rest.summary.value.extend(values)
    return rest


def _records(source: BinaryIO) -> Iterator[tuple[Any, bytes]]:
    """(event, the whole record's bytes) up to the end of the file or the first record that is not whole."""
    while len(header := source.read(HEADER.size)) == HEADER.size:
        length, crc = HEADER.unpack(header)
        if masked_crc32c(header[:8]) != crc:
            return
        body = source.read(length + 4)
        if len(body) < length + 4:
            return
        try:
            event = Event.FromString(body[:length])
        except DecodeError:
            return
        yield event, header + body
