"""Tables beside shards: read lazily, verified, never trusted to point outside."""

import hashlib
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data import ShardsConfig, table
from trainer.data import index as indices
from trainer.data.index import ROW, Index, Shard

Write = Callable[..., Path]
SIZES = (3, 1, 5)


def load(path: Path, **options: object) -> Index:
    return indices.load(ShardsConfig(path=path, size=2, **options), "train")  # type: ignore[arg-type]


@pytest.fixture
def made(tmp_path: Path, write_set: Write) -> Path:
    write_set(tmp_path / "set", SIZES)
    load(tmp_path / "set").close()
    return tmp_path / "set"


def change(path: Path, **values: object) -> None:
    """Index.json with other values."""
    content = json.loads((path / "train" / "index.json").read_text())
    (path / "train" / "index.json").write_text(json.dumps(content | values))


def forge(path: Path, alter: Callable[[np.ndarray], np.ndarray], shard: int = 2) -> None:
    """A table that was altered, with the right digest in index.json: as a hostile maker would."""
    content = json.loads((path / "train" / "index.json").read_text())
    place = path / "train" / f"{shard:04d}.idx.npy"
    data = table.encode(alter(np.load(place)))
    place.write_bytes(data)
    content["shards"][shard]["table"] = hashlib.sha256(data).hexdigest()
    (path / "train" / "index.json").write_text(json.dumps(content))


# ------------------------------------------------------------------ what is there
def test_rows_of_any_samples_are_those_of_the_tables(made: Path) -> None:
    index = load(made)
    assert (index.samples, index.sets, index.set_samples) == (9, (3,), (9,))
    assert index.starts.tolist() == [0, 3, 4, 9]
    whole = np.concatenate([index.table(shard) for shard in range(3)])
    for samples in ([], [4], [8, 0, 3, 3, 1], list(range(9))):
        numbers = np.array(samples, np.int64)
        assert (index.rows(numbers) == whole[numbers]).all()
        assert index.rows(numbers).dtype == ROW
    assert index.shard_of(np.array([0, 2, 3, 4, 8])).tolist() == [0, 0, 1, 2, 2]
    assert whole["label"].tolist() == [number % 3 for number in range(9)]


def test_a_table_cannot_be_changed_by_who_reads_it(made: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        load(made).table(0)["label"][0] = 1


def test_where_names_shard_and_key(made: Path) -> None:
    index = load(made)
    assert index.where(4) == f"{made}/train/0002.tar: 000004"
    (made / "train" / "0002.tar").unlink()
    assert index.where(4) == f"{made}/train/0002.tar: sample 0"


def test_numpy_reads_a_table(made: Path) -> None:
    assert (np.load(made / "train" / "0000.idx.npy", allow_pickle=False) == load(made).table(0)).all()


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(0, 300), cut=st.integers(0, 400), more=st.integers(0, 60))
def test_a_table_is_read_whole_or_not_at_all(samples: int, cut: int, more: int) -> None:
    rows = np.frombuffer(np.random.default_rng(samples).bytes(samples * ROW.itemsize), ROW)
    data = table.encode(rows)
    assert len(data) == table.table_bytes(samples)
    assert (table.decode(data) == rows).all()
    assert (np.load(io.BytesIO(data)) == rows).all()
    for other in (data[: len(data) - cut], data + bytes(more)):
        if len(other) != len(data):
            with pytest.raises(ValueError, match="is no table"):
                table.decode(other)


def test_threads_share_the_tables(made: Path) -> None:
    index = load(made)
    index._tables = table.Tables(index._read, kept=1)  # so small that each look-up drops the one before
    expected = np.concatenate([index.table(shard) for shard in range(3)])
    faults: list[str] = []

    def look() -> None:
        for seed in range(200):
            samples = np.random.default_rng(seed).integers(0, 9, 4)
            if not (index.rows(samples) == expected[samples]).all():
                faults.append(str(samples))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_tables_are_dropped_beyond_the_bound() -> None:
    reads: list[int] = []
    tables = table.Tables(lambda shard: reads.append(shard) or np.zeros(10, ROW), kept=25 * ROW.itemsize)  # type: ignore[func-returns-value]
    for shard in (0, 1, 0, 2, 0, 1):
        assert len(tables(shard)) == 10
    assert reads == [0, 1, 2, 1]  # 2 took the place of 1, which was used longest ago


