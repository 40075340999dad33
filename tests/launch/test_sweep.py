"""Which runs a sweep has, what their results are, and what is refused; tests/slurm submits one."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from launch import cluster as clusters
from launch import submit, sweep
from tests import starts
from tests.launch import made

VAE = starts.ROOT / "configs" / "vae_fashion.yaml"
CPU = starts.ROOT / "configs" / "cluster" / "cpu.yaml"


def expand(*words: str, seeds: int = 1) -> tuple[Path, list[sweep.Element]]:
    return sweep.expand(VAE, list(words), seeds=seeds)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("1e-4", ["1e-4"]),
        ("[0.5,0.99]", ["[0.5,0.99]"]),
        ("[0.5,0.99], [0.9, 0.99]", ["[0.5,0.99]", "[0.9, 0.99]"]),
        ("{kind: bernoulli, a: [1,2]},{kind: laplace}", ["{kind: bernoulli, a: [1,2]}", "{kind: laplace}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("", [""]),
    ],
)
def test_values_are_split_at_commas_outside_brackets(text: str, parts: list[str]) -> None:
    assert sweep.split(text) == parts


@pytest.mark.parametrize("text", ["[1,2", "1,2]", "1,,2", "1,", "'a,b"])
def test_values_that_do_not_close_or_are_missing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"command line: .*{re.escape(repr(text))}"):
        sweep.split(text)


def test_a_sweep_is_the_product_of_values_and_seeds_in_folders_named_by_them() -> None:
    folder, found = expand("optim.lr=1e-3,2e-3", "optim.betas=[0.5,0.99],[0.9,0.99]", "batch=128", "seed=7", seeds=2)
    assert folder == Path("runs/vae_fashion_sweep") and len(found) == 8
    assert [one.folder for one in found[:3]] == [
        "optim.lr=1e-3,optim.betas=0.5-0.99,seed=7",
        "optim.lr=1e-3,optim.betas=0.5-0.99,seed=8",
        "optim.lr=1e-3,optim.betas=0.9-0.99,seed=7",
    ]
    last = found[-1].config
    assert (last.optim.lr, last.optim.betas, last.seed, last.batch) == (2e-3, (0.9, 0.99), 8, 128)
    assert last.run == folder / found[-1].folder
    assert expand("seed=3,5", "run=runs/x")[0] == Path("runs/x")
    assert [one.values for one in expand("seed=3,5")[1]] == [{"seed": "3"}, {"seed": "5"}]


def test_folders_of_values_that_differ_only_in_signs_are_numbered() -> None:
    folder, found = expand("data.path=a/b,a-b")
    assert [one.folder for one in found] == [f"00{n},data.path=a-b,seed=0" for n in range(2)]
    assert [one.config.run for one in found] == [folder / one.folder for one in found]
    assert len(sweep.folder_name({"a" * 300: "1"})) == 120


@pytest.mark.parametrize(
    ("words", "seeds", "said"),
    [
        (["optim.lr=1e-4"], 1, "needs several values of a key"),
        (["optim.lr=1e-4,1e-4"], 1, "two runs would be the same"),
        (["optim.lrr=1e-4,2e-4"], 1, "unknown key optim.lrr"),
        (["optim.lr=1e-4,x"], 1, "optim.lr"),
        (["optim.lr=1e-3,0.001"], 1, "two runs would be the same: optim.lr=1e-3,seed=0 and optim.lr=0.001,seed=0"),
        (["run=a,b"], 1, "run: one folder"),
        (["seed=1,2"], 2, "seed: is given values, and --seeds too"),
    ],
)
def test_what_is_no_sweep_is_refused_with_the_key(words: list[str], seeds: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        expand(*words, seeds=seeds)


def test_the_batch_script_of_an_array_finds_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(VAE), "optim.lr=1e-3,2e-3", f"run={tmp_path}/s", "--seeds", "2", "--cluster", str(CPU)]
    assert sweep.main([*words, "--max-running", "3", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-3%3" in text and 'tandem_run="${tandem_runs[$SLURM_ARRAY_TASK_ID]}"' in text
    assert f"{tmp_path}/s/optim.lr=2e-3,seed=1" in text and "/logs/%a/%j.log" in text
    assert text.startswith("# s/optim.lr=1e-3,seed=0\n") and list(tmp_path.iterdir()) == []
    for more, said in ((["--seeds", "0"], "--seeds: 1 is the least"), (["batch=30"], "batch")):
        with pytest.raises(ValueError, match=said):
            sweep.main([*words, *more, "--dry-run"])


def test_results_are_mean_and_deviation_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.sweep(tmp_path / "s")
    assert sweep.main(["--table", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["optim.lr", "done", "psnr", "loss/a"]
    assert lines[1].split() == ["1e-3", "2/2", "20.5", "±", "0.71", "not", "finite"]
    assert lines[2].split() == ["2e-3", "1/2", "22", "not", "finite"]
    told = json.loads((folder / "results.json").read_text())
    assert told["groups"][0]["figures"]["psnr"]["mean"] == 20.5 and told["runs"][3]["figures"] == {}
    assert told["groups"][1]["figures"]["psnr"] == {"mean": 22.0, "deviation": None}
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert rows[0]["psnr"] == "20.0" and rows[3] == {
        "run": "optim.lr=2e-3,seed=1",
        "optim.lr": "2e-3",
        "seed": "1",
        "psnr": "",
        "loss/a": "",
    }
    with pytest.raises(ValueError, match=r"is no sweep's folder"):
        sweep.main(["--table", str(tmp_path)])


def test_nothing_is_left_of_a_sweep_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: object) -> None:
        raise ValueError("sbatch: no")

    monkeypatch.setattr(submit, "describe", dict)
    monkeypatch.setattr(sweep, "describe", dict)
    monkeypatch.setattr(submit.Job, "check", lambda self: None)
    monkeypatch.setattr(submit.Job, "send", refuses)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"time": 10}))
    folder, elements = expand("optim.lr=1e-3,2e-3", f"run={tmp_path}/s")
    job = sweep.plan(folder, elements, clusters.load(tmp_path / "cluster.yaml"), at_once=None)
    with pytest.raises(ValueError, match="sbatch: no"):
        sweep.send(job, elements, command=[], root=starts.ROOT)
    assert not folder.exists()
    (folder / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is a run itself; give the sweep a folder of its own"):
        sweep.send(job, elements, command=[], root=starts.ROOT)


def test_more_runs_than_anyone_means_are_refused_at_once(tmp_path: Path) -> None:
    words = [str(VAE), f"run={tmp_path}/s", "--seeds", "100000", "--cluster", str(CPU), "--dry-run"]
    with pytest.raises(ValueError, match=r"100,000 runs; a sweep has at most 10,000"):
        sweep.main(words)
