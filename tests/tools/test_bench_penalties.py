"""tools/bench/penalties.py: what it compares is the same update, and both tables come out."""

import json

import pytest
import torch

from tools.bench import penalties as bench
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import start


def test_exact_penalties_train_as_those_by_torch_do() -> None:
    ranks = start(DDPConfig())
    after = []
    for by_torch in (False, True):
        phase = bench.Phase(bench.CASES["vaegan_fashion"], ranks, bench.VARIANTS["exact"])
        call = bench._under(bench.by_torch, phase) if by_torch else phase
        gradients = {}
        phase.engine.optimizer.register_step_pre_hook(
            lambda *_, kept=gradients, at=phase: kept.update(
                {n: p.grad.clone() for n, p in at.network.named_parameters()}
            )
        )
        call()
        after.append(gradients)
    ranks.close()
    for name, one in after[0].items():
        other = after[1][name]
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)


def test_both_tables_come_out(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    given = ["--networks", "gan_fashion", "--rounds", "2", "--updates", "2", "--draws", "4", "--sigmas", "0.01,0.1"]
    bench.main([*given, "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found["cost"]["gan_fashion"]) == set(bench.VARIANTS)
    assert [row["sigma"] for row in found["bias"]["gan_fashion"]] == [0.01, 0.1]
    assert capsys.readouterr().out.count("| gan_fashion |") == 3
