"""tandem check CONFIG [key=value ...] [--processes N]

Says what a config would do, without training: sizes, cost, memory, batches; tries two updates and a checkpoint.
"""

import argparse
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainer import build, checkpoint
from trainer import config as configuration
from trainer.config import Config
from trainer.data import Stream, Transform, to_device
from trainer.health import NonFinite
from trainer.methods import Method
from trainer.parallel.config import DDPConfig
from trainer.parallel.engine import Engine
from trainer.parallel.ranks import Ranks, start
from trainer.phase import Run
from trainer.saving import Saver
from trainer.step import means, train_step

EXAMPLE = """\
example:
  tandem check configs/vaegan_fashion.yaml --processes 2 batch=128
"""


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations of the matrix products and convolutions inside, by torch's formulas; a product is two.

    torch's own FlopCounterMode follows modules with hooks that an autograd.grad at a module's input refuses."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


class SavedBytes:
    """Bytes of the tensors that autograd keeps for backward, each storage once, at their peak."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in parameters}
        self._alive: Counter[int] = Counter()
        self._bytes = 0
        self.peak = 0

    def pack(self, tensor: Tensor) -> "_Kept":
        return _Kept(self, tensor)

    def unpack(self, kept: "_Kept") -> Tensor:
        return kept.tensor

    def add(self, key: int, size: int, times: int) -> None:
        """times: 1 for a tensor that begins to be kept, -1 for one that is let go."""
        if key in self._known:
            return
        before = self._alive[key] > 0
        self._alive[key] += times
        self._bytes += size * ((self._alive[key] > 0) - before)
        self.peak = max(self.peak, self._bytes)


class _Kept:
    """What autograd holds for a saved tensor; it goes when the graph does, whether it was used or not."""

    def __init__(self, saved: SavedBytes, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.saved, self.tensor, self.key, self.size = saved, tensor, storage.data_ptr(), storage.nbytes()
        saved.add(self.key, self.size, 1)

    def __del__(self) -> None:
        self.saved.add(self.key, self.size, -1)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem check",
        description="Says what a config would do, without training, and tries two updates and a checkpoint.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--processes", type=int, metavar="N", help="ranks to plan for (default: the config's, or 1)")
    options = parser.parse_intermixed_args(argv)
    config = configuration.load(options.config, options.overrides)
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes: {options.processes} is not a number of processes; 1 is the least")
    world = options.processes or config.parallel.processes or 1
    rows = check(config, world=world)
    table = Table(title=str(options.config), show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    return 0


def check(config: Config, *, world: int) -> dict[str, str]:
    """What `tandem check` prints: name -> figure with its unit. Two updates of one rank's share are taken for real."""
    micro_batches, share = config.micro_batches(world), config.share(world)
    ranks = start(DDPConfig(processes=1))
    try:
        # the batches of one rank among `world`; without the others the updates are this rank's alone
        train, test = (
            Stream(config.data, split=split, batch=config.batch, rank=0, world=world, seed=config.seed)
            for split in ("train", "test")
        )
        method = build.build_method(config, device=ranks.device)
        networks = build.build_networks(method, seed=config.seed)
        engines = build.build_engines(dataclasses.replace(config, compile=False), method, networks, ranks)
        run = Run(engines, seed=config.seed, balance=method.balance, precision=config.precision)
        parameters = [p for network in networks.values() for p in network.parameters()]

        saved, batches, costs = SavedBytes(parameters), train.batches(0), list[int]()
        transform = Transform.training(config.data, seed=config.seed)
        for update in range(2):
            given = to_device(next(batches), device=ranks.device, transform=transform)
            parts = build.split(given, micro_batches)
            images = _late(config, method) + update * config.batch
            with Flops() as flops, saved_tensors_hooks(saved.pack, saved.unpack):
                train_step(method, engines, parts, run, images=images, batch=config.batch, ranks=ranks)
            costs.append(flops.total)
        losses = means(run.kept, ranks)
        state = sum(_bytes(engine.export()) for engine in engines.values())
        gradients = sum(p.numel() * p.element_size() for p in parameters)
        image = build.image_shape(config)
        rows = {
            "method": config.method.kind,
            "networks": ", ".join(
                f"{name} {sum(p.numel() for p in network.parameters()):,} parameters"
                for name, network in networks.items()
            ),
            "image": f"{image.channels} x {image.height} x {image.width}",
            "latent": " x ".join(map(str, method.latent_size)),
            "global batch": f"{config.batch} images: {_count(world, 'rank')} x "
            f"{_count(micro_batches, 'micro-batch')} of {share // micro_batches}",
            "budget": f"{config.images:,} images, {config.updates:,} updates, "
            f"{config.images / train.samples:.1f} epochs",
            "an epoch": f"{train.samples:,} images; {test.samples:,} to test on",
            "cost": _cost(costs, lazy=_lazy(method), share=share),
            "memory a rank": f"{(state + gradients + saved.peak) / 1e6:,.1f} MB: state {state / 1e6:,.1f}, "
            f"gradients {gradients / 1e6:,.1f}, activations {saved.peak / 1e6:,.1f}",
            "two updates": ", ".join(
                f"{name.removeprefix('loss/')} {value:.4g}"
                for name, value in losses.items()
                if name.startswith("loss/")
            ),
            "a checkpoint": _try_checkpoint(config, ranks, engines, run, train),
        }
        hint = config.method.likelihood.hint(image.channels) if hasattr(config.method, "likelihood") else None
        if hint is not None:
            rows["hint"] = hint
        train.close()
        test.close()
        return rows
    finally:
        ranks.close()


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{plural}"


def _lazy(method: Method) -> int:
    """Updates from one penalty to the next."""
    critic = getattr(method, "critic", None)
    return 1 if critic is None else int(critic.lazy)


def _late(config: Config, method: Method) -> int:
    """Images seen at which every phase and term takes part: past all ramps, and a penalty in the first update."""
    period = config.batch * _lazy(method)
    return -(-config.images // period) * period


def _cost(updates: list[int], *, lazy: int, share: int) -> str:
    """updates: operations of one with the penalties and of the next, which has none where the interval is longer."""
    total = (updates[0] + (lazy - 1) * updates[1]) / lazy
    note = f"; the mean of {lazy} updates, one of them with penalties" if lazy > 1 else ""
    return f"{total / share / 1e6:,.1f} MFLOPs an image, forward and backward of all phases{note}"


def _bytes(groups: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for group in groups.values() for t in group.values())


def _try_checkpoint(config: Config, ranks: Ranks, engines: Mapping[str, Engine], run: Run, stream: Stream) -> str:
    """Writes and reads one where the run's would lie, and leaves nothing behind."""
    existing = next(path for path in [config.run, *config.run.parents] if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".tandem-check-", dir=existing) as folder:
        trial = dataclasses.replace(config, run=Path(folder))
        watch = NonFinite(patience=config.log.patience)
        saver = Saver(trial, ranks=ranks, engines=engines, run=run, nonfinite=watch, stream=stream)
        saver.save(0, metrics={}, seconds=0.0)
        assert saver.path is not None
        checkpoint.load(saver.path)
        size = sum(path.stat().st_size for path in saver.path.iterdir())
    kept = config.checkpoint
    needed, room = checkpoint.needs(config.run, size, keep_last=kept.keep_last, keep_best=kept.keep_best)
    return (
        f"{size / 1e6:,.1f} MB, written and read; the run needs {needed / 1e6:,.1f} MB for its checkpoints, "
        f"there are {room / 1e6:,.1f} MB"
    )
