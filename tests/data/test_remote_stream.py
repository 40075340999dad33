"""A set behind a URL is the set in its folder: the same batches, the same run, and a named end where it stays away."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests import starts
from tests.data.server import Fault, Server, serving
from tests.runs import losses, saved, write_config
from trainer.data import RawBatch, ShardsConfig, Stream
from trainer.data.config import RemoteConfig
from trainer.data.index import load

SIZES = [16, 24, 12, 20, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_set: Callable[..., Path]) -> Path:
    """Five shards and two of test, with an index."""
    path = tmp_path_factory.mktemp("folder") / "set"
    write_set(path, SIZES, shape=(28, 28, 1))
    write_set(path, [12, 8], shape=(28, 28, 1), split="test")
    load(ShardsConfig(path=path, size=28, channels=1), "train")
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving() as found:
        for path in folder.rglob("*"):
            if path.is_file():
                found.files[f"set/{path.relative_to(folder)}"] = path.read_bytes()
        yield found


def batches(path: str | Path, cache: Path, *, steps: int, cache_gb: float = 1.0, **options: object) -> list[RawBatch]:
    remote = RemoteConfig(cache=cache, timeout=5, cache_gb=cache_gb)
    config = ShardsConfig(path=path, size=28, channels=1, window=2, remote=remote, **options)  # type: ignore[arg-type]
    stream = Stream(config, split="train", batch=8, rank=0, world=1, seed=5)
    try:
        return list(islice(stream.batches(0), steps))
    finally:
        stream.close()


def shard_bytes(server: Server) -> int:
    return sum(
        len(content)
        for name, content in server.files.items()
        if name.startswith("set/train/") and name.endswith(".tar")
    )


@pytest.mark.parametrize("cache_mb", [0, 64])
@pytest.mark.parametrize("room", ["all", "few"])
def test_batches_are_those_of_the_folder_also_from_a_cache_that_cannot_hold_the_set(
    server: Server, folder: Path, tmp_path: Path, cache_mb: int, room: str
) -> None:
    whole = shard_bytes(server)
    limit = 1.0 if room == "all" else 0.9 * whole / 1e9
    steps = 2 * sum(SIZES) // 8  # two epochs
    found = batches(server.url, tmp_path / "cache", steps=steps, cache_gb=limit, cache_mb=cache_mb)
    expected = batches(folder, tmp_path / "other", steps=steps, cache_mb=cache_mb)
    assert len(found) == steps
    for ours, local in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.columns, local.columns, strict=True))
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar"))
    if room == "all":
        assert kept == whole
        assert sum(server.sent(f"train/000{number}.tar") for number in range(len(SIZES))) == whole  # each once
    else:
        assert kept < whole


def test_a_run_of_two_ranks_from_a_url_is_the_run_from_the_folder(server: Server, folder: Path, tmp_path: Path) -> None:
    words = ("images=96", f"data.remote.cache={tmp_path / 'cache'}", "data.window=2")
    for name, path in (("near", str(folder)), ("far", server.url)):
        config = write_config(tmp_path / f"{name}.yaml", "vae", data=Path("unused"))
        tree = json.loads(config.read_text())
        config.write_text(json.dumps({**tree, "data": tree["data"] | {"path": path}}))
        starts.train(tmp_path / "logs", str(config), *words, world=2).wait().ok()
    near, far = losses(tmp_path / "near"), losses(tmp_path / "far")
    assert len(near) > 0 and near == far  # bit for bit
    for number in range(len(SIZES)):
        name = f"train/000{number}.tar"
        assert server.sent(name) == len(server.files[f"set/{name}"]), "two ranks of a machine fetch a shard once"


@pytest.mark.parametrize("fault", ["gone", "changed"])
def test_a_server_that_fails_in_the_middle_ends_both_ranks_with_its_name_and_a_checkpoint(
    server: Server, tmp_path: Path, fault: str
) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=Path("unused"), images=4000, checkpoint={"every": 4000})
    tree = json.loads(config.read_text())
    remote = {"cache": str(tmp_path / "cache"), "timeout": 0.5, "retries": 1, "ahead": 1}
    more = {"path": server.url, "window": 1, "remote": remote, "prefetch": 1, "readers": 1}
    config.write_text(json.dumps({**tree, "data": tree["data"] | more}))

    def spoil(path: str) -> None:
        """The fourth shard that is asked for, and all after it."""
        asked = {one.path for one in server.asked if "train/" in one.path and one.path.endswith(".tar")}
        if path.startswith("set/train/") and path.endswith(".tar") and len(asked | {path}) > 3:
            if fault == "changed":
                server.files[path] = bytes(len(server.files[path]))
            else:
                server.faults = [Fault(on=".tar", status=503, times=1000)]

    server.before = spoil
    ended = starts.train(tmp_path / "logs", str(config), world=2).wait()
    assert ended.codes == [2, 2], ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("tandem: error:")]
    assert len(lines) == 2 and len(set(lines)) == 1, ended.err
    assert f"{server.url}/train/000" in lines[0]
    assert ("503" if fault == "gone" else "changed since its index") in lines[0]
    assert "Traceback" not in ended.err
    assert len(saved(tmp_path / "run")) == 1


@pytest.mark.parametrize("window", [1, 2, "all"])
def test_a_cache_that_cannot_hold_two_windows_is_refused_before_the_first_batch(
    server: Server, tmp_path: Path, window: int | str
) -> None:
    sizes = sorted(
        len(d) for name, d in server.files.items() if name.startswith("set/train/") and name.endswith(".tar")
    )
    need = sum(sizes[-2 * window :] if isinstance(window, int) else sizes)

    def first(limit: float) -> int:
        remote = RemoteConfig(cache=tmp_path / str(limit), timeout=5, cache_gb=limit / 1e9)
        config = ShardsConfig(path=server.url, size=28, channels=1, window=window, remote=remote, cache_mb=0)  # type: ignore[arg-type]
        one = Stream(config, split="train", batch=8, rank=0, world=1, seed=5)
        try:
            return len(next(one.batches(0)).index)
        finally:
            one.close()

    with pytest.raises(ValueError, match=r"^data\.remote\.cache_gb: .* cannot hold two windows of shards of http"):
        first(need - 1)
    assert not server.of(".tar")
    assert first(need) == 8


@pytest.mark.parametrize("batch", [8, 48])
def test_an_evaluation_needs_no_more_of_the_cache_than_two_windows(
    server: Server, tmp_path: Path, folder: Path, batch: int
) -> None:
    """Also where a batch is of more shards than a window is."""
    sizes = [len(data) for name, data in server.files.items() if "set/train/" in name and name.endswith(".tar")]
    remote = RemoteConfig(cache=tmp_path, timeout=5, cache_gb=sum(sorted(sizes)[-2:]) / 1e9)
    config = ShardsConfig(path=server.url, size=28, channels=1, window=1, remote=remote, cache_mb=0)
    one = Stream(config, split="train", batch=8, rank=0, world=1, seed=5)
    assert sum(int(raw.weight.sum()) for raw in one.evaluation(batch)) == sum(SIZES)
    one.close()
