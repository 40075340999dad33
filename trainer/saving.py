"""A run's state by name, to and from its folder: what a checkpoint holds, and what must fit when a run goes on."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint, config_yaml, interchange, resume
from trainer import config as configuration
from trainer.build import image_shape
from trainer.config import Config
from trainer.data import Stream
from trainer.health import NonFinite
from trainer.networks import KLAutoencoderConfig
from trainer.parallel.engine import Engine
from trainer.parallel.ranks import Ranks
from trainer.phase import Run

BEST = "metrics.nelbo"  # the ELBO's negative, of the evaluations during the run: one count of images, so they compare


class Saver:
    """Saves and restores everything that the next update depends on: weights, averages, optimisers, balance, the
    clock."""

    def __init__(
        self,
        config: Config,
        *,
        ranks: Ranks,
        engines: Mapping[str, Engine],
        run: Run,
        nonfinite: NonFinite,
        stream: Stream,
    ) -> None:
        self.config, self.ranks, self.engines, self.run = config, ranks, engines, run
        self.nonfinite, self.stream = nonfinite, stream
        self.said: list[str] = []
        """Lines for the log: what was resumed from, what was damaged, what changed."""
        self.seconds = 0.0
        """Training time before this start."""
        self.path: Path | None = None
        """The newest checkpoint, on every rank."""
        self.images: int | None = None
        """That `path` has seen."""
        self.save_seconds: float | None = None
        """That the last save took; None: not known."""
        self.owed: list[str] = []
        """What was left out when that which was restored was saved in a hurry: evaluate, pictures."""

    def restore(self) -> int:
        """Images seen by what the config says to go on from; 0 for a new run. A collective.

        ValueError on every rank where that is damaged, of another model, or of another config."""
        path = self.ranks.together(self._choose)
        if path is not None:
            found = checkpoint.load(Path(path), verify=False)  # `choose` has just read every byte
            images = self._take(found)
            self.path, self.images = Path(path), images
        else:
            images = 0
            if self.config.checkpoint.init_from is not None:
                self._initialise(self.config.checkpoint.init_from)
        self.ranks.together(self._write_config)
        return images

    def save(self, images: int, *, metrics: Mapping[str, float], seconds: float, owed: Sequence[str] = ()) -> None:
        """A collective: returns on all ranks when the checkpoint is whole. seconds: of training in this start. owed:
        what is due at these images and was left out."""
        began = time.monotonic()
        tensors = self._tensors()
        state: dict[str, Any] = {
            "images": images,
            "data": self.stream.fingerprint,
            "classes": list(self.stream.classes),
            "world": self.ranks.world,
            "seconds": self.seconds + seconds,
            "skipped": self.nonfinite.export(),
            "metrics": dict(metrics),
            "owed": list(owed),
        }
        self.path = Path(self.ranks.together(lambda: self._write(images, tensors, state)))
        self.images, self.save_seconds = images, time.monotonic() - began

    def too_late(self, spent: float) -> bool:
        """A collective: whether the last save took longer than what `checkpoint.notice` leaves, `spent` seconds after
        a SIGTERM."""
        notice = self.config.checkpoint.notice
        if notice is None:
            return False
        return self.ranks.largest(int((self.save_seconds or 0.0) > notice - spent)) > 0

    # ------------------------------------------------------------------ rank 0
    def _choose(self) -> str | None:
        settings = self.config.checkpoint
        checkpoint.room_for(
            self.config.run, self._expected_bytes(), keep_last=settings.keep_last, keep_best=settings.keep_best
        )
        path = checkpoint.choose(self.config.run, settings.resume, log=self.said.append)
        return None if path is None else str(path)

    def _write(self, images: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> str:
        text = configuration.to_text(self.config)
        path = checkpoint.save(self.config.run, images=images, tensors=tensors, state=state, config_text=text)
        settings = self.config.checkpoint
        checkpoint.retain(self.config.run, keep_last=settings.keep_last, best=BEST if settings.keep_best else None)
        return str(path)

    def _write_config(self) -> None:
        path = self.config.run / "config.yaml"
        aside = path.with_name(".config.yaml")
        aside.write_text(configuration.to_text(self.config), encoding="utf-8")
        aside.replace(path)

    def _expected_bytes(self) -> int:
        moments = 1 if self.config.optim.algorithm == "sgd" else 2
        total = 0
        for engine in self.engines.values():
            total += checkpoint.size_bytes({"": engine.state}) * (1 + moments + engine.averaged)
        return total

    # ------------------------------------------------------------------ every rank
    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        found = {
            f"{name}.{part}" if part else name: tensors
            for name, engine in self.engines.items()
            for part, tensors in engine.export().items()
        }
        found["balance"] = self.run.balance.export()
        return {name: tensors for name, tensors in found.items() if tensors}

    def _take(self, found: checkpoint.Checkpoint) -> int:
        source = str(found.path / "config.yaml")
        # through today's schema: a key that came later has the value that the run had then, its default
        old = configuration.parse(config_yaml.loads(found.config_text, source=source), source=source)
        if old.method.kind != self.config.method.kind:
            raise ValueError(
                f"resume: {found.path} is a checkpoint of another model (method.kind: {old.method.kind} -> "
                f"{self.config.method.kind}); give the run another folder"
            )
        changes = resume.refuse_changes(
            configuration.to_tree(old), configuration.to_tree(self.config), configuration.RESUMABLE
        )
        if found.state["data"] != self.stream.fingerprint:
            paths = ", ".join(str(one.path) for one in self.config.data.sets)
            raise ValueError(
                f"data.path: {paths} does not hold the shards that {found.path} was trained on; "
                "give these back, or start a new run with checkpoint.init_from"
            )
        for name, engine in self.engines.items():
            try:
                engine.load(_parts(found.tensors, name))
            except ValueError as error:
                raise ValueError(f"{found.path}: {name}: {error}") from None
        self.run.balance.load(found.tensors.get("balance", {}), self.ranks.device)
        skipped, seconds, world = found.state["skipped"], found.state["seconds"], found.state["world"]
        assert isinstance(skipped, dict) and isinstance(seconds, float)
        self.nonfinite.load({name: int(count) for name, count in skipped.items()})
        self.seconds = seconds
        owed = found.state.get("owed", [])
        assert isinstance(owed, list)
        self.owed = list(map(str, owed))
        if self.ranks.rank == 0:
            self.said.append(f"goes on from {found.path} at {found.images:,} images")
            self.said += [f"changed since then: {line}" for line in changes]
            if world != self.ranks.world:
                self.said.append(f"changed since then: {world} -> {self.ranks.world} processes; the batch stays")
        return found.images

    def _initialise(self, source: Path) -> None:
        if interchange.is_theirs(source):
            self._initialise_from_diffusers(source)
            return
        path = self.ranks.together(lambda: str(_newest(source)))
        found = checkpoint.load(Path(path))
        for name, engine in self.engines.items():
            parts = _parts(found.tensors, name)
            weights = parts.get("ema", parts.get("", {}))  # fine-tuning begins with the weights that are used
            try:
                start = {"": weights} | ({"ema": weights} if engine.averaged else {})
                engine.load(start)
            except ValueError as error:
                raise ValueError(f"checkpoint.init_from: {path}: {name}: {error}") from None
        if self.ranks.rank == 0:
            self.said.append(f"begins with the weights of {path}")

    def _initialise_from_diffusers(self, source: Path) -> None:
        """The autoencoder's weights; what diffusers' has no place for, and the discriminator, stay new."""
        mine = getattr(self.config.method, "autoencoder", None)
        if not isinstance(mine, KLAutoencoderConfig):
            raise ValueError(
                f"checkpoint.init_from: {source} is a model of diffusers; method.autoencoder.kind: kl begins with one"
            )
        engine, image = self.engines["autoencoder"], image_shape(self.config)
        try:
            weights, theirs = interchange.read(source, config=mine, image=image)
            new = self._scales(engine)
            engine.load({"": weights | new} | ({"ema": weights | new} if engine.averaged else {}))
        except ValueError as error:
            raise ValueError(f"checkpoint.init_from: {error}") from None
        if self.ranks.rank == 0:
            self.said.append(f"begins with the autoencoder of {source}, from diffusers")
            scale = theirs.get("scaling_factor", mine.scaling_factor)
            if scale != mine.scaling_factor:
                self.said.append(
                    f"its scaling_factor is {scale:g}, method.autoencoder.scaling_factor {mine.scaling_factor:g}"
                )

    @staticmethod
    def _scales(engine: Engine) -> dict[str, Tensor]:
        """A learned log-scale as it begins, 0."""
        return {name: torch.zeros(engine.state[name].shape) for name in interchange.OURS if name in engine.state}


def _newest(source: Path) -> Path:
    """`source` itself where it is a checkpoint, else the newest whole one of that run."""
    if (source / "manifest.json").exists():
        return source
    if not source.is_dir():
        raise ValueError(f"checkpoint.init_from: {source}: no such run or checkpoint")
    found = checkpoint.newest(source)
    if found is None:
        raise ValueError(f"checkpoint.init_from: {source} holds no checkpoint")
    return found


def _parts(tensors: Mapping[str, Mapping[str, Tensor]], name: str) -> dict[str, Mapping[str, Tensor]]:
    """{"": weights, "ema": ..., "optimizer": ...} of one network."""
    return {
        key.removeprefix(name).removeprefix("."): value
        for key, value in tensors.items()
        if key == name or key.startswith(f"{name}.")
    }
