"""The seam for other kinds of data: sounds of fixed length and float arrays go through the stream that images take."""

import io
import wave
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as npy_format

from trainer.data import ShardsConfig, Stream
from trainer.data.convert import Undecodable
from trainer.data.modality import Modality

LENGTH = 400


class Sounds:
    """Mono, 16 bit, `length` samples: all that a kind of data takes."""

    plain_kinds = ("wav",)

    def __init__(self, length: int) -> None:
        self.shape, self.dtype = (length,), np.dtype(np.int16)

    def decode(self, data: bytes, kind: str, row: np.ndarray) -> None:
        try:
            with wave.open(io.BytesIO(data)) as file:
                form = (file.getnchannels(), file.getsampwidth(), file.getnframes())
                frames = file.readframes(file.getnframes())
        except (wave.Error, EOFError) as error:
            raise Undecodable(f"is no WAV file ({error})") from None
        if form != (1, 2, *self.shape) or len(frames) != row.nbytes:
            raise Undecodable(f"holds {form[0]} x {form[2]} samples of {8 * form[1]} bit")
        row[...] = np.frombuffer(frames, "<i2")

    def plain(self, data: bytes, kind: str) -> int | None:
        row = np.empty(self.shape, self.dtype)
        try:
            self.decode(data, kind, row)
        except Undecodable:
            return None
        return len(data) - row.nbytes if data.endswith(row.tobytes()) else None  # other chunks may follow


class Arrays:
    """float32 .npy of one shape; without the quick way."""

    plain_kinds = ()

    def __init__(self, *shape: int) -> None:
        self.shape, self.dtype = shape, np.dtype(np.float32)

    def decode(self, data: bytes, kind: str, row: np.ndarray) -> None:
        try:
            array = npy_format.read_array(io.BytesIO(data), allow_pickle=False)
        except ValueError as error:
            raise Undecodable(f"is no .npy file ({error})") from None
        if array.shape != self.shape or array.dtype != self.dtype:
            raise Undecodable(f"is {array.dtype} {array.shape}")
        row[...] = array

    def plain(self, data: bytes, kind: str) -> int | None:
        raise AssertionError("never asked")


def sound(number: int, *, length: int = LENGTH, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, rate, length, "NONE", ""))
        out.writeframes(((np.arange(length) * (number + 1)) % 3000).astype("<i2").tobytes())
    return file.getvalue()


def array(number: int) -> bytes:
    file = io.BytesIO()
    npy_format.write_array(file, np.full((3, 5), number + 0.5, np.float32), allow_pickle=False)
    return file.getvalue()


def stream(path: Path, modality: Modality, *, field: str, rank: int = 0, world: int = 1, **options: Any) -> Stream:
    config = ShardsConfig(path=path, size=1, image=field, readers=2, prefetch=2, **options)
    return Stream(config, split="train", batch=6, rank=rank, world=world, seed=3, modality=modality)


@pytest.mark.parametrize("cache", [0, 64])
def test_sounds_are_samples_like_any_other(tmp_path: Path, tar_of: Callable[..., Path], cache: int) -> None:
    for shard in range(3):
        members = []
        for number in range(10 * shard, 10 * shard + 10):
            data = sound(number, rate=8000 if number % 4 else 16000)  # two headers, one kind of row
            data = {7: data[:-100], 13: sound(1, length=LENGTH // 2)}.get(number, data)
            members += [(f"{number:03d}.wav", data), (f"{number:03d}.cls", str(number % 3).encode())]
        tar_of(tmp_path / "train" / f"{shard}.tar", members)
    whole = stream(tmp_path, Sounds(LENGTH), field="wav", cache_mb=cache, max_bad_fraction=0.1)
    assert whole.stored == (LENGTH,)
    batches = list(islice(whole.batches(0), 10))
    for raw in batches:
        assert raw.data.shape == (6, LENGTH)
        assert raw.data.dtype == torch.int16
        numbers = raw.index.tolist()
        assert not {7, 13} & set(numbers)
        expected = [((np.arange(LENGTH) * (number + 1)) % 3000).tolist() for number in numbers]
        assert raw.data.tolist() == expected
        assert raw.label.tolist() == [number % 3 for number in numbers]
    assert sorted(bad.key for bad in whole.news()) == ["007", "013"]
    shares = [
        list(islice(stream(tmp_path, Sounds(LENGTH), field="wav", rank=rank, world=2, cache_mb=cache,
                           max_bad_fraction=0.1).batches(12), 3))
        for rank in range(2)
    ]  # fmt: skip
    for raw, parts in zip(batches[2:5], zip(*shares, strict=True), strict=True):
        assert torch.equal(raw.data, torch.cat([part.data for part in parts]))
    whole.close()


@pytest.mark.parametrize("cache", [0, 64])
def test_float_arrays_keep_their_dtype(tmp_path: Path, tar_of: Callable[..., Path], cache: int) -> None:
    tar_of(tmp_path / "train" / "a.tar", [(f"{number:03d}.npy", array(number)) for number in range(20)])
    found = stream(tmp_path, Arrays(3, 5), field="npy", cache_mb=cache)
    for raw in islice(found.batches(0), 5):
        assert raw.data.dtype == torch.float32
        assert torch.equal(raw.data, (raw.index + 0.5).float().view(-1, 1, 1).expand(-1, 3, 5))
    assert found.first(2).data.shape == (2, 3, 5)
    found.close()


def test_arrays_of_numbers_are_no_images(tmp_path: Path, tar_of: Callable[..., Path]) -> None:
    tar_of(tmp_path / "train" / "a.tar", [(f"{number:03d}.npy", array(number)) for number in range(4)])
    with pytest.raises(ValueError, match=r"data\.path: no image in .* can be read"):
        Stream(ShardsConfig(path=tmp_path, size=3), split="train", batch=1, rank=0, world=1, seed=0)
