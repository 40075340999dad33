"""What the ranks of a run find out about each other. Every probe returns JSON; the tests compare the ranks' answers."""

import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.parallel.cases import BATCH, METHODS, SIZE, UPDATES, Small, global_batch, make_config, rank_share, small
from trainer import build, show
from trainer.data import Batch
from trainer.health import NonFinite
from trainer.losses.augment import draws
from trainer.losses.balance import Term
from trainer.parallel.ranks import Ranks
from trainer.phase import Run
from trainer.step import train_step

PIXELS = SIZE * SIZE


def digest(tensors: Iterable[Tensor]) -> str:
    """Of every bit."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def weights(made: Small) -> dict[str, str]:
    return {name: digest(engine.network.parameters()) for name, engine in made.engines.items()}


# ---------------------------------------------------------------- F2-1: buffers
class Scaled(nn.Module):
    """A plain buffer that the forward uses and changes."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale = self.scale.lerp(x.detach().square().mean().sqrt(), 0.1)
        return x / self.scale


class Critic(nn.Module):
    """Image (B, 1, 8, 8) -> logits (B,), with whatever `kind` names between two linear layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        wrap: Callable[[nn.Module], nn.Module] = spectral_norm if kind == "spectral_norm" else lambda layer: layer
        middle = {"batch_norm": nn.BatchNorm1d(16), "plain": Scaled()}.get(kind, nn.Identity())
        self.body = nn.Sequential(
            nn.Flatten(), wrap(nn.Linear(PIXELS, 16)), middle, nn.LeakyReLU(0.2), wrap(nn.Linear(16, 1)), nn.Flatten(0)
        )

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.body(image)
        return out


def buffers(ranks: Ranks) -> dict[str, Any]:
    """Three updates of a game whose discriminator has buffers and runs twice before one backward (the penalty's pass
    is the second): finite, and equal on all ranks once exported."""
    found: dict[str, Any] = {}
    for kind in ("batch_norm", "spectral_norm", "plain"):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(4, PIXELS), nn.BatchNorm1d(PIXELS), nn.Unflatten(1, (1, SIZE, SIZE)))
        generator.latent_size = (4,)  # type: ignore[assignment]
        config = make_config("gan_wasserstein", "adam", 1, ranks.world)
        made = small(config, ranks, networks={"generator": generator, "discriminator": Critic(kind)})
        for number in range(3):
            made.update(number)
        live = {name: engine.network for name, engine in made.engines.items()}
        before = {name: digest(network.buffers()) for name, network in live.items()}
        exported = {name: engine.export() for name, engine in made.engines.items()}
        average = made.engines["generator"].evaluated()
        found[kind] = {
            "finite": all(
                bool(torch.isfinite(p).all()) for network in live.values() for p in network.state_dict().values()
            ),
            "before": before,
            "after": {name: digest(network.buffers()) for name, network in live.items()},
            "average": digest(average.buffers()),
            "exported": {name: digest(parts[""].values()) for name, parts in exported.items()},
            "tracked": int(dict(live["generator"].named_buffers())["1.num_batches_tracked"]),
            "weights": weights(made),
        }
    return found


# ---------------------------------------------------------------- F2-2, F2-3: reductions
def reductions(ranks: Ranks) -> dict[str, Any]:
    """Buckets that each phase reduces, a network, with 1 and 4 micro-batches; and what a generator's update leaves in
    the discriminator."""
    found: dict[str, Any] = {}
    for accumulate in (1, 4):
        made = small(make_config("gan", "sgd", accumulate, ranks.world), ranks)
        counts = dict.fromkeys(made.engines, 0)
        if ranks.world > 1:
            for name, engine in made.engines.items():
                engine.wrapped.register_comm_hook(None, _counting(counts, name))  # type: ignore[attr-defined]
        parts = build.split(rank_share(global_batch(0), ranks), accumulate)
        for phase in ("generator", "discriminator"):
            before = dict(counts)
            made.run.end()
            _only(made, phase, parts)
            found[f"{phase}/{accumulate}"] = {name: counts[name] - before[name] for name in counts}
            held = [p.grad is not None for engine in made.engines.values() for p in engine.network.parameters()]
            found[f"{phase}/{accumulate}/held"] = sum(held)
    return found


def _counting(counts: dict[str, int], name: str) -> Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]:
    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        counts[name] += 1
        buffer = bucket.buffer() / dist.get_world_size()
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])

    return hook


def _only(made: Small, phase: str, parts: list[Batch]) -> None:
    """The update of one network alone."""
    made.method.phases = lambda images: (phase,)  # type: ignore[method-assign]
    train_step(made.method, made.engines, parts, made.run, images=0, batch=BATCH, ranks=made.ranks)
    del made.method.phases


# ---------------------------------------------------------------- F2-4: the weight
class Blind(nn.Module):
    """Logits that no image changes."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        return 0.0 * image.flatten(1).sum(1) + self.bias


