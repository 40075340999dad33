"""The stream is exact: the same global batches for any world size, any start, from memory or from the shards."""

import io
import re
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy_format
from PIL import Image

from tests import starts
from tests.runs import write_config
from trainer.data import RawBatch, ShardsConfig, Stream
from trainer.data.source import Evaluation, Training

EXAMPLES = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SIZES = [1, 7, 3, 5, 1]
TOTAL = sum(SIZES)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Path:
    return write_set(tmp_path_factory.mktemp("uneven"), SIZES)


def stream(path: Path, *, batch: int, rank: int = 0, world: int = 1, seed: int = 0, **options: object) -> Stream:
    settings = {"size": (2, 3), "channels": 1, "readers": 1, "prefetch": 2} | options
    return Stream(ShardsConfig(path=path, **settings), split="train", batch=batch, rank=rank, world=world, seed=seed)  # type: ignore[arg-type]


def gather(path: Path, *, batch: int, world: int, start: int, steps: int, **options: object) -> list[RawBatch]:
    """The first global batches from `start` on, put together from all ranks in order."""
    shares = []
    for rank in range(world):
        one = stream(path, batch=batch, rank=rank, world=world, **options)
        shares.append(list(islice(one.batches(start), steps)))
        one.close()
    names = ("data", "label", "position", "index", "weight")
    return [
        RawBatch(*(torch.cat([getattr(share, name) for share in parts]) for name in names))
        for parts in zip(*shares, strict=True)
    ]


@EXAMPLES
@given(
    world=st.integers(1, 8), share=st.integers(1, 3), start=st.integers(0, 60), window=st.integers(1, 6),
    cache=st.sampled_from([0, 64]), seed=st.integers(0, 3),
)  # fmt: skip
def test_any_world_size_gives_the_same_global_batches(
    uneven: Path,
    number_of: Callable[[object], list[int]],
    world: int,
    share: int,
    start: int,
    window: int,
    cache: int,
    seed: int,
) -> None:
    batch, steps = world * share, 3
    found = gather(uneven, batch=batch, world=world, start=start, steps=steps, window=window, cache_mb=cache, seed=seed)
    alone = stream(uneven, batch=1, window=window, seed=seed)
    expected = list(islice(alone.batches(start), steps * batch))
    assert torch.cat([b.position for b in found]).tolist() == list(range(start, start + steps * batch))
    for name in ("data", "label", "index", "weight"):
        assert torch.equal(
            torch.cat([getattr(b, name) for b in found]), torch.cat([getattr(b, name) for b in expected])
        ), name
    for b in found:
        assert number_of(b.data) == b.index.tolist()
        assert b.label.tolist() == [i % 3 for i in b.index.tolist()]
        assert b.data.dtype == torch.uint8
        assert b.weight.tolist() == [1.0] * batch
    alone.close()


def test_each_epoch_shows_every_sample_once_and_batches_straddle_epochs(uneven: Path) -> None:
    found = stream(uneven, batch=4).batches(0)
    index = torch.cat([b.index for b in islice(found, TOTAL)])  # 4 epochs
    for epoch in index.view(4, TOTAL):
        assert sorted(epoch.tolist()) == list(range(TOTAL))


