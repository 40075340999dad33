"""Whole samples in Tandem's order, for webdataset's own stages; and what must never reach them."""

import io
import json
import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tests import starts
from tools.shards.make import main as make
from tools.soak import reference
from trainer.data.config import MixtureConfig, SetConfig, ShardsConfig
from trainer.data.samples import Samples

SIZES = [1, 7, 3, 5, 1]
TOTAL = sum(SIZES)
Write = Callable[..., Path]
leaves_files_open = pytest.mark.filterwarnings(  # webdataset's reader does
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 colour JPEGs of two classes, as `tandem data make` writes them, in several shards."""
    folder = tmp_path_factory.mktemp("packed")
    for number in range(30):
        path = folder / "images" / ("even" if number % 2 == 0 else "odd") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (8 * number, 255 - 8 * number, 100)).save(path)
    words = ["folder", str(folder / "images"), str(folder / "shards"), "--format", "jpg", "--shard-size", "15KB"]
    assert make([*words, "--val-fraction", "0.1", "--workers", "1"]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, write_set: Write) -> Path:
    return write_set(tmp_path_factory.mktemp("uneven"), SIZES)


def config(path: Path, **options: Any) -> ShardsConfig:
    return ShardsConfig(**{"path": path, "size": (2, 3), "channels": 1} | options)


def samples(path: Path, *, options: dict[str, Any] | None = None, **given: Any) -> Samples:
    return Samples(config(path, **options or {}), **{"split": "train", "seed": 0} | given)


# ------------------------------------------------------------------ webdataset
def test_webdatasets_own_stages_take_our_samples_in_our_order(packed: Path) -> None:
    source = samples(packed, options={"size": 16, "channels": 3})
    assert len(source.index.shards) > 2
    stages = (webdataset.decode("rgb8"), webdataset.to_tuple("jpg", "cls", "__index__"), webdataset.batched(8))
    found = list(islice(webdataset.DataPipeline(source, *stages), 6))
    order = source.order.take(0, 48).tolist()
    for turn, (images, labels, index) in enumerate(found):
        assert images.shape == (8, 16, 16, 3) and images.dtype == np.uint8
        assert index.tolist() == order[8 * turn : 8 * turn + 8]
        assert ((images[:, 8, 8, 0].astype(int) + 4) // 8 % 2 == labels).all()  # a level says which image it is
    by_hand = webdataset.map(lambda sample: (sample["__position__"], np.asarray(Image.open(io.BytesIO(sample["jpg"])))))
    for place, (position, image) in enumerate(islice(webdataset.DataPipeline(source, by_hand), 9)):
        assert position == place
        assert (image == found[place // 8][0][place % 8]).all()


@leaves_files_open
def test_webdatasets_plain_reader_finds_the_same_samples_in_our_shards(packed: Path) -> None:
    source = samples(packed, options={"size": 16, "channels": 3}, epochs=1)
    urls = [str(packed / "train" / shard.name) for shard in source.index.shards]
    plain = list(webdataset.WebDataset(urls, shardshuffle=False))
    ours = sorted(source, key=lambda sample: sample["__index__"])
    assert len(plain) == len(ours) == source.index.samples
    for theirs, mine in zip(plain, ours, strict=True):
        assert {"jpg", "cls", "__key__", "__url__"} <= theirs.keys()
        assert {key: mine[key] for key in theirs if key != "__local_path__"} == {
            key: value for key, value in theirs.items() if key != "__local_path__"
        }
        assert mine["__label__"] == int(theirs["cls"])


def test_shards_of_webdatasets_writer_are_read(tmp_path: Path) -> None:
    expected = {}
    (tmp_path / "train").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "train" / "%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            image = np.full((4, 4), number, np.uint8)
            writer.write({"__key__": f"k{number}", "npy": image, "cls": number, "json": {"number": number}})
            expected[f"k{number}"] = number
    source = samples(tmp_path, options={"size": 4}, epochs=1)
    pipeline = webdataset.DataPipeline(
        source, webdataset.decode(), webdataset.to_tuple("__key__", "npy", "cls", "json")
    )
    found = list(pipeline)
    assert {key: label for key, _, label, _ in found} == expected
    assert all(image.tolist() == [[label] * 4] * 4 and meta == {"number": label} for _, image, label, meta in found)


# ------------------------------------------------------------------ order, ranks, resume
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, 40), seed=st.integers(0, 3), window=st.sampled_from([1, 2, "all"]),
    worlds=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 5)), min_size=1, max_size=4),
)  # fmt: skip
def test_ranks_share_the_order_and_go_on_at_any_number_of_ranks(
    uneven: Path, start: int, seed: int, window: int | str, worlds: list[tuple[int, int]]
) -> None:
    """worlds: (ranks, samples each takes) of each start."""
    found, position = [], start
    for world, count in worlds:
        shares = [
            list(
                islice(
                    samples(uneven, options={"window": window}, seed=seed, start=position, rank=r, world=world), count
                )
            )
            for r in range(world)
        ]
        found += [sample for turn in zip(*shares, strict=True) for sample in turn]
        position += count * world
    assert [sample["__position__"] for sample in found] == list(range(start, position))
    order = reference.order(SIZES, seed=seed, window=len(SIZES) if window == "all" else int(window))
    assert [sample["__index__"] for sample in found] == list(islice(order, start, position))
    assert all(int(sample["__key__"]) == sample["__index__"] for sample in found)


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_an_epoch_gives_each_sample_once(uneven: Path, world: int) -> None:
    found = [
        sample for rank in range(world) for sample in samples(uneven, epochs=2, start=TOTAL, rank=rank, world=world)
    ]
    assert sorted(sample["__index__"] for sample in found) == list(range(TOTAL))
    assert not list(samples(uneven, epochs=1, start=TOTAL))


def test_a_dropped_tail_needs_the_batch(uneven: Path) -> None:
    dropped = samples(uneven, options={"tail": "drop"}, batch=5, epochs=3)
    assert dropped.length == 15
    assert [sample["__index__"] for sample in dropped] == list(
        islice(reference.order(SIZES, seed=0, window=4, batch=5), 45)
    )
    with pytest.raises(ValueError, match=r"^data\.tail: drop depends on the batch; give Samples its batch="):
        samples(uneven, options={"tail": "drop"})


def test_workers_of_a_loader_divide_the_share(uneven: Path) -> None:
    shares = []
    for rank in range(2):
        source = samples(uneven, start=3, rank=rank, world=2)
        pipeline = webdataset.DataPipeline(source, webdataset.to_tuple("__position__"), webdataset.batched(2))
        # two workers that are not forked: the source goes there as it is stored
        loader = DataLoader(pipeline, batch_size=None, num_workers=2, multiprocessing_context=starts.CONTEXT)
        shares.append([batch[0].tolist() for batch in islice(loader, 6)])
    assert sorted(position for share in shares for batch in share for position in batch) == list(range(3, 27))


def test_a_mixture_gives_the_labels_of_its_joined_classes(tmp_path: Path, tar_of: Callable[..., Path]) -> None:
    for name, classes in (("a", ["ape", "bee"]), ("b", ["bee", "cat"])):
        members = []
        for number, text in enumerate(classes):
            members += [(f"{number}.npy", npy(number)), (f"{number}.cls", text.encode())]
        tar_of(tmp_path / name / "train" / "0.tar", members)
    sets = (SetConfig(path=tmp_path / "a", weight=1), SetConfig(path=tmp_path / "b", weight=3))
    source = Samples(MixtureConfig(sets=sets, size=(2, 3), channels=1, label="cls"), split="train", seed=0)
    found = list(islice(source, 4096))
    assert [sample["__index__"] for sample in found] == source.order.take(0, 4096).tolist()
    assert sum(f"{tmp_path / 'b'}" in sample["__url__"] for sample in found) == 3072
    for sample in found:
        folder = Path(sample["__url__"]).parts[-3]
        assert source.index.classes[sample["__label__"]] == f"{folder}/{sample['cls'].decode()}"


def npy(number: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.full((2, 3), number, np.uint8))
    return file.getvalue()


# ------------------------------------------------------------------ what must not get through
HARMLESS = {"txt", "text", "transcript", "cls", "cls2", "index", "inx", "id", "json", "jsn", "npy"}
DANGEROUS = [*sorted(set(webdataset.autodecode.decoders) - HARMLESS), "gz", "txt.gz", "left.pyd"]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@leaves_files_open
@pytest.mark.parametrize("as_told", [True, False])
def test_nothing_that_runs_or_unpacks_what_it_holds_is_handed_to_webdataset(
    tmp_path: Path, tar_of: Callable[..., Path], as_told: bool
) -> None:
    touched = tmp_path / "touched"
    payload = pickle.dumps(Payload(touched))
    assert {"pyd", "pkl", "pickle", "pth"} <= set(DANGEROUS)
    members = [("0.npy", npy(0)), ("0.txt", b"fine"), ("0.PKL", payload)]
    members += [(f"0.{field}", payload) for field in DANGEROUS if field != "pkl"]
    tar_of(tmp_path / "train" / "0.tar", members)
    with pytest.raises(ValueError, match="of a kind that is never read"):
        samples(tmp_path)
    source = samples(tmp_path, options={"ignore": tuple(DANGEROUS)}, epochs=1)
    if not as_told:  # whoever made the index says nothing of them
        index = tmp_path / "train" / "index.json"
        content = json.loads(index.read_text())
        assert content["reading"].pop("ignore") == sorted(DANGEROUS)
        index.write_text(json.dumps(content | {"reading": content["reading"] | {"ignore": []}}))
        source = samples(tmp_path, epochs=1)
    (sample,) = webdataset.DataPipeline(source, webdataset.decode())
    assert {key for key in sample if not key.startswith("__")} == {"npy", "txt"}
    assert not touched.exists()
    (theirs,) = webdataset.WebDataset(str(tmp_path / "train" / "0.tar"), shardshuffle=False)
    assert {"pyd", "pkl", "gz"} <= theirs.keys()  # which they do hand over


def test_what_the_config_ignores_stays_out(tmp_path: Path, tar_of: Callable[..., Path]) -> None:
    tar_of(tmp_path / "train" / "0.tar", [("0.npy", npy(0)), ("0.Secret.txt", b"a"), ("0.txt", b"b")])
    (sample,) = samples(tmp_path, options={"ignore": ("secret.txt",)}, epochs=1)
    assert sample["txt"] == b"b" and "secret.txt" not in sample
    (sample,) = samples(tmp_path, epochs=1)  # the index remembers
    assert "secret.txt" not in sample


def test_a_member_that_would_take_the_place_of_the_key_is_refused(tmp_path: Path, tar_of: Callable[..., Path]) -> None:
    tar_of(tmp_path / "train" / "0.tar", [("0.npy", npy(0)), ("0.__key__", b"another")])
    with pytest.raises(ValueError, match=r"0\.tar: key 0 has the field __key__ twice"):
        list(samples(tmp_path, epochs=1))


def test_a_shard_that_changes_under_way_is_named(tmp_path: Path, write_set: Write) -> None:
    source = samples(write_set(tmp_path, [4]), epochs=1)
    shard = tmp_path / "train" / "0000.tar"
    whole = shard.read_bytes()
    renamed = bytearray(whole)
    for at in range(0, len(whole), 512):  # key 000002 becomes 000012, with its checksums
        if whole[at : at + 6] == b"000002":
            renamed[at + 4 : at + 5] = b"1"
            stated = int(whole[at + 148 : at + 154], 8) + 1
            renamed[at + 148 : at + 154] = f"{stated:06o}".encode()
    shard.write_bytes(renamed)
    with pytest.raises(ValueError, match=r"0000\.tar: holds another sample at byte \d+ than its index says"):
        list(source)
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0000\.tar"):
        list(source)
    shard.write_bytes(whole)
    assert len(list(source)) == 4
    torch.testing.assert_close(next(iter(source))["__position__"], 0)
