"""What `tandem logs` prints of made folders; tests/slurm follows a job over a requeue."""

import threading
import time
from pathlib import Path

import pytest

from launch import logs
from tests.launch import made

START = "tandem: job 12, start {}, rank 0 of 2 on node1, 2026-01-01 00:00:00\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = made.here(tmp_path / "a", alive=False)
    (run / "logs").mkdir()
    return run


def log(run: Path, name: str, text: str, mode: str = "w") -> None:
    with (run / "logs" / f"{name}.log").open(mode, newline="") as file:
        file.write(text)


def printed(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> list[str]:
    assert logs.main([str(run), *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_rank_0_of_the_newest_start_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(run, "11_0", "old\n")
    log(run, "12", "tandem: job 12, start 1: saved; starts again\n")
    log(run, "12_1", START.format(1) + "one\n")
    log(run, "12_0", START.format(1) + "zero\n" + START.format(2) + "zero again\ncut off")
    assert printed(capsys, run) == [START.format(2).strip(), "zero again", "cut off"]
    assert printed(capsys, run, "--starts", "all")[1] == "zero"
    assert printed(capsys, run, "--rank", "1")[-1] == "one"
    assert {"[1] one", "[0] zero again"} <= set(printed(capsys, run, "--rank", "all"))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("10%\r20%\r100%", "100%"),
        ("100%\r", "100%"),
        ("\x1b[32mgreen\x1b[0m \x1b[1;31mred\x1b[0m", "green red"),
        ("\x1b]0;title\x07text\x1b[?25l", "text"),
        ("bell\x07 \x08back", "bell back"),
        ("a\tb  ", "a\tb"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ],
)
def test_colours_bars_and_whatever_steers_a_terminal_are_cleaned(raw: str, text: str) -> None:
    assert logs.clean(raw + "\n") == text


def test_a_bar_is_its_last_state_and_empty_lines_stay(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(run, "12_0", "a\n\n\x1b[2K\r\n10%\r20%\rdone\nb \xff\n")
    assert printed(capsys, run) == ["a", "", "done", "b \xff"]


def test_a_log_that_grows_is_followed_in_whole_lines_until_the_run_is_over(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LOOK", 0.02)
    monkeypatch.setattr(logs, "ASK", 0.05)
    made.here(run)
    following = threading.Thread(target=logs.main, args=([str(run), "-f"],))
    following.start()
    seen = ""
    for name, text in (
        ("12_0", START.format(1) + "ha"),
        ("12_0", "lf\n"),
        ("12", "noise\ntandem: starts again\n"),
        ("12_0", "end"),
    ):
        log(run, name, text, "a")
        time.sleep(0.2)
        seen += capsys.readouterr().out
        assert "ha\n" not in seen and "noise" not in seen
    assert "half\n" in seen and "tandem: starts again\n" in seen and "end" not in seen
    made.ended(run, 0, "done")
    following.join(10)
    assert not following.is_alive()
    said = capsys.readouterr()
    assert said.out == "end\n" and said.err.endswith(f"tandem: {run}: done\n")


def test_what_cannot_be_shown_says_why(run: Path, tmp_path: Path) -> None:
    made.ended(run, 2, "a mistake")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text('{"elements": [{"folder": "lr=1", "values": {}}]}')
    made.heartbeat(tmp_path / "plain")
    for words, said in (
        ([str(run)], "no log yet of rank 0; it is failed: a mistake"),
        ([str(run), "--rank", "x"], "'x' is neither a rank nor all"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path / "sweep")], "is a sweep; name one of its runs: lr=1"),
        ([str(tmp_path / "plain")], "was not submitted"),
    ):
        with pytest.raises(ValueError, match=said):
            logs.main(words)
