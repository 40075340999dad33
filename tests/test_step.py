"""The inner step on one process: averages, clipping, precision, compilation."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.cases import BATCH, METHODS, SIZE, Small, global_batch, make_config, small
from trainer import build
from trainer.health import NonFinite
from trainer.kernels import noise
from trainer.losses.balance import Term
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start
from trainer.phase import FOLD
from trainer.step import means


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = start(DDPConfig())
    yield found
    found.close()


# ---------------------------------------------------------------- averages
class Normalised(nn.Module):
    """A generator with batch statistics."""

    latent_size = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Unflatten(1, (1, SIZE, SIZE)))

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.body(z)
        return out


def averaged(ranks: Ranks, *, updates: int, **optim: Any) -> Small:
    torch.manual_seed(0)
    made = small(make_config("gan", "adam", 1, 1, optim=optim), ranks, networks={"generator": Normalised()})
    for number in range(updates):
        made.update(number)
    return made


def test_an_averages_buffers_follow_the_live_network_and_whole_numbers_are_copied(ranks: Ranks) -> None:
    made = averaged(ranks, updates=50)
    engine = made.engines["generator"]
    assert engine.averaged
    mine, live = dict(engine.evaluated().named_buffers()), dict(engine.network.named_buffers())
    assert mine.keys() == live.keys() == {f"body.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert all(torch.equal(mine[name], live[name]) for name in mine)
    assert int(mine["body.1.num_batches_tracked"]) == 50
    assert not torch.equal(mine["body.1.running_mean"], torch.zeros(64))


def test_an_average_is_in_eval_mode_and_takes_no_gradient(ranks: Ranks) -> None:
    made = averaged(ranks, updates=3)
    for name in ("generator",):
        average = made.engines[name].evaluated()
        assert average is not None
        assert not any(module.training for module in average.modules())
        assert not any(p.requires_grad for p in average.parameters())
        assert all(p.grad is None for p in average.parameters())
    assert made.engines["generator"].network.training
    assert not made.engines["discriminator"].averaged


def test_samples_of_an_early_average_are_those_of_the_live_network_nearly(ranks: Ranks) -> None:
    """Its half-life is 5% of the images seen; a plain decay of 0.999 leaves 0.905 of the initial weights here."""
    made = averaged(ranks, updates=100, ema_half_life=10**9, lr=1e-3)
    engine = made.engines["generator"]
    first = averaged(ranks, updates=0).engines["generator"].network
    z = noise.normal(0, "samples", torch.arange(32), (4,))
    with torch.no_grad():
        live, average = ({"generator": network.eval()} for network in (engine.network, engine.evaluated()))
        now, smooth = (made.method.decode(networks, z) for networks in (live, average))
        before = made.method.decode({"generator": first.eval()}, z)
    assert float((smooth - now).abs().mean()) < 0.2 * float((before - now).abs().mean())


def test_the_average_is_the_moving_average_of_the_weights(ranks: Ranks) -> None:
    made = averaged(ranks, updates=0)
    engine = made.engines["generator"]
    expected = [p.detach().clone() for p in engine.network.parameters()]
    for number in range(8):
        made.update(number)
        keep = engine.optim.ema_decay(number * BATCH, batch=BATCH)  # type: ignore[attr-defined]
        expected = [
            keep * e + (1 - keep) * p.detach() for e, p in zip(expected, engine.network.parameters(), strict=True)
        ]
    assert engine.averaged
    for mine, e in zip(engine.evaluated().parameters(), expected, strict=True):
        assert torch.allclose(mine, e, rtol=1e-5, atol=1e-7)


def test_no_average_is_kept_where_none_is_asked_for(ranks: Ranks) -> None:
    made = averaged(ranks, updates=1, ema_half_life=0)
    assert not made.engines["generator"].averaged
    assert "ema" not in made.engines["generator"].export()
    assert build.averages(made.engines)["generator"] is made.engines["generator"].network


# ---------------------------------------------------------------- clipping
def test_clipping_bounds_the_update_and_logs_the_norm_before_it(ranks: Ranks) -> None:
    """SGD without momentum: the update is lr times the clipped gradient."""
    moved = {}
    for clip in (None, 0.01):
        made = small(make_config("vae", "sgd", 1, 1, optim={"lr": 1.0, "betas": [0.0, 0.9], "clip": clip}), ranks)
        network = made.engines["autoencoder"].network
        before = torch.cat([p.detach().flatten() for p in network.parameters()])
        made.update(0)
        after = torch.cat([p.detach().flatten() for p in network.parameters()])
        moved[clip] = (float((after - before).norm()), float(made.run.kept["gradient_norm/autoencoder"][0]))
    assert moved[0.01][0] == pytest.approx(0.01, rel=1e-3)
    assert moved[None][0] == pytest.approx(moved[None][1], rel=1e-3)
    assert moved[0.01][1] == moved[None][1] > 1.0


# ---------------------------------------------------------------- precision
@pytest.mark.parametrize("method", METHODS)
def test_under_bf16_losses_penalties_weights_and_averages_stay_float32(
    ranks: Ranks, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small(make_config(method, "adam", 1, 1, precision="bf16"), ranks)
    exact = small(make_config(method, "adam", 1, 1), ranks)
    seen: dict[str, torch.dtype] = {}
    gradients = made.run.gradients

    def looking(terms: dict[str, Term]) -> Any:
        seen.update({f"{made.run.phase}/{name}": term.value.dtype for name, term in terms.items()})
        return gradients(terms)

    monkeypatch.setattr(made.run, "gradients", looking)
    for number in range(4):
        made.update(number)
        exact.update(number)
    assert len(seen) >= 2 and set(seen.values()) == {torch.float32}
    half, full = means(made.run.kept, ranks), means(exact.run.kept, ranks)
    assert half.keys() == full.keys()
    for name in half:
        assert half[name] == half[name] and abs(half[name]) < float("inf"), name
    for engine in made.engines.values():
        networks = [engine.network] + ([engine.evaluated()] if engine.averaged else [])
        assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
        assert all(bool(p.isfinite().all()) for network in networks for p in network.parameters())
    assert half != full, "autocast did nothing"
    for phase in made.engines:  # bfloat16 has 8 bits: a percent or two of a loss that is a sum of many
        main = next(name for name in full if name.startswith(f"loss/{phase}/"))
        assert half[main] == pytest.approx(full[main], rel=0.05, abs=0.05), main


def test_under_bf16_a_penalty_is_the_float32_one(ranks: Ranks) -> None:
    """At the same weights R1 is not touched by autocast at all."""
    values = []
    for precision in ("fp32", "bf16"):
        tree = METHODS["gan"] | {"critic": {"loss": "hinge", "r1": 0.2}}
        made = small(make_config(tree, "sgd", 1, 1, precision=precision), ranks)
        batch = global_batch(0)
        made.run.begin("discriminator", batch, images=0, last=True, share=True, count=BATCH)
        with made.run.autocast():
            values.append(made.method.discriminator(batch, made.run)["r1"].value.detach())  # type: ignore[attr-defined]
    assert torch.equal(values[0], values[1])


# ---------------------------------------------------------------- compilation
@pytest.mark.slow  # inductor builds a dozen kernels a network: 20 to 50 s with a cold cache
@pytest.mark.parametrize("method", ["gan", "vae"])
def test_compiled_networks_give_the_same_losses_and_penalties_run_past_the_compiler(ranks: Ranks, method: str) -> None:
    """Fused kernels add in another order: as far apart as another split of the batch, see tests/parallel."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what its compiler still uses
        plain, compiled = (small(make_config(method, "sgd", 1, 1, compile=on), ranks) for on in (False, True))
        for number in range(3):
            plain.update(number)
            compiled.update(number)
    for name, values in plain.run.kept.items():
        for expected, found in zip(values, compiled.run.kept[name], strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), name
    for name, engine in plain.engines.items():
        names = [key for key, _ in compiled.engines[name].network.named_parameters()]
        assert names == [key for key, _ in engine.network.named_parameters()], "no _orig_mod in a checkpoint"
        assert compiled.engines[name].export()[""].keys() == engine.export()[""].keys()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


