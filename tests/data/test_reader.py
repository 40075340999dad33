"""Reading ahead: buffers that are used again, threads that stop, errors that arrive where they belong."""

import errno
import gc
import io
import os
import threading
import time
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.server import until
from trainer.data import ShardsConfig, Stream, fill, opened, reader
from trainer.data.buffers import Buffers
from trainer.data.convert import Undecodable
from trainer.data.store import Local


def png(number: int, shape: tuple[int, int] = (8, 8)) -> bytes:
    image = np.full(shape, number % 251, np.uint8)
    image.reshape(-1)[:2] = divmod(number, 256)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path: Path, tar_of: Callable[..., Path]) -> Path:
    """Four shards of 10 PNG images that spell their numbers."""
    for shard in range(4):
        members = [(f"{number:03d}.png", png(number)) for number in range(10 * shard, 10 * shard + 10)]
        tar_of(tmp_path / "train" / f"{shard}.tar", members)
    return tmp_path


def stream(path: Path, *, batch: int = 4, modality: Any = None, **options: Any) -> Stream:
    settings: dict[str, Any] = {"size": 8, "channels": 1, "readers": 2, "prefetch": 3, "cache_mb": 0} | options
    config = ShardsConfig(path=path, **settings)
    return Stream(config, split="train", batch=batch, rank=0, world=1, seed=0, modality=modality)


class Numbers:
    """A modality for tests: a row is the number that a file's pixels spell; `meet` sees each number first."""

    plain_kinds = ()

    def __init__(self, meet: Callable[[int], None] = lambda number: None) -> None:
        self.shape, self.dtype, self.meet = (1,), np.dtype(np.int64), meet

    def decode(self, data: bytes, kind: str, row: np.ndarray) -> None:
        high, low = np.asarray(Image.open(io.BytesIO(data))).reshape(-1)[:2].tolist()
        self.meet(256 * high + low)
        row[...] = 256 * high + low

    def plain(self, data: bytes, kind: str) -> int | None:
        return None


# ------------------------------------------------------------------ buffers
HOLDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "the tensor": lambda x: x,
    "a view": lambda x: x[1:2],
    "its storage": lambda x: x.untyped_storage(),
    "an array": lambda x: x.numpy(),
    "a slice of an array": lambda x: x.numpy()[1, 0],
    "a detached view of another shape": lambda x: x.view(-1).detach()[3:],
}


@pytest.mark.parametrize("cache", [0, 64])
@pytest.mark.parametrize("kind", HOLDS)
def test_pixels_never_change_while_somebody_holds_them(
    shards: Path, number_of: Callable[[object], list[int]], kind: str, cache: int
) -> None:
    one = stream(shards, cache_mb=cache)
    held, copies = [], []
    for raw in islice(one.batches(0), 30):
        assert number_of(raw.data) == raw.index.tolist()
        held.append(HOLDS[kind](raw.data))
        copies.append(bytes(np.asarray(held[-1])) if kind != "its storage" else bytes(held[-1]))
    del raw
    gc.collect()
    list(islice(one.batches(0), 10))
    for mine, copy in zip(held, copies, strict=True):
        assert (bytes(mine) if kind == "its storage" else bytes(np.asarray(mine))) == copy
    one.close()


@pytest.mark.parametrize("cache", [0, 64])
def test_buffers_are_used_again_when_they_are_let_go(shards: Path, cache: int) -> None:
    one = stream(shards, cache_mb=cache, prefetch=2)
    places = {raw.data.data_ptr() for raw in islice(one.batches(0), 100)}
    assert len(places) <= 2 + reader.SPARE
    one.close()


def test_free_buffers_are_few_and_of_the_size_that_is_asked_for() -> None:
    buffers = Buffers(kept=2, pinned=False)
    held = [buffers.take((3, 5), np.uint8) for _ in range(6)]
    places = [one.data_ptr() for one in held]
    held.clear()
    again = [buffers.take((15,), np.uint8) for _ in range(3)]
    assert len({one.data_ptr() for one in again} & set(places)) >= 2
    other = buffers.take((2, 3), np.float32)
    assert (other.shape, other.dtype) == ((2, 3), torch.float32)
    assert other.data_ptr() not in {one.data_ptr() for one in again}


# ------------------------------------------------------------------ threads
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_any_number_of_readers_gives_one_stream_with_the_same_stand_ins(
    tmp_path: Path, tar_of: Callable[..., Path], readers: int
) -> None:
    hurt = {3, 4, 5, 17, 38, 39}
    for shard in range(4):
        numbers = range(10 * shard, 10 * shard + 10)
        members = [(f"{n:03d}.png", png(n)[: 20 if n in hurt else None]) for n in numbers]
        tar_of(tmp_path / "train" / f"{shard}.tar", members)
    stands = {3: 6, 4: 6, 5: 6, 17: 18, 38: 0, 39: 0}
    one = stream(tmp_path, readers=readers, prefetch=6, max_bad_fraction=0.5)
    order = one.order.take(0, 200).tolist()
    found = [number for raw in islice(one.batches(0), 50) for number in raw.index.tolist()]
    assert found == [stands.get(number, number) for number in order]
    assert one.bad == sum(number in stands for number in order)
    assert {bad.sample for bad in one.news()} == hurt
    one.close()


