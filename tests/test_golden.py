"""The losses of 100 updates of each shipped config are those in tests/golden/; `make golden` writes them anew.

What another CPU may change is the order of float32 sums, a relative 6e-8 each. Adam makes it grow: its step has the
size of the learning rate however small a gradient is, so where one is near 0 its last bit decides the step's sign.
Measured against these files with oneDNN off, its instructions limited to SSE4.1 and to AVX2, ATen's kernels limited to
scalar code and to AVX2, 2 threads, and NCHW for NHWC memory (environment variables ONEDNN_MAX_CPU_ISA,
ATEN_CPU_CAPABILITY and OMP_NUM_THREADS; `python -m tools.golden --compare` prints the differences): at most

    VAE                1e-5 of a loss's largest value in 100 updates
    GAN and VAE-GAN    1.2e-6 in 15 updates, 3e-4 in 30, 2e-2 in 100

The tolerances are ten, eight, ten and five times that.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import golden
from trainer.parallel.config import DDPConfig
from trainer.parallel.ranks import Ranks, start

TOLERANCES = {  # updates -> share of the loss's largest value
    "vae": {golden.UPDATES: 1e-4},
    "gan": {15: 1e-5, 30: 3e-3, golden.UPDATES: 0.1},
    "vaegan": {15: 1e-5, 30: 3e-3, golden.UPDATES: 0.1},
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = start(DDPConfig(processes=1))
    yield found
    found.close()


@pytest.mark.parametrize("method", golden.METHODS)
def test_the_losses_of_a_shipped_config_are_the_golden_ones(method: str, fashion: Path, ranks: Ranks) -> None:
    far = golden.distance(golden.losses(method, data=fashion, ranks=ranks), golden.read(method))
    for updates, tolerance in TOLERANCES[method].items():
        assert max(far[:updates]) <= tolerance, f"{max(far[:updates]):.1e} in the first {updates} updates"


@pytest.mark.parametrize("method", golden.METHODS)
def test_two_runs_on_one_machine_have_exactly_the_same_losses(method: str, fashion: Path, ranks: Ranks) -> None:
    first, second = (golden.losses(method, data=fashion, ranks=ranks, updates=20) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("vae", "method.kl.weight=1.02"),
        ("gan", "optim.discriminator.lr=1.05e-4"),
        ("gan", "optim.betas=[0.0, 0.98]"),
        ("vaegan", "method.adversarial_weight=0.55"),
    ],
)
def test_the_tolerance_is_tight_enough_to_see_a_small_change(
    method: str, change: str, fashion: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(golden.METHODS, method, [*golden.METHODS[method], change])
    updates, tolerance = next(iter(TOLERANCES[method].items()))
    far = golden.distance(golden.losses(method, data=fashion, ranks=ranks, updates=updates), golden.read(method))
    assert max(far) > 2 * tolerance
