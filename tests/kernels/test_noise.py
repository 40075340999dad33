"""Noise is a pure function of (seed, stream, position): known answers, statistics, independence of layout, frozen
values."""

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.tolerances import DEVICE, IMPLS
from trainer.kernels import noise
from trainer.kernels.choose import preferred
from trainer.kernels.program import LACKING, tl, triton
from trainer.losses.augment import POLICIES

ROOT = Path(__file__).parents[2]

N = 4096 * 64  # values of a sheet of 4096 rows: errors of a mean shrink as 1 / 512
SEEDS = st.integers(0, 2**63 - 1)
POSITIONS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20)


def rows(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count)


# ---------------------------------------------------------------- statistics
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_normals_have_the_moments_of_a_standard_normal(seed: int) -> None:
    """Bounds of 5 standard errors: sqrt(Var(x^k) / N), Var(x) = 1, Var(x^2) = 2, Var(x^3) = 15, Var(x^4) = 96."""
    x = noise.normal(seed, "latent", rows(4096), (64,)).double()
    for power, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((x**power).mean()) - expected) < 5 * math.sqrt(variance / N), f"moment {power}"


def test_normals_follow_the_distribution_function() -> None:
    """Kolmogorov and Smirnov: sqrt(N) times the largest gap exceeds 1.95 once in 1000 seeds; this seed is fixed."""
    x = noise.normal(0, "latent", rows(4096), (64,)).double().flatten().sort().values
    gap = (torch.special.ndtr(x) - (torch.arange(N, dtype=torch.float64) + 0.5) / N).abs().max()
    assert float(gap) * math.sqrt(N) < 1.95


def test_the_tails_are_there_and_bounded() -> None:
    x = noise.normal(0, "latent", rows(16384), (64,))
    # 2 (1 - Phi(4)) = 6.33e-5 of 2^20 values: 66.4 expected, 5 standard deviations either way
    assert 26 < int((x.abs() > 4).sum()) < 107
    assert float(x.abs().max()) <= 6.67  # sqrt(2 * 32 ln 2), the smallest radius of 32 bits


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    u = noise.uniform(0, "mix", rows(4096), (64,))
    assert float(u.min()) >= 0.0 and float(u.max()) < 1.0
    assert torch.equal(u * 2**24, (u * 2**24).round())  # multiples of 2^-24
    assert abs(float(u.double().mean()) - 0.5) < 5 * math.sqrt(1 / 12 / N)
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi2 = float(((counts - N / 64) ** 2 / (N / 64)).sum())
    assert abs(chi2 - 63) < 5 * math.sqrt(2 * 63)


@pytest.mark.parametrize("axis", [0, 1])
def test_neighbours_do_not_correlate(axis: int) -> None:
    """Neighbouring positions, and neighbouring values of a row, at lags 1 to 4; 5 standard errors of 1 / sqrt(N)."""
    x = noise.normal(3, "latent", rows(4096), (64,)).double()
    for lag in range(1, 5):
        a, b = x.narrow(axis, 0, x.shape[axis] - lag), x.narrow(axis, lag, x.shape[axis] - lag)
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel()), f"lag {lag}"
        assert abs(float((a.square() * b.square()).mean()) - 1.0) < 5 * math.sqrt(8 / a.numel()), f"lag {lag}, squares"


def test_streams_seeds_and_positions_far_apart_are_independent() -> None:
    x = noise.normal(0, "latent", rows(4096), (64,)).double()
    others = {
        "stream": noise.normal(0, "posterior", rows(4096), (64,)),
        "seed": noise.normal(1, "latent", rows(4096), (64,)),
        "position": noise.normal(0, "latent", rows(4096, start=2**40), (64,)),
        "seed and stream glued": noise.normal(0, "0latent", rows(4096), (64,)),
    }
    for name, other in others.items():
        assert abs(float((x * other.double()).mean())) < 5 / math.sqrt(N), name
        assert int((x == other).sum()) < 8, name


def test_no_two_positions_share_a_row() -> None:
    halves = torch.cat([noise.words(noise.address(0, "latent", rows(2**15, first)), 4) for first in (0, 2**50)])
    words = halves[:, ::2] << 32 | halves[:, 1::2]
    assert len(torch.unique(words)) == words.numel()  # 2^17 of 2^64: a repetition has a chance of 5e-10