def settled(count: Callable[[], int]) -> int:
    """The count once it stands still for a while."""
    before = -1
    while (now := count()) != before:
        before = now
        time.sleep(0.1)
    return now


def test_no_more_than_the_asked_batches_are_read_ahead(shards: Path) -> None:
    met: list[int] = []
    one = stream(shards, prefetch=3, modality=Numbers(met.append))
    batches = one.batches(0)
    for taken in range(1, 4):
        next(batches)
        assert settled(lambda: len(met)) == (taken + 3) * 4
    one.close()


def test_closing_stops_readers_in_the_middle_of_a_batch(shards: Path) -> None:
    met: list[int] = []
    second = threading.Event()

    def meet(number: int) -> None:
        met.append(number)
        if len(met) > 40:
            second.set()
            time.sleep(0.02)

    one = stream(shards, batch=40, readers=1, prefetch=1, modality=Numbers(meet))
    before = threading.active_count()
    batches = one.batches(0)
    next(batches)
    assert second.wait(20)
    one.close()
    assert len(met) < 80
    assert threading.active_count() <= before
    assert next(batches, None) is None


def test_closing_does_not_wait_for_a_reader_that_is_stuck(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PATIENCE", 0.2)
    release, stuck = threading.Event(), threading.Event()

    def meet(number: int) -> None:
        if len(met) >= 8:  # the first two batches go through
            stuck.set()
            release.wait(60)
        met.append(number)

    met: list[int] = []
    one = stream(shards, readers=1, prefetch=2, modality=Numbers(meet))
    batches = one.batches(0)
    next(batches)
    assert stuck.wait(20)
    one.close()
    assert not release.is_set()
    release.set()


def test_closing_releases_a_reader_that_waits_for_a_shard(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PATIENCE", 60.0)  # a reader that is not released fails the test by its time limit
    released, waiting = threading.Event(), threading.Event()
    opening, closing = Local.open, Local.close
    known: set[str] = set()

    def open_slowly(self: Local, shard: Any) -> Any:
        known.add(shard.name)
        if len(known) > 1:
            waiting.set()
            assert released.wait(50)
            raise ValueError("closed meanwhile")
        return opening(self, shard)

    def close(self: Local) -> None:
        released.set()
        closing(self)

    one = stream(shards, batch=5, window=1, readers=1, prefetch=3)
    monkeypatch.setattr(Local, "open", open_slowly)
    monkeypatch.setattr(Local, "close", close)
    batches = one.batches(0)
    next(batches)
    assert waiting.wait(20)
    one.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-")]


def test_a_long_wait_is_told_once_with_what_is_waited_for_and_ends_where_the_run_is_to_end(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reader, "LOOK", 0.01)
    monkeypatch.setattr(reader, "SILENCE", 0.1)
    asked, waiting, release = [0], threading.Event(), threading.Event()
    opening = Local.open

    def open_slowly(self: Local, shard: Any) -> Any:
        waiting.set()
        assert release.wait(50)
        return opening(self, shard)

    def stop() -> bool:
        asked[0] += waiting.is_set()
        return asked[0] > 60

    one = stream(shards, readers=1, window=1)
    monkeypatch.setattr(Local, "open", open_slowly)
    monkeypatch.setattr(Local, "progress", lambda self, shard: "3 of 9 bytes")
    monkeypatch.setattr(reader, "PATIENCE", 0.1)  # the reader is stuck
    with pytest.raises(reader.Interrupted):
        next(one.batches(0, stop=stop))
    release.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("read-")])
    name = one.index.shards[int(one.order.shards(0)[0])].name
    assert capsys.readouterr().err == f"tandem: waiting for data: {shards}/train/{name} (3 of 9 bytes)\n"
    one.close()