@pytest.mark.parametrize("cache", [0, 64])
@pytest.mark.parametrize("start", [0, 4, 8, 16, 36, 4000])
def test_going_on_equals_the_uninterrupted_stream(uneven: Path, start: int, cache: int) -> None:
    whole = stream(uneven, batch=4, cache_mb=cache)
    expected = list(islice(whole.batches(0), start // 4 + 3))[-3:]
    found = list(islice(stream(uneven, batch=4, cache_mb=cache).batches(start), 3))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.data, b.data)
        assert torch.equal(a.position, b.position)


@EXAMPLES
@given(world=st.integers(1, 8), share=st.integers(1, 6), cache=st.sampled_from([0, 64]))
def test_an_evaluation_sees_each_sample_once_and_pads_with_weight_0(
    uneven: Path, number_of: Callable[[object], list[int]], world: int, share: int, cache: int
) -> None:
    batch = world * share
    shares = [
        list(stream(uneven, batch=batch, rank=rank, world=world, cache_mb=cache).evaluation(batch))
        for rank in range(world)
    ]
    assert {len(one) for one in shares} == {-(-TOTAL // batch)}
    rows = [row for parts in zip(*shares, strict=True) for row in parts]
    index = torch.cat([b.index for b in rows])
    weight = torch.cat([b.weight for b in rows])
    position = torch.cat([b.position for b in rows])
    assert index[weight > 0].tolist() == list(range(TOTAL))
    assert set(weight.tolist()) <= {0.0, 1.0}
    assert weight[TOTAL:].sum() == 0
    assert len(position.unique()) == len(position)
    assert number_of(torch.cat([b.data for b in rows])) == index.tolist()


def test_one_shard_feeds_many_ranks(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    path = write_set(tmp_path, [10])
    found = gather(path, batch=4, world=2, start=0, steps=5, readers=2, cache_mb=0)
    assert sorted(torch.cat([b.index for b in found]).tolist()) == sorted([*range(10), *range(10)])


def test_fewer_samples_than_ranks_is_refused_with_both_numbers(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    path = write_set(tmp_path, [3])
    with pytest.raises(ValueError, match=r"holds 3 samples, fewer than the 4 ranks"):
        stream(path, batch=4, world=4)


def test_a_batch_that_ranks_do_not_divide_is_refused(uneven: Path) -> None:
    with pytest.raises(ValueError, match=r"^batch: 10 does not divide among 4 ranks; nearest: 8"):
        stream(uneven, batch=10, world=4)
    with pytest.raises(ValueError, match=r"^batch: 3 does not divide among 2 ranks"):
        stream(uneven, batch=4, world=2).evaluation(3)


def test_the_first_samples_are_the_same_on_every_rank(uneven: Path) -> None:
    for rank in range(2):
        assert stream(uneven, batch=2, rank=rank, world=2).first(5).index.tolist() == [0, 1, 2, 3, 4]
    assert len(stream(uneven, batch=2).first(500).index) == TOTAL


# ------------------------------------------------------------------ bad samples
GARBAGE = {4: b"not an image", 5: b"", 16: b"\x93NUMPY cut"}  # 16 is the last: its stand-in is sample 0


@pytest.fixture(scope="session")
def damaged(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Path:
    return write_set(tmp_path_factory.mktemp("damaged"), SIZES, bad=GARBAGE)


@pytest.mark.parametrize("cache", [0, 64])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_bad_sample_is_counted_and_its_place_is_filled_by_the_next_good_one(
    uneven: Path, damaged: Path, number_of: Callable[[object], list[int]], cache: int, world: int
) -> None:
    clean = gather(uneven, batch=4, world=world, start=8, steps=9)
    found = gather(damaged, batch=4, world=world, start=8, steps=9, cache_mb=cache, max_bad_fraction=0.5)
    stands_for = {4: 6, 5: 6, 16: 0}
    for a, b in zip(clean, found, strict=True):
        assert b.index.tolist() == [stands_for.get(i, i) for i in a.index.tolist()]
        assert number_of(b.data) == b.index.tolist()
        assert b.label.tolist() == [i % 3 for i in b.index.tolist()]


@pytest.mark.parametrize("cache", [0, 64])
def test_the_count_is_of_what_was_delivered_and_names_the_samples(damaged: Path, cache: int) -> None:
    one = stream(damaged, batch=TOTAL, cache_mb=cache, max_bad_fraction=0.5)
    batches = one.batches(0)
    next(batches)
    assert one.bad == len(GARBAGE)
    next(batches)
    assert one.bad == 2 * len(GARBAGE)
    said = sorted(one.news())
    assert [(bad.sample, bad.key) for bad in said] == [(number, f"{number:06d}") for number in GARBAGE]
    assert [Path(bad.shard) for bad in said] == [
        damaged / "train" / name for name in ("0001.tar", "0001.tar", "0004.tar")
    ]
    assert all("no .npy" in bad.reason or "empty" in bad.reason for bad in said)
    assert one.news() == []  # once


@pytest.mark.parametrize("cache", [0, 64])
def test_an_evaluation_gives_bad_samples_weight_0(damaged: Path, cache: int) -> None:
    found = list(stream(damaged, batch=4, cache_mb=cache, max_bad_fraction=0.5).evaluation(4))
    index = torch.cat([b.index for b in found])
    weight = torch.cat([b.weight for b in found])
    assert index[weight > 0].tolist() == [i for i in range(TOTAL) if i not in GARBAGE]


@pytest.mark.parametrize("cache", [0, 64])
def test_too_many_bad_samples_stop_the_run_and_name_one(damaged: Path, cache: int) -> None:
    with pytest.raises(ValueError, match=r"00000[45]|000016.*samples are bad.*data\.max_bad_fraction"):
        list(islice(stream(damaged, batch=4, cache_mb=cache).batches(0), 10))


@pytest.mark.parametrize("cache", [0, 64])
def test_one_bad_sample_is_always_allowed_and_no_second(
    tmp_path: Path, write_set: Callable[..., Path], cache: int
) -> None:
    options = {"cache_mb": cache, "max_bad_fraction": 0.001}  # of 20 samples: less than one
    one = stream(write_set(tmp_path / "one", [12, 8], bad={3: b""}), batch=4, **options)
    assert sum(len(raw.index) for raw in islice(one.batches(0), 5)) == 20
    assert one.bad == 1
    two = stream(write_set(tmp_path / "two", [12, 8], bad={3: b"", 9: b""}), batch=4, **options)
    with pytest.raises(ValueError, match=r"2 of 20 samples are bad"):
        list(islice(two.batches(0), 5))


# ------------------------------------------------------------------ memory and shards
def test_memory_holds_what_the_shards_hold_whatever_the_layout(
    tmp_path: Path, tar_of: Callable[..., Path], number_of: Callable[[object], list[int]]
) -> None:
    members = []
    for number in range(60):
        image = np.full((4, 5, 1), number, np.uint8)
        image[0, 0], image[0, 1] = 0, number
        file = io.BytesIO()
        if number % 4 == 1:
            field = "png"
            Image.fromarray(image[..., 0]).save(file, "PNG")
        else:  # two versions of the format, with and without the axis of channels
            field = "npy"
            shown = image[..., 0] if number % 4 == 2 else image
            npy_format.write_array(file, shown, version=(2, 0) if number % 4 == 3 else (1, 0), allow_pickle=False)
        members.append((f"{number:03d}.{field}", file.getvalue()))
    tar_of(tmp_path / "train" / "a.tar", members[:1])
    tar_of(tmp_path / "train" / "b.tar", members[1:])
    for cache in (0, 64):
        one = stream(tmp_path, batch=60, size=(4, 5), cache_mb=cache, readers=3)
        assert one._reader.cached == (cache > 0)
        batch = next(one.batches(0))
        assert number_of(batch.data) == batch.index.tolist()
        assert batch.data[:, 3, 4, 0].tolist() == batch.index.tolist()
        one.close()


def test_memory_is_used_up_to_its_limit_only(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    path = write_set(tmp_path, [4], shape=(512, 512, 1))  # 1 MiB exactly
    assert stream(path, batch=1, size=512, cache_mb=1)._reader.cached
    more = write_set(tmp_path / "more", [5], shape=(512, 512, 1))
    assert not stream(more, batch=1, size=512, cache_mb=1)._reader.cached


@pytest.mark.parametrize("cache", [0, 64])
def test_a_shard_that_is_cut_after_the_check_is_an_error_and_no_bad_sample(
    tmp_path: Path, write_set: Callable[..., Path], cache: int
) -> None:
    path = write_set(tmp_path, [5, 5])
    one = stream(path, batch=10, cache_mb=cache, max_bad_fraction=1.0)
    shard = path / "train" / "0001.tar"
    shard.write_bytes(shard.read_bytes()[:1024])
    with pytest.raises(ValueError, match=r"0001\.tar: has 1,024 bytes, its index says 20,480"):
        next(one.batches(0))


@pytest.mark.parametrize("form", ["npy", "png"])  # out of a mapping, by reads
def test_a_shard_that_is_cut_while_it_is_open_is_an_error_that_names_it(
    tmp_path: Path, tar_of: Callable[..., Path], form: str
) -> None:
    image = np.zeros((8, 8), np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG") if form == "png" else npy_format.write_array(file, image)
    shard = tar_of(tmp_path / "train" / "a.tar", [(f"{n:02d}.{form}", file.getvalue()) for n in range(40)])
    one = stream(tmp_path, batch=1, size=8, cache_mb=0, prefetch=1, max_bad_fraction=1.0)
    batches = one.batches(0)
    next(batches)
    with shard.open("r+b") as opened:
        opened.truncate(1024)
    with pytest.raises(ValueError, match=r"a\.tar: .* the shard was cut short while it was read"):
        list(islice(batches, 60))
    one.close()


# ------------------------------------------------------------------ errors
def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.path: .*nowhere does not exist; .*tandem data make fashion-mnist"):
        stream(tmp_path / "nowhere", batch=1)


def test_a_missing_split_names_those_that_are_there(tmp_path: Path, write_set: Callable[..., Path]) -> None:
    path = write_set(tmp_path, [2], split="validation")
    with pytest.raises(ValueError, match=r"no train split \(found: validation\)"):
        stream(path, batch=1)


def test_a_size_that_the_data_does_not_have_is_refused(uneven: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.size: 28 x 28 is not what .* holds \(2 x 3, height x width\)"):
        stream(uneven, batch=1, size=28)


def test_channels_that_the_data_does_not_have_are_refused(
    uneven: Path, tmp_path: Path, write_set: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r"^data\.channels: 3 is not what .* holds \(grey images\)"):
        stream(uneven, batch=1, channels=3)
    colour = write_set(tmp_path, [2], shape=(2, 3, 3))
    with pytest.raises(ValueError, match=r"^data\.channels: 1 is not what .* holds \(3 channels\)"):
        stream(colour, batch=1, channels=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("window", 0), ("readers", 0), ("prefetch", 0), ("cache_mb", -1), ("size", 0), ("max_bad_fraction", 2.0)],
)
def test_a_setting_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        ShardsConfig(**{"path": Path(), "size": 4} | {field: value})  # type: ignore[arg-type]


# ------------------------------------------------------------------ the rest of the interface
def test_the_fingerprint_changes_with_the_shards(uneven: Path, tmp_path: Path, write_set: Callable[..., Path]) -> None:
    same = stream(write_set(tmp_path / "a", SIZES), batch=1).fingerprint
    other = stream(write_set(tmp_path / "b", [*SIZES[:-1], 2]), batch=1).fingerprint
    assert stream(uneven, batch=1).fingerprint == same != other


@pytest.mark.parametrize("cache", [0, 64])
def test_waiting_is_measured_and_closing_ends_the_iterators(uneven: Path, cache: int) -> None:
    one = stream(uneven, batch=4, cache_mb=cache)
    batches = one.batches(0)
    assert one.waited == 0.0
    next(batches)
    before = one.waited
    assert before > 0
    next(batches)
    assert one.waited > before
    one.close()
    assert next(batches, None) is None


def test_source_and_reader_are_stages_of_a_webdataset_pipeline(uneven: Path) -> None:
    one = stream(uneven, batch=4)
    source = Training(one.order, start=0, batch=4, rank=0, world=1)
    shapes = webdataset.DataPipeline(source, one._reader, webdataset.map(lambda raw: tuple(raw.data.shape)))
    assert list(islice(shapes, 2)) == [(4, 2, 3, 1)] * 2
    counted = webdataset.DataPipeline(Evaluation(TOTAL, 4, 0, 1), webdataset.map(lambda request: len(request.sample)))
    assert list(counted) == [4] * 5


@pytest.mark.parametrize("cache", [0, 64])
def test_a_batch_that_is_written_to_changes_no_other(uneven: Path, cache: int) -> None:
    one = stream(uneven, batch=2, cache_mb=cache)
    expected = list(islice(stream(uneven, batch=2).batches(0), TOTAL))
    written = next(one.batches(0))  # the stream still holds the order of this window
    for column in (written.data, written.label, written.position, written.index, written.weight):
        column.zero_()
    for found, right in zip(one.batches(0), expected, strict=False):
        for name in ("data", "label", "position", "index", "weight"):
            assert torch.equal(getattr(found, name), getattr(right, name)), name


# ------------------------------------------------------------------ left behind
def test_evaluations_that_end_early_leave_no_reader_behind(uneven: Path) -> None:
    one = stream(uneven, batch=2, cache_mb=0, readers=2)
    running = one.batches(0)
    next(running)
    alive = []
    for _ in range(4):
        assert len(list(islice(one.evaluation(2), 2))) == 2
        alive.append(threading.active_count())
    assert alive == alive[:1] * 4
    next(running)
    one.close()
    assert next(running, None) is None


@pytest.mark.parametrize("cache", [0, 64])
def test_a_run_names_each_bad_sample_once(tmp_path: Path, write_set: Callable[..., Path], cache: int) -> None:
    write_set(tmp_path / "set", [20, 20], shape=(28, 28, 1), bad={4: b"not an image", 31: b""})
    write_set(tmp_path / "set", [20], shape=(28, 28, 1), split="test")
    config = write_config(tmp_path / "run.yaml", "vae", data=tmp_path / "set")
    words = ("images=160", f"data.cache_mb={cache}", "data.max_bad_fraction=0.1")  # four epochs
    said = starts.train(tmp_path / "logs", str(config), *words).wait().ok()
    lines = [line for line in (said.out + said.err).splitlines() if "stands in" in line]
    assert sorted(re.findall(r"\b\d{6}\b", line)[0] for line in lines) == ["000004", "000031"]
