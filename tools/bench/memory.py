"""What each backend holds and sends, predicted by trainer/parallel/costs.py and measured on real ranks.

    python -m tools.bench.memory                                    # two ranks, 115M parameters; about 5 minutes
    python -m tools.bench.memory --backends ddp,zero2 --width 32 --out memory.json
    python -m tools.bench.memory --worlds 1,2,8,64,1024             # predicted only, for an f8 autoencoder on GPUs

A VAE-GAN with R1 and R2 takes a few updates under each backend, from noise; the last of them is measured. The f8
autoencoder is of the size of Rombach et al. 2022, with their patch discriminator.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tools.bench import turns
from tools.bench.memory_rank import batch_of
from trainer import build, check_costs
from trainer import config as configuration
from trainer.check import numbers
from trainer.check_watch import watch
from trainer.config import Config
from trainer.data import Batch
from trainer.errors import boundary
from trainer.parallel import costs
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start

BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "zero3": {"kind": "deepspeed", "stage": 3},
}
ROWS = {
    "held": "tensors between updates",
    "peak": "tensors at the peak",
    "reduced": "reduced an update",
    "gathered": "gathered an update",
}
EXTRA = {"unseen": "not seen to be freed", "resident": "RSS between updates", "resident_peak": "RSS at the peak"}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backends", type=turns.names(tuple(BACKENDS)), default=list(BACKENDS), metavar="A,B",
        help=f"of {','.join(BACKENDS)}",
    )  # fmt: skip
    parser.add_argument("--width", type=int, default=256, help="of both networks; 256 makes 115M parameters")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a rank in an update (default: 1)")
    parser.add_argument("--bucket", type=int, help="elements reduced at a time (default: DeepSpeed's, 500000000)")
    parser.add_argument("--ranks", type=int, default=2, help="(default: 2)")
    parser.add_argument(
        "--worlds", type=numbers, metavar="N[,N...]", help="predict these numbers of ranks, and start none"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args(argv)


def pair(backend: str, *, width: int, ranks: int, micro_batches: int, file: Path | None) -> dict[str, Any]:
    """A config's tree: 16 x 16 images, 4 a micro-batch, most weights in blocks of the two lowest resolutions."""
    pyramid = {"kind": "conv", "width": width, "multipliers": [2, 4], "blocks": 2, "latent": 4, "latent_shape": "map"}
    return {
        "run": "unused",
        "images": 1000,
        "batch": 4 * micro_batches * ranks,
        "micro_batch": 4,
        "data": {"kind": "shards", "path": "unused", "size": 16, "channels": 3},
        "method": {
            "kind": "vaegan",
            "autoencoder": pyramid,
            "discriminator": {"kind": "global", "width": width, "multipliers": [1, 2, 4]},
            "critic": {"loss": "relativistic", "r1": 0.2, "r2": 0.2},
        },
        "parallel": BACKENDS[backend] | ({"file": str(file)} if file is not None and backend != "ddp" else {}),
    }


def f8(file: Path | None, *, micro_batches: int) -> dict[str, Any]:
    """As large as that of Rombach et al. 2022, with the PatchGAN of Isola et al. 2017; 32 pixels will do to count."""
    pyramid = {"kind": "conv", "width": 136, "multipliers": [1, 2, 4, 4], "blocks": 3, "latent": 4}
    return {
        "run": "unused",
        "images": 1000,
        "batch": 2 * micro_batches,
        "micro_batch": 2,
        "data": {"kind": "shards", "path": "unused", "size": 32, "channels": 3},
        "method": {
            "kind": "vaegan",
            "autoencoder": pyramid | {"latent_shape": "map"},
            "discriminator": {"kind": "patch"},
        },
        "parallel": {"kind": "deepspeed"} | ({} if file is None else {"file": str(file)}),
    }