# ---------------------------------------------------------------- layout
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, positions=POSITIONS, data=st.data())
def test_a_row_depends_on_its_position_alone(seed: int, positions: list[int], data: st.DataObject) -> None:
    """Not on the order of the batch, its split, its stride, or the rows beside it."""
    order = data.draw(st.permutations(range(len(positions))))
    where = torch.tensor(positions)
    for draw, shape in ((noise.normal, (3, 5)), (noise.uniform, ()), (noise.uniform, (2,))):
        whole = draw(seed, "s", where, shape)
        assert torch.equal(draw(seed, "s", where[list(order)], shape), whole[list(order)])
        for i in range(len(positions)):
            assert torch.equal(draw(seed, "s", where[i : i + 1], shape)[0], whole[i])
        strided = torch.stack([where, where + 1], dim=1)[:, 0]
        assert torch.equal(draw(seed, "s", strided, shape), whole)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, positions=POSITIONS, shape=st.lists(st.integers(1, 4), max_size=3).map(tuple))
def test_values_are_finite_float32_of_the_asked_shape_for_any_seed_and_position(
    seed: int, positions: list[int], shape: tuple[int, ...]
) -> None:
    where = torch.tensor(positions)
    for drawn in (noise.normal(seed, "s", where, shape), noise.uniform(seed, "s", where, shape)):
        assert drawn.shape == (len(positions), *shape)
        assert drawn.dtype == torch.float32
        assert bool(drawn.isfinite().all())


def test_a_shape_is_a_view_of_the_same_draws_and_a_longer_row_begins_with_the_shorter() -> None:
    flat = noise.normal(0, "latent", rows(7), (24,))
    assert torch.equal(noise.normal(0, "latent", rows(7), (2, 3, 4)).flatten(1), flat)
    assert torch.equal(noise.normal(0, "latent", rows(7), (10,)), flat[:, :10])
    assert torch.equal(noise.normal(0, "latent", rows(7), (5,)), flat[:, :5])  # an odd count cuts a pair


def test_drawing_changes_nothing_outside() -> None:
    where = rows(4)
    state = torch.get_rng_state()
    first = noise.normal(0, "latent", where, (3,))
    first.zero_()  # what a caller does to its noise must not reach a later draw
    assert not torch.equal(noise.normal(0, "latent", where, (3,)), first)
    assert torch.equal(where, rows(4))
    assert torch.equal(torch.get_rng_state(), state)
    kept = noise.address(0, "latent", where)
    noise.address(0, "latent", where).zero_()
    assert torch.equal(noise.address(0, "latent", where), kept)


def test_an_address_is_seed_stream_and_position_and_draws_the_same() -> None:
    where = torch.tensor([3, -1, 2**62])
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        at = noise.address(seed, "latent", where)
        assert at.dtype == torch.int64 and at.is_contiguous()
        assert at.tolist() == [[seed, noise.stream_number("latent"), position] for position in where.tolist()]
        assert torch.equal(noise.normal_at(at, (3,)), noise.normal(seed, "latent", where, (3,)))
        assert torch.equal(noise.uniform_at(at, (3,)), noise.uniform(seed, "latent", where, (3,)))
    mixed = torch.cat([noise.address(1, "latent", where), noise.address(2, "prior", where)])
    apart = [noise.normal(1, "latent", where, (5,)), noise.normal(2, "prior", where, (5,))]
    assert torch.equal(noise.normal_at(mixed, (5,)), torch.cat(apart))


@pytest.mark.parametrize(("count", "shape"), [(0, (4,)), (3, (0,)), (3, ()), (1, (2, 3))])
@pytest.mark.parametrize("impl", IMPLS)
def test_empty_and_scalar_shapes(impl: noise.Impl, count: int, shape: tuple[int, ...]) -> None:
    for draw in (noise.normal, noise.uniform):
        assert draw(0, "s", rows(count).to(DEVICE), shape, impl=impl).shape == (count, *shape)


# ---------------------------------------------------------------- known answers
def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