# ------------------------------------------------------------------ damage and malice
def test_a_missing_table_is_named(made: Path) -> None:
    (made / "train" / "0001.idx.npy").unlink()
    with pytest.raises(ValueError, match=r"0001\.idx\.npy: is missing; copy it .* or run `tandem data index"):
        load(made)


def test_a_table_that_is_cut_is_named_before_anything_is_read(made: Path) -> None:
    path = made / "train" / "0002.idx.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"0002\.idx\.npy: has 480 bytes, not those of its samples"):
        load(made)


@pytest.mark.parametrize("at", [0, 8, 100, 300])
def test_a_changed_byte_of_a_table_is_found(made: Path, at: int) -> None:
    path = made / "train" / "0002.idx.npy"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"0002\.idx\.npy: does not belong to index\.json; .* run `tandem data index`"):
        load(made)


def test_the_table_of_another_shard_is_refused(tmp_path: Path, write_set: Write) -> None:
    made = write_set(tmp_path, [2, 2])
    load(made)
    (made / "train" / "0001.idx.npy").write_bytes((made / "train" / "0000.idx.npy").read_bytes())
    with pytest.raises(ValueError, match=r"0001\.idx\.npy: does not belong to index\.json"):
        load(made)


def test_a_large_set_finds_a_changed_table_when_it_needs_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.part.AT_ONCE", 0)
    path = made / "train" / "0002.idx.npy"
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    index = load(made)
    assert len(index.table(1)) == 1
    with pytest.raises(ValueError, match=r"0002\.idx\.npy: does not belong to index\.json"):
        index.rows(np.array([0, 8]))


HUGE = (1 << 63) - 1
WILD = st.sampled_from([-HUGE, -512, -1, 0, 511, 512, 1 << 20, 1 << 40, HUGE - 511, HUGE])


@settings(max_examples=100, deadline=None)
@given(column=st.sampled_from(["begin", "end", "offset", "size"]), row=st.integers(0, 3), value=WILD, add=st.booleans())
def test_a_table_never_leads_outside_its_shard(column: str, row: int, value: int, add: bool) -> None:
    rows = np.zeros(4, ROW)
    rows["begin"] = np.arange(4) * 1536
    rows["end"], rows["offset"], rows["size"] = rows["begin"] + 1536, rows["begin"] + 512, 1000
    shard = Shard("a.tar", 4, 10_240, "", "")
    assert table.fault(rows, shard, classes=1, fields=1) is None
    with np.errstate(over="ignore"):
        rows[column][row] = rows[column][row] + np.int64(value) if add else value
    wrong = table.fault(rows, shard, classes=1, fields=1)
    for begin, end, offset, size in zip(
        *(rows[name].tolist() for name in ("begin", "end", "offset", "size")), strict=True
    ):
        good = 0 <= begin <= offset - 512 and size >= 0 and offset + size <= end <= shard.bytes and not offset % 512
        assert good or wrong == "places samples outside the shard or over each other"
    if wrong is None:
        assert (rows["begin"][1:] >= rows["end"][:-1]).all()


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("offset", 1 << 30, "places samples outside the shard"),
        ("size", 1 << 30, "places samples outside the shard"),
        ("label", 3, "holds labels that are none of the 3 classes"),
        ("label", -2, "holds labels that are none of the 3 classes"),
        ("field", 1, "holds a field that is none of the 1 of"),
    ],
)
def test_a_forged_table_is_refused(made: Path, column: str, value: int, what: str) -> None:
    def alter(rows: np.ndarray) -> np.ndarray:
        rows[column][2] = value
        return rows

    forge(made, alter)
    with pytest.raises(ValueError, match=rf"0002\.idx\.npy: {what}"):
        load(made)