def simulate(tree: dict[str, Any], sizes: list[int]) -> None:
    config = configuration.parse(tree, source="f8")
    networks, _ = watched(config, start(DDPConfig()), world=1)
    print(", ".join(f"{name} {network.size:,} parameters" for name, network in networks.items()))
    print("MB a rank at the peak of an update, without activations / between updates / sent in an update")
    table = check_costs.worlds([networks, networks], config.parallel, sizes, lazy=1, cpu=False)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def watched(config: Config, ranks: Ranks, *, world: int) -> tuple[dict[str, costs.Network], int]:
    """The networks as an update uses them, and bytes of activations, from two updates on this process."""
    method = build.build_method(config, device=ranks.device)
    networks = build.build_networks(method, seed=config.seed)

    def batches() -> Iterator[Batch]:
        for update in range(2):
            yield batch_of(config, ranks.device, update, rank=0, world=world)

    seen = watch(config, method, networks, ranks, batches(), world=world, images=0)
    return seen.networks[0], seen.activations


def predicted(config: Config, networks: Mapping[str, costs.Network], activations: int, *, world: int) -> dict[str, int]:
    backends = {name: costs.backend(config.parallel, name, cpu=not torch.cuda.is_available()) for name in networks}
    parts = {name: costs.memory(network, backends[name], world=world) for name, network in networks.items()}
    held, peak = costs.total(parts, activations=activations)
    whole = costs.summed({name: costs.whole(network, backends[name]) for name, network in networks.items()})
    return {
        "held": held,
        "peak": peak,
        "reduced": whole.all_reduce + whole.reduce_scatter,
        "gathered": whole.all_gather,
    }


def measured(tree: Mapping[str, Any], *, ranks: int) -> dict[str, Any]:
    """Figures of a start: of the rank that held most, as partitions differ; what is sent is alike."""
    with tempfile.TemporaryDirectory(prefix="tandem-memory-") as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(tree))
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        ended = subprocess.run(
            [sys.executable, *command, "-m", "tools.bench.memory_rank", str(job), folder],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ended.returncode:
            raise RuntimeError(ended.stderr)
        each: list[dict[str, Any]] = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    found = max(each, key=lambda figures: int(figures["allocated_peak"]))
    assert found["world"] == ranks
    sent = found["sent"]
    found["held"], found["peak"] = found["live"], found["allocated_peak"]
    found["unseen"] = max(0, found["allocated"] - found["live"])
    found["reduced"] = sum(size for name, size in sent.items() if "reduce" in name)
    found["gathered"] = sum(size for name, size in sent.items() if "gather" in name)
    return found


def main(argv: list[str]) -> int:
    given = parse(argv)
    torch.set_num_threads(1 if given.worlds is None else torch.get_num_threads())
    rows = []
    with tempfile.TemporaryDirectory(prefix="tandem-memory-") as folder:
        file = None
        if given.bucket is not None:
            file = Path(folder) / "deepspeed.json"
            file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": given.bucket}}))
        if given.worlds is not None:
            simulate(f8(file, micro_batches=given.micro_batches), given.worlds)
            return 0
        shape = {"width": given.width, "ranks": given.ranks, "micro_batches": given.micro_batches, "file": file}
        trees = {backend: pair(backend, **shape) for backend in given.backends}
        configs = {name: configuration.parse(json.loads(json.dumps(tree)), source=name) for name, tree in trees.items()}
        ranks = start(DDPConfig())
        networks, activations = watched(next(iter(configs.values())), ranks, world=given.ranks)
        size = sum(network.size for network in networks.values())
        print(f"{size:,} parameters, {activations / 1e6:,.0f} MB of activations, {given.ranks} ranks, MB a rank")
        print(f"{'':8} {'':24} {'predicted':>10} {'measured':>10} {'ratio':>6}")
        for name, tree in trees.items():
            said = predicted(configs[name], networks, activations, world=given.ranks)
            found = measured(tree, ranks=given.ranks)
            for key, text in ROWS.items():
                ratio = f"{found[key] / said[key]:6.3f}" if said[key] else ""
                print(f"{name:8} {text:24} {said[key] / 1e6:10,.0f} {found[key] / 1e6:10,.0f} {ratio}")
            for key, text in (
                ("live", "seen by gc between"),
                ("resident", "RSS between"),
                ("resident_peak", "RSS peak"),
            ):
                print(f"{name:8} {text:24} {'':10} {found[key] / 1e6:10,.0f}", flush=True)
            rows.append({"backend": name, "predicted": said, "measured": found})
    if given.out is not None:
        where = turns.where(["python -m tools.bench.memory", *argv], ("torch", "deepspeed", "accelerate"))
        given.out.write_text(json.dumps({**where, "parameters": size, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))