# ---------------------------------------------------------------- notes
def test_means_are_over_samples_and_leave_the_notes(ranks: Ranks) -> None:
    kept = {"a": [torch.tensor([1.0, 3.0]), torch.tensor([5.0])], "b": [torch.tensor(2.0)]}
    assert means(kept, ranks) == {"a": 3.0, "b": 2.0}
    assert means(kept, ranks) == {"a": 3.0, "b": 2.0}
    assert means({}, ranks) == {}


def test_notes_of_patches_and_of_many_updates_take_little_memory_and_have_the_same_mean(ranks: Ranks) -> None:
    run = small(make_config("gan", "sgd", 1, 1), ranks).run
    updates, batch = 3 * FOLD + 5, 4
    patches = torch.randn(updates, batch, 30, 30)
    flags = (torch.arange(updates) % 7 == 0).float()
    for logits, flag in zip(patches, flags, strict=True):
        run.note("logits", logits)
        run.note("rows", logits[:, 0, 0].clone())
        run.note("skipped/generator", flag.clone())
    found = means(run.kept, ranks)
    assert found["logits"] == pytest.approx(float(patches.double().mean()), abs=1e-6)
    assert found["rows"] == pytest.approx(float(patches[:, :, 0, 0].double().mean()), abs=1e-6)
    watch = NonFinite(patience=2)
    watch.look(run.kept, images=0)  # a row of skipped updates is still seen in its order
    assert watch.export() == {"generator": int(flags.sum())}
    storages = {
        note.untyped_storage().data_ptr(): note.untyped_storage().nbytes()
        for notes in run.kept.values()
        for note in notes
    }
    assert sum(storages.values()) <= 3 * 4 * (3 * FOLD + 5 * batch)


def test_a_phase_may_not_run_another_network_through_its_engine(ranks: Ranks) -> None:
    made = small(make_config("gan", "sgd", 1, 1), ranks)
    made.run.begin("generator", global_batch(0), images=0, last=True, share=True, count=BATCH)
    with pytest.raises(AssertionError, match="the phase generator trains generator, not discriminator"):
        made.run("discriminator", global_batch(0).image)