def test_a_table_with_other_columns_is_refused(made: Path) -> None:
    content = json.loads((made / "train" / "index.json").read_text())
    file = io.BytesIO()
    np.save(file, np.zeros(1, [("begin", "<i8"), ("evil", "O")][:1]), allow_pickle=False)
    data = file.getvalue().ljust(table.table_bytes(1), b"\0")
    (made / "train" / "0001.idx.npy").write_bytes(data)
    content["shards"][1]["table"] = hashlib.sha256(data).hexdigest()
    (made / "train" / "index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"0001\.idx\.npy: is no table of samples"):
        load(made)


SHARD = {"name": "a.tar", "samples": 1, "bytes": 10_240, "sha256": "0" * 64, "table": "f" * 64}
IMAGE = {"height": [2, 2], "width": [3, 3], "channels": [1, 1], "fields": ["npy"]}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"format": 1}, r"is of format 1, this version reads 2; run `tandem data index \S+`"),
        ({"samples": 10}, "states 10 samples, its shards hold 9"),
        ({"shards": [SHARD | {"samples": 1.0}]}, "1.0 is no number"),
        ({"shards": [SHARD | {"samples": 0}]}, "0 is no number from 1"),
        ({"shards": [SHARD | {"bytes": 1 << 62}]}, "is no number from"),
        ({"shards": [SHARD | {"sha256": 0}]}, "0 is no text"),
        ({"shards": [SHARD | {"bytes": 511}]}, "states 1 samples in the 511 bytes of a.tar"),
        ({"shards": [SHARD | {"samples": 1 << 60}]}, "states 1152921504606846976 samples in the 10240 bytes"),
        ({"shards": [SHARD, SHARD]}, "names a shard twice"),
        ({"classes": ["a", "b", "a"]}, "names a class twice"),
        ({"classes": "abc"}, "is not readable"),
        ({"image": {}}, "is not readable"),
        ({"image": IMAGE | {"height": [1 << 60] * 2}}, "no number from 1 to 65535"),
        ({"image": IMAGE | {"width": [65_536] * 2}}, "65536 is no number from 1 to 65535"),
        ({"image": IMAGE | {"width": [0, 3]}}, "0 is no number from 1"),
        ({"image": IMAGE | {"height": [40, 28]}}, "28 is no number from 40"),
        ({"image": IMAGE | {"channels": [3, 4]}}, "4 is no number from 3 to 3"),
        ({"reading": None}, "is not readable"),
        ({"options": 3}, "is not readable"),
    ],
)
def test_an_index_that_is_not_of_its_format_is_named(made: Path, values: dict[str, object], what: str) -> None:
    change(made, **values)
    with pytest.raises(ValueError, match=rf"index\.json: .*{what}") as caught:
        load(made)
    assert "tandem data index" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../a.tar", "/a.tar", "a/b.tar", "a\x1b.tar", ".tar", "a.zip", "", "..", "a.tar\n", ".a.tar", "\udcff.tar",
     "x" * 300 + ".tar", "\u00e9" * 99 + ".tar"],
)  # fmt: skip
def test_an_index_names_shards_of_its_folder_only(made: Path, name: str) -> None:
    content = json.loads((made / "train" / "index.json").read_text())
    content["shards"][0]["name"] = name
    change(made, shards=content["shards"])
    with pytest.raises(ValueError, match=r"index\.json: .* name for a shard") as caught:
        load(made)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("column", ["sha256", "table"])
@pytest.mark.parametrize(
    "value",
    ["", "/../../../../evil", "../x", "a/b", "a\0b", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", "\u0663" * 64],
)
def test_a_digest_that_is_none_is_refused(made: Path, column: str, value: str) -> None:
    """One of a shard becomes part of a file's name in the cache, and an empty one would compare nothing."""
    change(made, shards=[SHARD | {column: value}], samples=1)
    with pytest.raises(ValueError, match=r"index\.json: holds .* for a sha256") as caught:
        load(made)
    assert str(caught.value).isprintable()


def test_classes_of_an_index_steer_no_terminal(made: Path) -> None:
    change(made, classes=["a\x1b[31m", "b\n", "\u00e9 \u4e2d"])
    assert load(made).classes == ("a\\x1b[31m", "b\\n", "\u00e9 \u4e2d")


def test_an_index_that_nests_without_end_is_named(made: Path) -> None:
    (made / "train" / "index.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"index\.json: is not readable \(RecursionError"):
        load(made)