@pytest.mark.parametrize("cached", [False, True])
def test_more_batches_than_memory_holds_are_refused_before_any_is_read(
    shards: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr(reader, "MEMORY", 7 * 4 * 64)  # bytes: 7 batches of 4 x 8 x 8 x 1
    options = {"cache_mb": 1 if cached else 0, "readers": 1}
    assert len(next(stream(shards, prefetch=4, **options).batches(0)).index) == 4
    if cached:  # then nothing is read ahead
        assert len(next(stream(shards, prefetch=10**8, **options).batches(0)).index) == 4
        return
    with pytest.raises(ValueError, match=r"^data\.prefetch: 100000003 batches of 4 x 8 x 8 x 1 take .* lower it"):
        next(stream(shards, prefetch=10**8, **options).batches(0))


# ------------------------------------------------------------------ errors
def test_an_error_in_a_reader_arrives_at_its_batch_with_shard_and_key(shards: Path) -> None:
    def meet(number: int) -> None:
        if number == 23:
            raise KeyError("a fault of ours")

    one = stream(shards, modality=Numbers(meet))
    order = one.order.take(0, 40).tolist()
    before = order.index(23) // 4
    batches = one.batches(0)
    for part in range(before):
        assert next(batches).index.tolist() == order[4 * part : 4 * part + 4]
    with pytest.raises(RuntimeError, match=r"2\.tar: 023: 'a fault of ours'") as caught:
        next(batches)
    assert isinstance(caught.value.__cause__, KeyError)
    assert next(batches, None) is None
    one.close()


def test_a_disk_that_fails_is_named_with_the_sample(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stream(shards, window="all")
    place = int(one.index.rows(np.array([23], np.int64))["offset"][0])
    shard = (shards / "train" / "2.tar").stat().st_ino
    real = os.pread

    def failing(fd: int, size: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == shard and offset <= place < offset + size and size > 512:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, size, offset)

    monkeypatch.setattr(fill.os, "pread", failing)
    with pytest.raises(OSError, match=r"2\.tar: \d{3}: .*Input/output error"):
        list(islice(one.batches(0), 11))
    one.close()


def test_a_shard_that_is_gone_is_named(shards: Path) -> None:
    one = stream(shards)
    (shards / "train" / "2.tar").unlink()
    with pytest.raises(ValueError, match=r"2\.tar: is missing"):
        list(islice(one.batches(0), 11))
    one.close()


def test_samples_that_are_all_bad_stop_the_stream_and_do_not_hang_it(
    tmp_path: Path, tar_of: Callable[..., Path]
) -> None:
    tar_of(tmp_path / "train" / "0.tar", [(f"{n}.png", png(n)) for n in range(8)])

    def meet(number: int) -> None:
        raise Undecodable("is never good")

    one = stream(tmp_path, readers=4, prefetch=6, max_bad_fraction=1.0, modality=Numbers(meet))
    with pytest.raises(ValueError, match=r"0\.tar: \d: is never good; 8 of 8 samples are bad"):
        next(one.batches(0))
    one.close()


# ------------------------------------------------------------------ reads
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the reads of samples from now on."""
    sizes: list[int] = []
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return real(fd, size, offset)

    monkeypatch.setattr(fill.os, "pread", pread)
    return sizes


def test_samples_that_adjoin_come_with_one_read(
    shards: Path, monkeypatch: pytest.MonkeyPatch, number_of: Callable[[object], list[int]]
) -> None:
    one = stream(shards, batch=40)
    sizes = counted(monkeypatch)
    (raw,) = one.evaluation(40)
    assert number_of(raw.data) == raw.index.tolist() == list(range(40))
    assert len(sizes) == 4
    one.close()


def test_what_lies_far_between_samples_is_not_read(
    tmp_path: Path, tar_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = []
    for number in range(6):
        members += [(f"{number}.png", png(number)), (f"{number}.txt", bytes(50_000))]
    tar_of(tmp_path / "train" / "0.tar", members)
    one = stream(tmp_path, batch=6)
    sizes = counted(monkeypatch)
    list(one.evaluation(6))
    assert len(sizes) == 6
    assert sum(sizes) < 6000
    one.close()


def test_few_shards_are_open_at_a_time(
    tmp_path: Path,
    tar_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    number_of: Callable[[object], list[int]],
) -> None:
    monkeypatch.setattr(opened, "KEPT", 3)
    for shard in range(30):
        tar_of(tmp_path / "train" / f"{shard:02d}.tar", [(f"{shard}.png", png(shard))])
    one = stream(tmp_path, batch=15, window="all", readers=1)
    gc.collect()  # what other tests left
    before = len(list(Path("/proc/self/fd").iterdir()))
    running = one.batches(0)
    for raw in islice(running, 6):
        assert number_of(raw.data) == raw.index.tolist()
    gc.collect()
    assert before < len(list(Path("/proc/self/fd").iterdir())) <= before + 3 + 2  # two in the hands of a reader
    one.close()


def test_the_store_hears_of_each_window_and_the_next_before_they_are_read(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []
    one = stream(shards, batch=5, window=1, prefetch=1)
    monkeypatch.setattr(Local, "prepare", lambda self, names: said.append([shard.name for shard in names]))
    batches = one.batches(0)
    for _ in range(9):  # of 10 samples a window, five batches ahead of the end of an epoch
        next(batches)
    windows = [one.order.shards(start).tolist() for start in range(0, 60, 10)]
    names = [[f"{shard}.tar" for shard in window] for window in windows]
    assert said == [[*here, *after] for here, after in pairwise(names)]
    said.clear()
    list(one.evaluation(20))
    assert said == [["0.tar", "1.tar"], ["2.tar", "3.tar"]]  # of two shards a batch no more than two windows
    one.close()
