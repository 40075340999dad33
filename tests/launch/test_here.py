"""`--cluster local`: the process that watches over runs of this machine, and one real training beneath it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from launch import cancel, cli, folders, here, process, state
from launch.here import Queue, Watched
from tests import starts
from tests.launch import made
from trainer import config as configuration

SCENE = Path(__file__).with_name("here_scene.py")


@pytest.fixture(autouse=True)
def scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here.local, "python", lambda module: [sys.executable, str(SCENE)])
    monkeypatch.setattr(here, "PAUSE", 0.1)
    monkeypatch.setattr(here, "LOOK", 0.05)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def waiting(folder: Path, *scenes: str) -> list[Path]:
    """A run for each scene."""
    runs = []
    for number, scene in enumerate(scenes):
        run = made.here(folder / f"run{number}")
        (run / "scene").write_text(scene)
        (run / "logs").mkdir()
        runs.append(run)
    return runs


def queue(runs: list[Path], **more: Any) -> Queue:
    options = {"processes": 1, "requeues": 1, "at_once": 1} | more
    return Queue("local-1", runs[0].parent, waiting=deque(map(Watched, runs)), **options)


def ends(run: Path) -> list[tuple[int, str | None]]:
    path = run / "submit" / "ends.jsonl"
    return [(line["code"], line["again"]) for line in map(json.loads, path.read_text().splitlines())]


def states(runs: list[Path]) -> list[str]:
    return [one.state for one in state.look(runs)[0]]


def test_runs_follow_each_other_and_start_again_by_the_rules_of_jobs(tmp_path: Path) -> None:
    runs = waiting(tmp_path, "0", "9 0", "9 9 0", "2", "75 75 0", "72")
    (runs[5] / "failed").write_text("3 starts in a row at 0 images\n")
    queue(runs).work()
    assert list(map(ends, runs)) == [
        [(0, None)],
        [(137, "failure"), (0, None)],
        [(137, "failure"), (137, None)],
        [(2, None)],
        [(75, "asked"), (75, "asked"), (0, None)],
        [(72, None)],
    ]
    assert states(runs) == ["done", "done", "failed", "failed", "done", "crash loop"]
    log = (runs[4] / "logs" / "local-1_0.log").read_text()
    assert log.count("begins") == 3 and "tandem: job local-1, start 3, 1 ranks, " in log
    assert "start 1: USR2 at 10 images; starts again" in (runs[4] / "logs" / "local-1.log").read_text()


def test_so_many_train_at_a_time_and_share_cores_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setattr(here.local, "cores", lambda: 16)
    runs = waiting(tmp_path, *["0"] * 4)
    queue(runs, at_once=2, processes=2).work()
    told = [(run / "starts").read_text().split() for run in runs]
    assert {gpus for _, gpus, _ in told} == {"4,5", "6,7"} and {threads for *_, threads in told} == {"4"}
    begun = sorted(float(words[0]) for words in told)
    assert begun[2] - begun[0] > 0.3  # the third waited for a place


def test_a_cancelled_run_saves_and_one_that_waits_never_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = waiting(tmp_path, "wait", "0", "deaf")
    working = threading.Thread(target=queue(runs, at_once=1).work)
    working.start()
    until((runs[0] / "starts").exists)
    until((runs[0] / "submit" / "process.json").exists)
    assert states(runs) == ["starting", "pending", "pending"]
    assert cancel.main([str(runs[0]), str(runs[1])]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"{runs[0]}: cancelled; saved at 10 of 64,000 images; `tandem resubmit {runs[0]}` goes on from there",
        f"{runs[1]}: cancelled; nothing was saved",
    ]
    until(lambda: (runs[2] / "starts").exists() and states(runs)[2] == "starting")
    assert cancel.main([str(runs[2]), "--wait", "0.5"]) == 1
    assert "not over after 0.5 s; `tandem cancel` again ends it at once" in capsys.readouterr().err
    assert cancel.main([str(runs[2])]) == 0
    working.join(10)
    assert list(map(ends, runs)) == [[(130, None)]] * 3 and not (runs[1] / "starts").exists()
    assert cancel.main([str(runs[2])]) == 0
    assert capsys.readouterr().out.endswith(f"{runs[2]}: is over already: cancelled\n")


def test_a_run_whose_watcher_is_gone_can_be_cancelled_still(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = waiting(tmp_path, "wait")
    made.here(run, alive=False)
    words = [sys.executable, str(SCENE), "train", str(run / "submit" / "config.yaml")]
    with subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as child:
        folders.write_json(run / "submit" / "process.json", process.identity(child.pid) | {"time": time.time()})
        until((run / "starts").exists)
        assert states([run]) == ["starting"]
        time.sleep(0.2)
        assert cancel.main([str(run), "--wait", "0"]) in (0, 1)
        assert child.wait(10) == 130
    assert states([run]) == ["failed"]


def test_the_end_of_the_machine_lets_all_of_them_save(tmp_path: Path) -> None:
    runs = waiting(tmp_path, "wait", "0")
    given = {"job": "local-1", "folder": str(tmp_path), "runs": list(map(str, runs)), "processes": 1, "requeues": 1}
    folders.write_json(tmp_path / "queue.json", given | {"at_once": 1})
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def shut_down() -> None:
        until((runs[0] / "starts").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Thread(target=shut_down)
    timer.start()
    try:
        assert here.main([str(tmp_path / "queue.json")]) == 0
    finally:
        timer.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert list(map(ends, runs)) == [[(130, None)], [(130, None)]] and (runs[0] / "checkpoints").exists()


def until(done: Any, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_sweep_of_real_trainings_on_this_machine(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Submitted, followed to its end, its figures in the table and on TensorBoard's page."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    config = starts.ROOT / "configs" / "vae_fashion.yaml"
    words = [f"data.path={few}", "images=128", "log.every=64", "log.pictures_every=0", "log.evaluate_every=0"]
    swept = ["optim.lr=1e-3,2e-3", "run=runs/s", "--cluster", "local", "cluster.processes=1", "--max-running", "2"]
    assert cli.dispatch(["sweep", str(config), *words, *swept]) == 0
    assert "2 runs in runs/s; `tandem status runs/s` shows them" in capsys.readouterr().out
    runs = folders.elements(Path("runs/s"))
    with pytest.raises(ValueError, match="tandem cancel"):
        cli.dispatch(["sweep", str(config), *words, *swept])
    assert cli.dispatch(["logs", str(runs[1]), "-f"]) == 0
    assert "everything is in" in capsys.readouterr().out
    until(lambda: states(runs) == ["done", "done"], 120)
    assert cli.dispatch(["status"]) == 0
    told = capsys.readouterr().out
    assert "runs/s: all runs are done" in told and "psnr" in told
    figures = folders.read_json(runs[0] / "finished")["figures"]
    assert f"{figures['psnr']:.4g}" in told
    assert configuration.load(runs[1] / "submit" / "config.yaml", []).optim.lr == 2e-3
    assert hparams(Path("runs/s")) == {1e-3, 2e-3}


def hparams(logdir: Path) -> set[float]:
    """Learning rates in TensorBoard's HPARAMS tab, each with its psnr."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import backend_context, list_session_groups
    from tensorboard.plugins.hparams.api_pb2 import ListSessionGroupsRequest, Status

    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(logdir))
    context = backend_context.Context(TBContext(data_provider=provider))
    metadata = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(
        RequestContext(), "", include_metrics=True, hparams_run_to_tag_to_content=metadata, data_provider_hparams=[]
    )
    request = ListSessionGroupsRequest(start_index=0, slice_size=10, allowed_statuses=[Status.STATUS_SUCCESS])
    found = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    assert experiment.hparam_infos and all(any(m.name.tag == "final/psnr" for m in g.metric_values) for g in found)
    return {group.hparams["optim.lr"].number_value for group in found}


def test_a_run_whose_folder_is_gone_ends_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gone, other = (Watched(tmp_path / name) for name in ("gone", "other"))
    made.submitted(other.run)
    (other.run / "logs").mkdir()
    queue = Queue(
        "local-1", tmp_path, 1, requeues=0, at_once=2, waiting=deque([gone, other]), ended_by=[signal.SIGTERM]
    )
    queue.work()
    assert "it is given up" in capfd.readouterr().out
    assert json.loads((other.run / "submit" / "ends.jsonl").read_text())["reason"] == "cancelled before it began"