def adaptive_weight(ranks: Ranks) -> dict[str, Any]:
    """The adaptive weight that this rank used in each update, before any mean over ranks."""
    found: dict[str, Any] = {}
    for method in ("vaegan_output", "vaegan_last_layer"):
        for blind in (False, True):
            tree = METHODS[method] | ({"critic": {"loss": "hinge"}} if blind else {})
            networks = {"discriminator": Blind()} if blind else {}
            made = small(make_config(tree, "adam", 1, ranks.world), ranks, networks=networks)
            used = []
            for number in range(UPDATES):
                made.run.kept.clear()
                made.update(number)
                used.append([float(value) for value in made.run.kept.get("weight/adversarial", [])])
            found[f"{method}{'/blind' if blind else ''}"] = used
            found[f"{method}/ceiling"] = made.method.balance.config.ceiling
    return found


# ---------------------------------------------------------------- F2-6: the rate
def rates(ranks: Ranks) -> dict[str, list[float]]:
    """Learning rates that ten updates really used, a network."""
    optim = {"decay": "linear", "hold": 0.0, "floor": 0.0, "lr": 1e-3, "discriminator": {"lr": 4e-3}}
    made = small(make_config("gan", "adam", 2, ranks.world, images=10 * BATCH, optim=optim), ranks)
    found: dict[str, list[float]] = {name: [] for name in made.engines}
    for number in range(10):
        made.update(number)
        for name, engine in made.engines.items():
            found[name].append(engine.optimizer.param_groups[0]["lr"])  # type: ignore[attr-defined]
    return found


# ---------------------------------------------------------------- F2-7: noise
def draws_of(ranks: Ranks) -> dict[str, Any]:
    """A digest of each row of noise of the first three updates, the initial weights and a fixed-seed sheet."""
    made = small(make_config("gan", "adam", 1, ranks.world), ranks)
    found: dict[str, Any] = {"weights": weights(made)}
    networks = build.averages(made.engines)
    found["sheet"] = digest([show.samples(made.method, networks, show.latents(made.method, 6, device=ranks.device))])
    streams: dict[str, list[str]] = {"latent": [], "posterior": [], "mix": [], "augment": []}
    for number in range(3):
        batch = rank_share(global_batch(number), ranks)
        made.run.begin("generator", batch, images=number * BATCH, last=True, share=True, count=len(batch.image))
        for stream in ("latent", "posterior"):
            streams[stream] += [digest([row]) for row in made.run.normal(stream, (4,))]
        streams["mix"] += [digest([row]) for row in made.run.uniform("critic/mix")]
        for name, drawn in draws(made.run.uniform, ("color", "translation", "cutout")).items():
            streams["augment"] += [f"{name} {digest([row])}" for row in drawn]
    found["streams"] = streams
    return found


# ---------------------------------------------------------------- non-finite on one rank
def nonfinite(ranks: Ranks) -> dict[str, Any]:
    """One sample of the last rank has an infinite loss in update `bad`: what all ranks do about it."""
    found: dict[str, Any] = {}
    for method in ("gan", "vaegan_output", "vaegan_larsen", "vae"):
        for optim, bad in (("sgd", 0), ("adam", 0), ("adam", 2)):
            made = small(make_config(method, optim, 1, ranks.world), ranks)
            watch = NonFinite(patience=3)
            for number in range(bad):
                made.update(number)
            made.run.kept.clear()
            before = weights(made)
            _poisoned(made, bad)
            watch.look(made.run.kept, images=BATCH)
            made.run.kept.clear()
            after = weights(made)
            made.update(bad + 1)
            largest = [p.detach().abs().max() for e in made.engines.values() for p in e.network.parameters()]
            found[f"{method}/{optim}/{bad}"] = {
                "skipped": watch.export(),
                "unchanged": before == after,
                "next": weights(made),
                "moved": all(weights(made)[name] != after[name] for name in after),
                "largest": float(torch.stack(largest).max()),
                "weight": [float(value) for value in made.run.kept.get("weight/adversarial", [])],
            }
    return found


def _poisoned(made: Small, number: int) -> None:
    phases = {phase: getattr(made.method, phase) for phase in made.engines}

    def poison(phase: str, batch: Batch, run: Run) -> dict[str, Term]:
        terms: dict[str, Term] = phases[phase](batch, run)
        name = next(iter(terms))
        factor = torch.ones(len(batch.image))
        factor[-1] = float("inf") if made.ranks.rank == made.ranks.world - 1 else 1.0
        return terms | {name: terms[name]._replace(value=terms[name].value * factor)}

    for phase in phases:
        setattr(made.method, phase, functools.partial(poison, phase))
    made.update(number)
    for phase in phases:
        delattr(made.method, phase)


# ---------------------------------------------------------------- what ranks tell each other
def agreement(ranks: Ranks) -> dict[str, Any]:
    """Values of any length from every rank, and faults of the last rank, of all, of none."""
    found: dict[str, Any] = {"gathered": ranks.gather({"rank": ranks.rank, "text": "ä" * 1000 * ranks.rank})}
    last = ranks.rank == ranks.world - 1
    for case, fault in {"last": "cut" if last else None, "all": f"rank {ranks.rank}", "none": None}.items():
        try:
            ranks.agree(fault)
            found[case] = None
        except ValueError as error:
            found[case] = str(error)
    return found


PROBES: dict[str, Callable[[Ranks], Any]] = {
    "buffers": buffers,
    "reductions": reductions,
    "adaptive_weight": adaptive_weight,
    "rates": rates,
    "draws": draws_of,
    "nonfinite": nonfinite,
    "agreement": agreement,
}
