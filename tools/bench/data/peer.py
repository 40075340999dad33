"""A stream of another library, in a process of its own: they need other imports and settings than ours.

    python -m tools.bench.data.peer NAME FIELD BATCH FILES WORK pillow|bare

Writes what is in FILES in the library's own format to WORK. Then for each line "COUNT" of its input it takes so many
batches and says "@ CPU-SECONDS".
"""

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tools.bench.data.loaders import bare_decoder, from_loader, pillow
from tools.bench.data.sets import KINDS, Kind
from tools.bench.turns import Turn

Decode = Callable[[bytes], NDArray[np.uint8]]


def litdata(kind: Kind, batch: int, files: list[Path], work: Path, decode: Decode) -> Turn:
    """Its README: optimize, StreamingDataset, StreamingDataLoader; arrays are stored as arrays, the rest as bytes."""
    import litdata

    litdata.optimize(
        fn=stored_of(kind), inputs=[str(path) for path in files], output_dir=str(work), chunk_bytes="64MB",
        num_workers=1, start_method="fork", verbose=False,
    )  # fmt: skip

    def transform(item: dict[str, Any]) -> tuple[torch.Tensor, int]:
        return decoded(item["image"], kind, decode), item["label"]

    dataset = litdata.StreamingDataset(str(work), shuffle=True, drop_last=True, transform=transform)
    return from_loader(litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=0, shuffle=True))


def stored_of(kind: Kind) -> Callable[[str], dict[str, Any]]:
    """What is stored of a file."""
    return array_item if kind.field == "npy" else bytes_item


def array_item(path: str) -> dict[str, Any]:
    return {"image": np.load(path), "label": int(Path(path).stem) % 10}


def bytes_item(path: str) -> dict[str, Any]:
    return {"image": Path(path).read_bytes(), "label": int(Path(path).stem) % 10}


def mosaicml(kind: Kind, batch: int, files: list[Path], work: Path, decode: Decode) -> Turn:
    """Its README: MDSWriter, StreamingDataset, DataLoader; arrays are stored as arrays, the rest as bytes."""
    _stand_in_for_torchvision()
    import streaming

    stored = f"ndarray:uint8:{kind.side},{kind.side}" if kind.field == "npy" else "bytes"
    with streaming.MDSWriter(out=str(work), columns={"image": stored, "label": "int"}) as writer:
        for path in files:
            writer.write(stored_of(kind)(str(path)))

    class Images(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
            item = super().__getitem__(index)
            return decoded(item["image"], kind, decode), item["label"]

    dataset = Images(local=str(work), shuffle=True, batch_size=batch)
    return from_loader(torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=0, drop_last=True))


def decoded(image: Any, kind: Kind, decode: Decode) -> torch.Tensor:
    return torch.from_numpy(np.array(image) if kind.field == "npy" else decode(bytes(image)))


def _stand_in_for_torchvision() -> None:
    """streaming imports torchvision for vision data sets that are not used here; it does not load beside our torch."""
    modules = {}
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
        module: Any = types.ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        sys.modules[name] = modules[name.rpartition(".")[2]] = module
    modules["torchvision"].transforms = modules["transforms"]
    modules["torchvision"].datasets = modules["datasets"]
    modules["transforms"].functional = modules["functional"]
    modules["functional"].to_tensor = None
    modules["datasets"].VisionDataset = object


PEERS: dict[str, Callable[[Kind, int, list[Path], Path, Decode], Turn]] = {"litdata": litdata, "mosaicml": mosaicml}
MODULES = {"litdata": "litdata", "mosaicml": "streaming"}
"""What has to be installed."""


def main(argv: list[str]) -> int:
    name, field, batch, files, work, decoder = argv
    kind = next(kind for kind in KINDS.values() if kind.field == field)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries say
    torch.set_num_threads(1)
    decode = bare_decoder(kind) if decoder == "bare" else lambda data: pillow(data, kind)
    turn = PEERS[name](kind, int(batch), sorted(Path(files).iterdir()), Path(work), decode)
    for line in sys.stdin:
        answers.write(f"@ {turn(int(line))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
