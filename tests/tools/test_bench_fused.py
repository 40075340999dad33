"""The benchmarks of fused parts run and say what they measured; what is counted is what is allocated.

No figure of speed is held to anything: the machine is shared.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.starts import ROOT
from tools.bench import activations, carry, cases, clock, gpu, losses, models, own, page, step

COMMANDS = ("losses", "step", "activations", "gpu", "carry", "page")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_a_command_that_runs_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"tools.bench.{name}").main(["--help"])
    assert stopped.value.code == 0
    assert f"\n    python -m tools.bench.{name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("losses", ["--ops", "grup_norm"], "'grup_norm' is none of group_norm_silu, lpips_head"),
        ("step", ["--configs", "vea"], "'vea' is none of gan_fashion, kl_f8_256"),
        ("step", ["--configs", "vae_fashion", "--methods", "vae"], "--methods: takes the place of --configs"),
        ("activations", ["kl_f9"], "config: 'kl_f9' is none of gan_fashion"),
        ("gpu", ["--stages", "loses"], "'loses' is none of tests, losses"),
        ("gpu", ["--minutes", "0"], "'0' is no number above 0"),
        ("page", ["--results"], "expected one argument"),
    ],
)
def test_a_wrong_argument_is_refused(name: str, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"tools.bench.{name}").main(argv)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["losses", "step", "gpu"])
def test_a_gpu_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="--device: torch sees no GPU here; take cpu"):
        importlib.import_module(f"tools.bench.{name}").main(["--device", "cuda"])


def test_what_is_wrong_on_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"full: is there and not empty"):
        carry.main([str(tmp_path / "full")])
    with pytest.raises(ValueError, match=r"a\.json: is no file of tools/bench/gpu\.py"):
        page.main(["--results", str(tmp_path / "full"), "--check"])
    (tmp_path / "empty.md").write_text("# Nothing")
    with pytest.raises(ValueError, match=r"empty\.md: has no place for the figures"):
        page.main(["--page", str(tmp_path / "empty.md")])


def test_a_short_table_has_every_operation_beside_a_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, sheet = tmp_path / "losses.json", tmp_path / "losses.csv"
    assert losses.main(["--quick", "--rounds", "1", "--device", "cpu", "--json", str(out), "--csv", str(sheet)]) == 0
    found = json.loads(out.read_text())
    rows = [row for row in found["rows"] if "ms" in row]
    assert {row["op"] for row in rows} == set(losses.OPS)
    for row in rows:
        assert 0 < row["ms"] <= row["ms_median"] and row["launches"] > 0 and row["of_copy"] > 0
        assert row["peak"] >= 0 and (row["mode"] != "full" or row["saved"] > 0)
    eager = {(row["op"], row["layout"]): row for row in rows if row["impl"] == "eager" and row["mode"] == "full"}
    norm = eager["group_norm_silu", "channels_last"]
    assert 8 <= norm["saved"] < 9  # x and the normalised, float32
    assert all(row["error"] <= 1e-5 for row in eager.values())
    assert found["overhead"]["choose_us"] > 0 and "eager: group_norm_silu" in capsys.readouterr().out
    assert len(sheet.read_text().splitlines()) == len(found["rows"]) + 1


def test_an_implementation_far_from_float64_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(a: torch.Tensor, image: torch.Tensor, *, impl: str) -> torch.Tensor:
        share = 1.0 if a.dtype == torch.float64 else 1.0001
        return ((a - image).abs() * share).sum((1, 2, 3))

    monkeypatch.setitem(cases.NLL, "laplace", off)
    assert losses.main(["--quick", "--rounds", "1", "--device", "cpu", "--ops", "laplace"]) == 1
    assert "refused: laplace 2x3x16x16 float32 eager: 1.0e-04 from float64" in capsys.readouterr().err


def test_what_autograd_keeps_counts_once_and_without_weights() -> None:
    x, w = torch.ones(100, requires_grad=True), torch.ones(100, requires_grad=True)
    assert clock.saved(lambda: (x * w) * x, besides=[w]) == 400 + 400  # x, and the product
    launches, peak = clock.profiled(lambda: (x.detach() + 1) * 2, torch.device("cpu"))
    assert launches == 3 and 800 <= peak < 2000  # detach, add, mul


def test_a_short_run_of_steps_has_each_part(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    argv = ["--quick", "--device", "cpu", "--methods", "vae", "--sizes", "28", "--parts", "--out", str(out)]
    assert step.main(argv) == 0
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"eager", "auto", *step.OFF}
    for row in rows.values():
        spread = row["ratio_to_eager"]
        assert row["images_per_s"] > 0 and 0 < spread["least"] <= spread["median"] <= spread["most"]


def test_the_operations_of_a_step_are_found() -> None:
    config = models.of_size("vae", 28, lpips=None, precision="fp32", quick=True)
    take = step.Taken(config, own.alone(torch.device("cpu")), "eager")
    assert set(step.operations(take)) >= {"group_norm_silu", "reconstruction", "reparameterize_kl"}


@pytest.mark.parametrize("off", list(step.OFF))
def test_a_part_that_is_taken_away_changes_no_result(off: str) -> None:
    """It is the same training, more slowly: weights agree to rounding."""
    found = []
    for engine in (None, step.OFF[off]):
        config = models.of_size("vae", 28, lpips=None, precision="fp32", quick=True)
        torch.manual_seed(0)
        take = step.Taken(config, own.alone(torch.device("cpu")), "eager", engine=engine)
        take(3)
        engines = take.steps.__closure__  # of the function that own.steps_of returns
        assert engines is not None
        (built,) = (cell.cell_contents for cell in engines if isinstance(cell.cell_contents, dict))
        found.append([p.detach().clone() for p in built["autoencoder"].evaluated().parameters()])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)


SMALL = (
    *("data.size=64", "batch=2", "method.autoencoder.width=32", "method.autoencoder.multipliers=[1, 1, 1]"),
    *("method.autoencoder.blocks=1", "method.discriminator.width=16", "method.discriminator.layers=2"),
    *("method.perceptual={kind: none}", "precision=bf16"),
)  # few weights, so that activations make the peak


BOTH = """\
import json, sys, torch
from tools.bench import activations, clock, memory_rank, models, own
config = models.shipped(*sys.argv[1:])
said = activations.count(config, "eager", updates=memory_rank.WARM + 1)
with clock._quiet():
    real = memory_rank.measure(config, own.alone(torch.device("cpu")))
