"""What every test runs under: one thread a process, no waiting loops, no network for model hubs. And the data."""

import os
from pathlib import Path

import pytest

# Before torch is imported: OpenMP's threads of several processes on the same cores wait for each other otherwise.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on CPU tensors

ROOT = Path(__file__).parent.parent
FEW = 600  # training images of the small set; a third as many to test on


@pytest.fixture(scope="session")
def fashion() -> Path:
    """Fashion-MNIST as shards: data/fashion-mnist, made where it is missing."""
    from tools.shards.make import main as make

    folder = ROOT / "data" / "fashion-mnist"
    if not all((folder / split / "index.json").exists() for split in ("train", "test")):
        assert make(["fashion-mnist", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def few(fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of Fashion-MNIST as shards of their own, so that a run does not decode 70,000 at its start."""
    from PIL import Image

    from tools.shards.make import main as make
    from trainer.data import ShardsConfig, Stream

    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", FEW), ("test", FEW // 3)):
        stream = Stream(ShardsConfig(path=fashion, size=28, channels=1), split=split, batch=1, rank=0, world=1, seed=0)
        raw = stream.first(count)
        stream.close()
        for number, (image, label) in enumerate(zip(raw.data.numpy(), raw.label.tolist(), strict=True)):
            path = folder / "images" / split / stream.classes[label] / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[:, :, 0]).save(path)
    shards = folder / "shards"
    arguments = ["folder", str(folder / "images"), str(shards), "--splits", "train,test", "--workers", "1"]
    assert make([*arguments, "--shard-size", "100KB"]) == 0
    return shards


@pytest.fixture(scope="session")
def shipped(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: configs/, few images as data/fashion-mnist, and a short run of each shipped config."""
    import shutil

    from tests import starts

    folder = tmp_path_factory.mktemp("shipped")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(few, folder / "data" / "fashion-mnist")
    for config in sorted((ROOT / "configs").glob("*.yaml")):
        overrides = (*starts.SHORT, *starts.small(config.name))
        starts.tandem(folder / "logs", "train", f"configs/{config.name}", *overrides, cwd=folder).ok()
    return folder
