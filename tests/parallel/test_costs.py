"""What a rank holds and sends: against numbers made by hand, ZeRO's own formulas, and two real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.parallel.config import AutoConfig, DDPConfig, DeepSpeedConfig
from trainer.parallel.costs import Backend, Network, Passes, Sent, backend, memory, sent, summed, total, whole

ROOT = Path(__file__).resolve().parents[2]


def network(*sizes: int, averaged: bool = True, micro_batches: int = 1, **passes: Any) -> Network:
    return Network(sizes, averaged=averaged, moments=2, passes=Passes(**passes), micro_batches=micro_batches)


NETWORKS = st.builds(
    lambda sizes, averaged, micro_batches: network(*sizes, averaged=averaged, micro_batches=micro_batches),
    st.lists(st.integers(1, 10**8), min_size=1, max_size=8),
    st.booleans(),
    st.integers(1, 8),
)


def test_a_pair_of_networks_by_hand() -> None:
    """1000 weights on 4 ranks, Adam and an average, float32, a bucket of 600 elements."""
    own = network(600, 400)
    ddp = memory(own, Backend(), world=4)
    assert (ddp.parameters, ddp.gradients, ddp.optimizer, ddp.average, ddp.buckets) == (4000, 4000, 8000, 4000, 4000)
    assert (ddp.held, ddp.update) == (20_000, 4000)
    alone = memory(own, Backend(cpu=True), world=1)
    assert (alone.held, alone.buckets, alone.update) == (16_000, 0, 4000 + 8000)
    one, two, three = (memory(own, Backend(stage=n, bucket=600, persistent=500), world=4) for n in (1, 2, 3))
    assert (one.parameters, one.gradients, one.optimizer, one.average, one.buckets) == (4000, 4000, 3000, 1000, 2400)
    assert (two.parameters, two.gradients, two.optimizer, two.average, two.buckets) == (4000, 1000, 3000, 1000, 2400)
    # the smaller weight stays whole; the larger is gathered
    assert (three.parameters, three.gradients, three.optimizer, three.average) == (1000 + 1600, 1000, 3000, 1000)
    assert (three.gathered, three.held) == (2400, 2600 + 1000 + 3000 + 1000 + 2400)
    assert two.backward(700) == 2400 + 1000 + 700 + 2400  # the bucket, the share, activations, what is being reduced
    other = memory(network(100, averaged=False), Backend(), world=4)
    assert total({"a": ddp, "b": other}, activations=50) == (20_000 + 1600, 20_000 + 1600 + 4050)


def test_half_precision_and_offload_by_hand() -> None:
    half = memory(network(1000), Backend(stage=2, width=2, bucket=1000, buckets=2), world=4)
    assert (half.parameters, half.gradients, half.optimizer, half.buckets) == (2000, 500, 3000, 4000)
    away = memory(network(1000), Backend(stage=2, width=2, offload=True), world=4)
    assert (away.optimizer, away.average, away.host) == (0, 0, 4 * 250 * (1 + 2 + 1 + 1))
    exact = memory(network(1000, exact=1), Backend(stage=3, persistent=0), world=4)
    assert exact.gathered == 4000 + 8000  # gathered, a copy to differentiate, and its gradients


@pytest.mark.parametrize(
    ("stage", "micro_batches", "expected"),
    [
        (0, 1, Sent(all_reduce=4000)),
        (0, 3, Sent(all_reduce=4000)),
        (1, 3, Sent(all_reduce=4000, all_gather=4000)),
        (2, 3, Sent(all_reduce=12_000, all_gather=4000)),
    ],
)
def test_what_is_exchanged_by_hand(stage: int, micro_batches: int, expected: Sent) -> None:
    own = network(1000, micro_batches=micro_batches)
    assert whole(own, Backend(stage=stage)) == expected
    ring = sent(own, Backend(stage=stage), world=4)
    assert ring == Sent(all_reduce=expected.all_reduce * 3 // 2, all_gather=expected.all_gather * 3 // 4)
    assert sent(own, Backend(stage=stage), world=1).total == 0


@pytest.mark.parametrize(
    ("passes", "gathers"),
    [
        ({"graph": 1}, 1),  # kept from forward to backward
        ({"graph": 2, "plain": 1}, 2),  # the plain one is served by weights that are kept
        ({"graph": 1, "plain": 1, "plain_first": True}, 3),  # nothing is kept: each forward and each backward
        ({"graph": 0, "exact": 2}, 4),  # to compute the penalty, and to hand its gradients over
        ({"graph": 1, "plain": 1, "exact": 1, "plain_first": True}, 5),
    ],
)
def test_weights_that_stage_3_gathers_by_hand(passes: dict[str, Any], gathers: int) -> None:
    own = Network((1000,), averaged=False, moments=2, passes=Passes(**passes))
    assert whole(own, Backend(stage=3, persistent=0)) == Sent(reduce_scatter=4000, all_gather=4000 * gathers)
    if passes == {"graph": 1}:
        assert whole(own, Backend(stage=3, persistent=0, live=999)).all_gather == 8000
        assert whole(own, Backend(stage=3, persistent=1000)).all_gather == 4000  # once, after the update


@given(own=NETWORKS, world=st.integers(1, 1024), width=st.sampled_from([2, 4]))
def test_each_stage_shares_out_more_and_none_holds_less_than_its_share(own: Network, world: int, width: int) -> None:
    """Rajbhandari et al. 2020, section 5, without what DeepSpeed adds: no bucket, no weight that stays whole."""
    zero = [memory(own, Backend(stage=n, width=width, bucket=0, persistent=0), world=world) for n in (1, 2, 3)]
    one, two, three = zero
    assert one.held == two.held and one.gradients >= two.gradients
    slack = 4 * len(own.sizes)  # each weight is cut by itself, and rounded up
    assert three.held <= two.held + two.gradients + (slack if world > 1 else width * own.size)
    share = 4 * own.size * (3 + own.averaged) / world
    assert share <= one.optimizer + one.average == three.optimizer + three.average < share + 16


@given(own=NETWORKS, world=st.integers(2, 1024), stage=st.sampled_from([0, 1, 2, 3]))
def test_a_ring_sends_less_than_what_is_exchanged_twice_and_more_on_more_ranks(
    own: Network, world: int, stage: int
) -> None:
    found, more = (sent(own, Backend(stage=stage), world=n) for n in (world, world + 1))
    assert found.total <= more.total + 3  # rounded
    exchanged = whole(own, Backend(stage=stage))
    assert found.total <= 2 * exchanged.all_reduce + exchanged.reduce_scatter + exchanged.all_gather
    assert found.total >= exchanged.total / 2 - 2


def test_a_config_gives_its_backend(tmp_path: Path) -> None:
    assert backend(AutoConfig(), "generator", cpu=True) == backend(DDPConfig(), "generator", cpu=True)
    config = DeepSpeedConfig(stage=3, discriminator=1, weights="bf16", offload="cpu")
    assert backend(config, "generator", cpu=False) == Backend(stage=3, width=2, offload=True)
    assert backend(config, "discriminator", cpu=False) == Backend(stage=1, width=2, offload=True)
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 5e7, "overlap_comm": True}}))
    own = DeepSpeedConfig(stage=2, file=file)
    assert backend(own, "generator", cpu=False) == Backend(stage=2, bucket=50_000_000, buckets=2)
    assert backend(own, "generator", cpu=False, stage=3) == Backend(stage=3, bucket=50_000_000)
    assert backend(DeepSpeedConfig(stage=0), "generator", cpu=False) == Backend()


# ---------------------------------------------------------------- two real ranks
@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What tests/parallel/costs_worker.py found, a rank each."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("costs")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ended = subprocess.run(
        [sys.executable, *command, "tests.parallel.costs_worker", str(out)],
        cwd=ROOT, env=alone | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_ranks_exchange_what_is_predicted(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["world"] == 2 and len(found["sent"]) == 12
        for case, (predicted, counted) in found["sent"].items():
            for key, size in predicted.items():
                # partitions are padded, norms and the balance are exchanged too: some hundred bytes of some hundred kB
                assert counted[key] == pytest.approx(size, rel=0.02, abs=2000), f"{case}, {key}"


def test_recomputed_networks_train_as_others_under_every_backend(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert len(found["recompute"]) == 16
        assert {case: error for case, error in found["recompute"].items() if error != 0.0} == {}


def test_sums() -> None:
    assert summed({"a": Sent(1, 2, 3), "b": Sent(10, 20, 30)}) == Sent(11, 22, 33)
