"""The whole configuration: typed, frozen, from one YAML file and dotted overrides; every error names the key.

    config = load(Path("configs/vaegan_fashion.yaml"), ["optim.lr=2e-4"])

default < file < command line. File and command line are read by one parser and checked by one schema, so a value means
the same in both: 1e-4 is a number, `on` is text, and nothing is converted behind your back.
"""

import contextlib
import dataclasses
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import TypeAdapter, ValidationError

from trainer import bounds, config_errors, config_yaml
from trainer.data import DataConfig
from trainer.kernels.choose import Impl
from trainer.methods import MethodConfig
from trainer.optimizer import OptimConfig
from trainer.parallel.config import AutoConfig, DeepSpeedConfig, ParallelConfig


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, what is kept, and how it goes on."""

    every: int = 50_000
    """Images from one checkpoint to the next; the last update is always saved, and with 0 only that one."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Whether the checkpoint with the best nll + kl on the test split is kept too, of those at whose images an
    evaluation fell: let checkpoint.every be a multiple of log.evaluate_every. A method without an ELBO has no best."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint of the run's folder, else begin. must: refuse to begin. never:
    refuse to go on. Or the path of a checkpoint: the run goes back to it, and newer ones are set aside."""
    init_from: Path | None = None
    """Checkpoint or run whose weights a new run begins with (fine-tuning), or a folder with an AutoencoderKL of
    diffusers, for method.autoencoder.kind: kl; optimiser and clock start afresh."""
    notice: float | None = None
    """Seconds from SIGTERM to the kill that follows it, as the cluster grants them (SLURM's KillWait, 30): the run
    saves on a SIGTERM only if its last save was faster than what is left of them. null: however long a save takes."""

    def __post_init__(self) -> None:
        bounds.at_least(0, self, "every")
        bounds.above_zero(self, "notice")
        if self.keep_last < 1:
            raise ValueError(f"keep_last: {self.keep_last} would keep no checkpoint; at least 1")


@dataclass(frozen=True)
class LogConfig:
    """What the board and the terminal show, and how often."""

    every: int = 5_000
    """Images from one set of scalars, and look for gradients that are not finite, to the next; at least 1."""
    pictures_every: int = 50_000
    """Images from one set of sample grids, reconstructions and interpolations to the next; 0 draws at the end only."""
    evaluate_every: int = 50_000
    """Images from one evaluation on the test split to the next; 0 evaluates at the end only."""
    evaluate_images: int = 2_000
    """Test images of an evaluation during the run; the one at the end takes all."""
    compare_every: int = 50_000
    """Images from one comparison of all ranks' weights, bit by bit, to the next; where a rank differs the run ends.
    Each checkpoint is preceded by one; 0 never compares."""
    patience: int = 50
    """Updates in a row that may be skipped for a gradient that is not finite before the run stops with an error."""
    hang_after: float = 600.0
    """Seconds without an update, a read batch or a batch of an evaluation after which the run counts as hung: the
    stacks of all ranks are saved, the one to blame is named, exit code 70. Before the first update and in a save three
    times that. 0 never."""

    def __post_init__(self) -> None:
        bounds.at_least(1, self, "every", "evaluate_images", "patience")
        bounds.at_least(0, self, "pictures_every", "evaluate_every", "compare_every", "hang_after")


@dataclass(frozen=True)
class Config:
    """One run."""

    run: Path
    """Folder of the run: checkpoints, board, pictures, the resolved config."""
    images: int
    """Budget: the run ends when it has seen so many."""
    batch: int
    """Images an update, over all ranks and micro-batches."""
    data: DataConfig
    """Where images come from."""
    method: MethodConfig
    """What is trained: vae, gan, vaegan, vaegan_larsen."""
    seed: int = 0
    """Of the weights, the order of the data, the noise, the augmentation; 64 bits with a sign."""
    micro_batch: int | None = None
    """Images a rank takes at a time; null takes its whole share of the batch. Smaller: less memory, same result."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """fp32: float32 throughout. tf32: the same, but GPUs from Ampere on may round inside convolutions and products.
    bf16: autocast for networks; losses, penalties, weights and averages stay float32. fp16: the same, with
    parallel.weights: fp16 only, which scales losses."""
    compile: bool = False
    """torch.compile of the networks; penalties run past it."""
    impl: Impl = "auto"
    """What runs losses, noise and norm + activation; the log says which and why. eager: plain torch, their definition.
    compiled: that through torch.compile; pays on GPUs for losses of large images. triton: kernels, on GPUs; pay most
    for norm + activation under bf16. auto: triton where a GPU, dtype and layout allow it, else eager. What is named and
    cannot run is an error."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimisers and averages."""
    parallel: ParallelConfig = field(default_factory=AutoConfig)
    """How ranks work together."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    log: LogConfig = field(default_factory=LogConfig)
    """Board and terminal."""

    def __post_init__(self) -> None:
        bounds.at_least(1, self, "images", "batch")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: {self.seed} has more than 64 bits; -2^63 <= seed < 2^63")
        weights = self.parallel.weights if isinstance(self.parallel, DeepSpeedConfig) else "fp32"
        if weights != "fp32" and weights != self.precision:
            raise ValueError(f"parallel.weights: {weights} needs precision: {weights}, not {self.precision}")
        if self.precision == "fp16" and weights != "fp16":
            raise ValueError(
                "precision: fp16 loses small gradients unless losses are scaled: take bf16, or "
                "parallel.kind=deepspeed parallel.weights=fp16"
            )
        if self.compile and isinstance(self.parallel, DeepSpeedConfig) and 3 in self.parallel.stages:
            raise ValueError(
                "compile: true does not go with parallel.stage: 3, whose hooks it would break; take stage 2, or false"
            )

    @property
    def updates(self) -> int:
        """Updates of the budget; the last one ends at or just beyond it."""
        return -(-self.images // self.batch)

    def share(self, world: int) -> int:
        """Images of an update on each of `world` ranks. ValueError where they do not divide."""
        if self.batch % world:
            nearest = max(1, round(self.batch / world)) * world
            raise ValueError(f"batch: {self.batch} does not divide among {world} ranks; nearest: {nearest}")
        return self.batch // world

    def micro_batches(self, world: int) -> int:
        """Micro-batches of an update on each of `world` ranks. ValueError where they do not divide."""
        share = self.share(world)
        if self.micro_batch is None:
            return 1
        if self.micro_batch < 1 or share % self.micro_batch:
            raise ValueError(
                f"micro_batch: {self.micro_batch} does not divide a rank's share of {share} images "
                f"(batch {self.batch} / {world} ranks)"
            )
        return share // self.micro_batch


RESUMABLE = (
    "run", "images", "micro_batch", "compile", "impl", "parallel", "checkpoint", "log", "optim.lr",
    "optim.discriminator.lr", "data.path", "data.readers", "data.prefetch", "data.cache_mb", "data.verify",
    "data.remote", "data.limits", "data.max_bad_fraction", "data.allow_pipe", "method.autoencoder.recompute",
    "method.generator.recompute", "method.encoder.recompute", "method.decoder.recompute",
    "method.discriminator.recompute", "method.autoencoder.scaling_factor",
)  # fmt: skip
"""Keys that may differ when a run goes on; each difference is one line in the log."""


def load(path: Path, overrides: list[str] = ()) -> Config:  # type: ignore[assignment]
    """The config in `path` with `overrides` ("optim.lr=2e-4" or "--optim.lr=2e-4") on top.

    Raises ValueError in one line: the file or "command line", the key, the nearest valid key."""
    return parse(config_yaml.read(path), overrides, source=str(path))


def parse(tree: dict[str, Any], overrides: list[str] = (), *, source: str) -> Config:  # type: ignore[assignment]
    """`load` of a tree that is already read; `source` is named in errors."""
    given = config_yaml.merge(tree, overrides)
    method = tree.get("method")
    for within, key, kind in ((tree, "data", "shards"), (tree, "parallel", "auto"), (method, "autoencoder", "conv")):
        if isinstance(within, dict) and isinstance(part := within.get(key), dict):
            part.setdefault("kind", kind)  # a union has no default of its own
    data = tree.get("data")
    if isinstance(data, dict) and data.get("allow_pipe") and {"data", "data.allow_pipe"} & set(given):
        raise ValueError("command line: data.allow_pipe: must stand in the YAML file itself")
    try:
        return _adapter().validate_json(config_yaml.to_json(tree), strict=True)
    except ValidationError as error:
        raise ValueError(config_errors.explain(error, Config, source=source, overrides=given)) from None


def to_tree(config: Config) -> dict[str, Any]:
    """The resolved config as plain values; `parse` takes it back."""
    found = _adapter().dump_python(config, mode="json")
    assert isinstance(found, dict)
    return found


def to_text(config: Config) -> str:
    """The resolved config as YAML that `load` takes back."""
    return config_yaml.write(to_tree(config))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 2e-4, ...} from a nested config."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def help_text(config: Config | None, *, program: str, usage: str) -> str:
    """Every key with its type, its meaning and the value that `config` gives it."""
    default = config if config is not None else tyro.MISSING
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(Config, default=default, prog=program, args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    return f"{usage}\n{config_errors.strip_usage(printed.getvalue())}"


def _adapter() -> "TypeAdapter[Config]":
    if not _ADAPTER:
        config_errors.forbid_unknown(Config)
        _ADAPTER.append(TypeAdapter(Config))
    return _ADAPTER[0]


_ADAPTER: list["TypeAdapter[Config]"] = []

assert dataclasses.is_dataclass(Config)
