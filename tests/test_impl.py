"""The key `impl`: what is chosen is told, what cannot run is refused, and kernels train as plain torch does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import starts
from tests.parallel.cases import METHODS, Small, make_config, small
from tests.runs import write_config
from trainer.kernels.choose import Impl, preferred
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = start(DDPConfig(processes=1))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A run that is built prefers what its config says, for the whole process."""
    with preferred("auto"):
        yield


def test_one_that_cannot_run_is_one_line_and_code_2(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few)
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", str(config), "impl=triton"],
        cwd=ROOT, env=variables | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tandem: error: impl: triton cannot run ") and line.endswith("; take auto or eager")


def test_the_log_says_once_what_runs_and_why_on_one_rank(few: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", "vae", data=few, log={"every": 48}, images=192)
    ended = starts.train(tmp_path / "logs", str(config), "impl=eager", world=2).wait().ok()
    (line,) = (line for line in ended.out.splitlines() if "asked for" in line)
    assert line.endswith(": eager (asked for)")
    assert {"noise", "reparameterize_kl"} <= set(line.partition(":")[0].split(", "))


@pytest.mark.slow
def test_a_run_that_prefers_what_is_compiled_ends_well(few: Path, tmp_path: Path) -> None:
    """Losses are; norms, of more shapes than graphs are kept, and a penalised discriminator are not."""
    given = ("impl=compiled", "batch=16", "images=64", "log.every=16", "method.critic.penalty_interval=0")
    config = write_config(tmp_path / "run.yaml", "vaegan", data=few)
    ended = starts.train(tmp_path / "logs", str(config), *given).wait().ok()
    assert "compiled (asked for)" in ended.out
    checked = starts.tandem(tmp_path / "logs", "check", str(config), *given, f"run={tmp_path / 'check'}")
    assert (checked.code, checked.err) == (0, "")


@pytest.mark.parametrize("method", ["vae", "vae_free_bits", "vaegan_last_layer", "vaegan_larsen"])
def test_a_method_trains_alike_where_a_kernel_draws_the_posteriors_noise(ranks: Ranks, method: str) -> None:
    def trained(impl: Impl) -> Small:
        made = small(make_config(METHODS[method], "sgd", 1, 1), ranks)
        with preferred(impl, "reparameterize_kl"):
            for number in (2, 3):
                made.update(number)
        drawn = {kind for kind, stream, _ in made.run._noise if stream == "posterior"}
        assert drawn == {"address" if impl == "triton" else "normal"}
        return made

    plain, fused = trained("eager"), trained("triton")
    assert plain.run.kept.keys() == fused.run.kept.keys() >= {"latent/kl"}
    for name, values in plain.run.kept.items():
        for expected, found in zip(values, fused.run.kept[name], strict=True):
            # sums in another order, and normals by another cosine
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), name