KNOWN = [  # counter, key, answer: kat_vectors of Random123
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@triton.jit
def _words_of(address, quads, out, QUADS: tl.constexpr):  # type: ignore[no-untyped-def]
    sample, index = tl.program_id(0).to(tl.int64), tl.arange(0, QUADS)
    a, b, c, d = noise.philox(address, sample, tl.load(quads + index))
    at = out + sample * 4 * QUADS + 4 * index
    tl.store(at, a.to(tl.int64))
    tl.store(at + 1, b.to(tl.int64))
    tl.store(at + 2, c.to(tl.int64))
    tl.store(at + 3, d.to(tl.int64))


@triton.jit
def _circle(words, out, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, COUNT)
    angle = tl.load(words + index).to(tl.uint32)
    # a radius of 1: u = e^-1/2
    cos, sin = noise.normals(angle * 0 + 2605029346, angle)
    tl.store(out + index, cos)
    tl.store(out + COUNT + index, sin)


def by_triton(address: Tensor, quads: list[int]) -> Tensor:
    """int64 (B, quads, 4); a power of two of quads."""
    out = torch.empty((len(address), len(quads), 4), dtype=torch.int64, device=DEVICE)
    index = torch.tensor(quads).to(torch.uint32).view(torch.int32).to(DEVICE)
    _words_of[(len(address),)](address.to(DEVICE), index, out, QUADS=len(quads))
    return out.cpu()


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_the_hash_is_philox_of_random123(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert philox(counter, key) == answer
    seed, position = signed(key[0] | key[1] << 32), signed(counter[1] | counter[2] << 32)
    address = torch.tensor([[seed, counter[3], position]])
    if LACKING is None:
        assert by_triton(address, [counter[0]])[0, 0].tolist() == answer
    if counter[0] == 0:  # numpy and torch count quads from 0
        assert noise.words(address, 4)[0].tolist() == noise._words_by_torch(address, 1)[0, 0].tolist() == answer


@given(seed=SEEDS, positions=POSITIONS, stream=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_numpy_torch_and_triton_give_the_integers_of_philox(seed: int, positions: list[int], stream: int) -> None:
    where = positions[:4]
    address = torch.tensor([[seed - 2**62, stream, position] for position in where])
    key = [(seed - 2**62) % 2**32, ((seed - 2**62) >> 32) % 2**32]
    wanted = torch.tensor(
        [[philox([quad, at % 2**32, (at >> 32) % 2**32, stream], key) for quad in range(4)] for at in where]
    )
    assert torch.equal(noise.words(address, 16).view(-1, 4, 4), wanted)
    assert torch.equal(noise._words_by_torch(address, 4), wanted)
    assert LACKING is not None or torch.equal(by_triton(address, [0, 1, 2, 3]), wanted)


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (3, 20, 31)])
def test_a_kernel_draws_what_eager_draws(shape: tuple[int, ...]) -> None:
    """Uniforms to the bit; normals to the last bits of log, cos and sin: an ulp or two of a radius of 6.67."""
    where = torch.tensor([0, 5, -7, 2**40], device=DEVICE)
    uniform, normal = (
        [draw(3, "latent", where, shape, impl=impl) for impl in ("eager", "triton")]  # type: ignore[operator]
        for draw in (noise.uniform, noise.normal)
    )
    assert torch.equal(*uniform)
    assert float((normal[0] - normal[1]).abs().max()) < 4e-6


def test_cosine_and_sine_of_a_kernel_are_right_to_an_ulp_all_around() -> None:
    """Two words give (cos, sin) sqrt(-2 ln u): the second is the angle's, here at and between all quadrants' ends."""
    turns = torch.tensor([1.0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 0.0, 0.3, 0.7], dtype=torch.float64)
    words = ((turns.view(-1, 1) * 2**32).long() + torch.arange(-3, 4) * 12345).flatten() % 2**32
    words = torch.cat([words, torch.randint(0, 2**32, (256 - len(words),), generator=torch.Generator().manual_seed(0))])
    found = torch.empty((2, 256), device=DEVICE)
    _circle[(1,)](words.to(DEVICE), found, COUNT=256)
    signed = torch.where(words < 2**31, words, words - 2**32)
    angle = (signed.float() * (2 * math.pi * 2.0**-32)).double()
    wanted = torch.stack([angle.cos(), angle.sin()])
    assert float((found.cpu().double() - wanted).abs().max()) < 1.2e-7


def test_a_graph_draws_the_same() -> None:
    """Inside torch.compile, where numpy does not go."""
    at = noise.address(0, "latent", rows(3))
    with preferred("eager"):
        found = torch.compile(lambda x: noise.normal_at(x, (5,)), fullgraph=True, backend="aot_eager")(at)
    assert float((found - noise.normal_at(at, (5,))).abs().max()) < 4e-6


# ---------------------------------------------------------------- frozen
FROZEN_AT = [0, 1, 63, 2**40, 2**62, -5]
FROZEN_WORDS = {
    (0, "latent"): [
        [1757148828, 4082295462, 3732029104, 587926928, 1771811455],
        [1445916854, 3504245194, 79114806, 548954210, 56606541],
        [393264108, 3478083191, 3730108220, 2910733082, 1951391339],
        [24595071, 1078695642, 2376198476, 2360196608, 159781455],
        [1499355570, 989748095, 1905834517, 591190626, 615730398],
        [3844170307, 3202357903, 4246736108, 3825301244, 9362550],
    ],
    (-7, "critic/mix"): [
        [570012837, 3268461621, 3223197256, 443458865, 676897249],
        [2444876365, 3316735823, 3541960706, 2005162553, 2623149826],
        [310401269, 2227033542, 3085776877, 1335958324, 1326465072],
        [2828922694, 1728639742, 1359336687, 3051561833, 3321552610],
        [3579205819, 3630820852, 4129877230, 1373671730, 2367852926],
        [4085733055, 3685194757, 2014173043, 2870304015, 1209453117],
    ],
}
FROZEN_NORMALS = [  # (0, "latent"): four of each row
    [1.272788, -0.409283, 0.345808, 0.401747],
    [0.593644, -1.350921, 1.962935, 2.033589],
    [0.802460, -2.034083, -0.233006, -0.477202],
    [-0.023287, 3.213217, -1.035807, -0.333148],
    [0.177820, 1.439860, 0.827002, 0.970111],
    [-0.012997, -0.470748, 0.116188, -0.095325],
]


@pytest.mark.parametrize(("seed", "stream"), FROZEN_WORDS)
def test_the_stream_is_the_one_that_runs_and_checkpoints_were_made_with(seed: int, stream: str) -> None:
    """Changing these numbers changes every run: resumed ones go on with other noise. Not an accident to be mended
    here."""
    where = torch.tensor(FROZEN_AT)
    expected = torch.tensor(FROZEN_WORDS[seed, stream])
    assert torch.equal(noise.words(noise.address(seed, stream, where), 5), expected)
    assert torch.equal(noise.uniform(seed, stream, where, (5,)) * 2**24, (expected >> 8).float())


def test_normals_are_the_frozen_ones_to_what_float32_functions_differ_between_machines() -> None:
    """log, cos and sin of a float32 differ by an ulp or two: 3e-7 of a radius of at most 6.67, and as much an angle."""
    found = noise.normal(0, "latent", torch.tensor(FROZEN_AT), (4,))
    assert torch.allclose(found, torch.tensor(FROZEN_NORMALS), rtol=0, atol=4e-6)


# ---------------------------------------------------------------- nothing else draws
DRAWS = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial"),
    *("poisson", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_"),
    *("geometric_", "dropout", "Dropout", "Dropout2d", "feature_dropout", "rrelu", "Generator", "manual_seed"),
    *("default_rng", "RandomState", "shuffle", "seed", "fork_rng"),
}
MAY = {  # file -> what of that, and for what
    "trainer/build.py": {"fork_rng", "manual_seed"},  # new weights
    "trainer/networks/discriminator.py": {"normal_"},  # new weights
    "trainer/networks/generator.py": {"Generator"},  # the network
    "trainer/metrics/fashion_cnn.py": {"fork_rng", "manual_seed", "randperm"},  # a network of its own, of a fixed seed
}


def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, name of the function, call) of every call in what trains and what samples."""
    found = []
    for path in sorted([*(ROOT / "trainer").rglob("*.py"), ROOT / "tools" / "export.py"]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                found.append((str(path.relative_to(ROOT)), name, node))
    return found


def test_nothing_in_training_draws_but_by_position() -> None:
    """A generator has a state, which ranks and resumed runs would not share."""
    assert {(file, name) for file, name, _ in calls() if name in DRAWS} == {
        (file, name) for file, names in MAY.items() for name in names
    }


def test_streams_in_use_have_different_numbers() -> None:
    names = {f"augment/{policy}" for policy in POLICIES}
    for _, function, call in calls():
        if function in ("normal", "uniform", "noise", "address"):
            names |= {a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    assert names >= {
        "posterior",
        "prior",
        "latent",
        "critic/mix",
        "flip",
        "crop",
        "dequantize",
        "evaluation",
        "samples",
    }
    assert len({noise.stream_number(name) for name in names}) == len(names)