print(json.dumps([said, real]))
"""  # in a process of its own: what lives in this one counts


@pytest.mark.parametrize(("name", "overrides"), [("vae_fashion", ()), ("kl_f8_256", SMALL)])
def test_what_is_counted_is_what_the_allocator_gave_out(name: str, overrides: tuple[str, ...]) -> None:
    """A real update on the CPU beside the count. Between updates: all but the noise that a CPU draws ahead, 0.5 MB at
    most. At the peak it may have been given 5 % more: what operations take to work in, which no count of their results
    sees (0.1 to 2.4 % measured)."""
    command = [sys.executable, "-W", "ignore", "-c", BOTH, name, *overrides]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said, real = json.loads(ran.stdout.splitlines()[-1])
    noise = 4 * (1 << 17) + 4096
    assert said["held"] <= real["allocated"] <= said["held"] + noise
    assert 0.95 * (real["allocated_peak"] - noise) <= said["peak"] <= 1.01 * real["allocated_peak"]
    assert sum(said["at_peak"].values()) == said["peak"] and sum(said["moved_by"].values()) == said["moved"]


def test_kernels_hold_and_move_less_than_autocast_does() -> None:
    found = {impl: activations.count(models.shipped("kl_f8_256", *SMALL), impl) for impl in activations.IMPLS}
    assert found["triton"]["peak"] < 0.75 * found["plain"]["peak"]
    norms = {impl: row["moved_by"][activations.NORM] for impl, row in found.items()}
    assert norms["triton"] < 0.4 * norms["plain"]


def test_the_page_is_that_of_the_files_and_makes_up_no_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main(["--check"]) == 0, f"{capsys.readouterr().out}; run python -m tools.bench.page"
    files = page.read(page.HERE / "results")
    text = page.render(files)
    if not any(file["kind"] == "cuda" for file in files):
        assert text.count(page.UNKNOWN) >= 9 * len(page.WHOLE) + len(page.TARGETS)


def test_figures_of_a_gpu_fill_their_cells() -> None:
    ratios = {"median": 1.25, "least": 1.2, "most": 1.3}
    row = {"op": "group_norm_silu", "shape": "8x128x256x256", "dtype": "bfloat16", "layout": "channels_last",
           "impl": "triton", "mode": "full", "ms": 1.0, "of_copy": 0.71, "vs_plain": 4.5, "launches": 4,
           "peak": 1e6, "saved": 2.0, "error": 1e-3, "gradient_error": 2e-3}  # fmt: skip
    step_row = {"model": "vae-64", "variant": "auto", "images_per_s": 10.0, "ratio_to_eager": ratios}
    about = {"ended": "done", "commit": "abc", "date": "2026-01-01T00:00:00", "load": 1.0}
    file = {"device": "Card", "kind": "cuda", "machine": {},
            "versions": {"torch": "2.11"}, "stages": {"losses": {**about, "rows": [row]},
                                                      "step": {**about, "rows": [step_row]}}}  # fmt: skip
    text = page.render([file])
    assert "| group_norm_silu 8x128x256x256 full | 0.7 | 0.71 | 3.5 | 4.50 | 1 | not measured on a GPU yet |" in text
    assert "Card, torch 2.11, 2026-01-01, abc:" in text and "1.25 (1.20-1.30)" in text
    assert "| vae-28 | not measured on a GPU yet |" in text


def test_a_stage_that_takes_too_long_is_stopped_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    argv = ["--device", "cpu", "--quick", "--stages", "losses,activations", "--minutes", "0.001", "--out", str(out)]
    assert gpu.main(argv) == 1
    found = json.loads(out.read_text())
    assert list(found["stages"]) == ["losses", "activations"]
    assert all("its share of the minutes" in stage["ended"] for stage in found["stages"].values())
    assert found["commit"] and found["versions"]["torch"] == torch.__version__


def test_everything_starts_without_the_packages_that_are_stood_in_for(tmp_path: Path) -> None:
    """A start that cannot find what tools/bench/stand_in.py stands in for, nor a network."""
    out = str(tmp_path / "counted.json")
    program = f"""
import importlib.util, sys
from tools.bench import stand_in
true = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in stand_in.UNUSED else true(name)
stand_in.install()
sys.meta_path.insert(0, sys.meta_path.pop())  # before those that would find the real ones
from tools.bench import gpu
import accelerate, cv2, PIL.Image
assert not hasattr(accelerate, '__file__') and cv2.anything and PIL.Image.open
gpu.STAGES['activations'](gpu.parse(['--device', 'cpu', '--quick']), gpu.Path({out!r}))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(Path(out).read_text())["rows"]


def test_what_is_carried_is_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    assert carry.main(["unused", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(carry.PACKAGES) and all("==" in line and ";" not in line for line in listed)
