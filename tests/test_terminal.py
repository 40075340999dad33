"""What a person sees: a bar where there is a terminal, plain lines where there is none."""

import io
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.terminal import NoTerminal, Terminal, open_terminal

LOSSES = {"kl/nats": 9.0, **{f"loss/generator/l{i}": 1.23456789 * 10**i for i in range(6)}}
RUN = """
from trainer.terminal import open_terminal
terminal = open_terminal(total=1000, start=100)
terminal.note("goes on from [bold]here[/bold]")
terminal.advance(150)
terminal.report(200, {"loss/generator/adversarial": 1.25})
terminal.note("evaluated")
terminal.finish("done: runs/a")
"""


def run_in_pty(columns: int) -> str:
    """What the program writes to a real terminal of that width."""
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TERM": "xterm-256color",
        "COLUMNS": str(columns),
    }
    for name in ("NO_COLOR", "CI"):
        env.pop(name, None)
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=slave, stderr=slave, stdin=slave, env=env) as process:
        os.close(slave)
        output = b""
        while select.select([master], [], [], 60)[0]:
            try:
                block = os.read(master, 65536)
            except OSError:  # Linux: the other side is closed
                break
            if not block:
                break
            output += block
    os.close(master)
    assert process.returncode == 0, output
    return output.decode()


def test_a_terminal_shows_a_bar_with_speed_time_left_and_losses() -> None:
    output = run_in_pty(160)
    assert "\x1b[" in output and "━" in output
    assert re.search(
        r"200 of 1,000 images \(20\.0%\).*images/s, \d+:\d\d:\d\d left, generator/adversarial 1\.25", output
    )


def test_a_narrow_terminal_keeps_the_bar_and_drops_whole_numbers() -> None:
    last = run_in_pty(60).split("200 of 1,000 images (20.0%)")[-1]
    assert "━" in last and "adversarial" not in last and "…" not in last


def test_notes_stay_above_the_bar_and_the_last_line_is_plain() -> None:
    output = run_in_pty(160)
    screen = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r ") for line in output.split("\n")]
    assert any(line.endswith("goes on from [bold]here[/bold]") for line in screen)
    assert any(line.endswith("evaluated") for line in screen)
    assert [line for line in screen if line][-1] == "done: runs/a"
    assert output.rstrip().endswith("done: runs/a"), "nothing of the bar is drawn after the last line"
    assert output.rindex("\x1b[?25h") < output.rindex("done"), "the cursor is back"


def test_a_file_gets_plain_lines_without_control_characters() -> None:
    stream = io.StringIO()
    terminal = Terminal(total=1_000_000, start=64_000, seconds=0.0, stream=stream)
    terminal.note("goes on from [bold]here[/bold]")
    terminal.advance(64_500)
    terminal.report(65_000, LOSSES)
    terminal.finish("done: runs/a")
    note, report, last = stream.getvalue().splitlines()
    assert (note, last) == ("goes on from [bold]here[/bold]", "done: runs/a")
    assert re.fullmatch(
        r"65,000 of 1,000,000 images \(6\.5%\), [\d,.]+ images/s, .*\d:\d\d:\d\d left, "
        r"generator/l0 1\.235, generator/l1 12\.35, generator/l2 123\.5, generator/l3 1235",
        report,
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stream.getvalue())


def test_a_file_gets_at_most_one_report_in_an_interval_but_always_the_last() -> None:
    stream = io.StringIO()
    terminal = Terminal(total=300, seconds=3600.0, stream=stream)
    for images in range(1, 301):
        terminal.report(images, {})
    assert [line.split(" of ")[0] for line in stream.getvalue().splitlines()] == ["1", "300"]


def test_speed_and_time_left_come_from_the_last_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1000.0, *(1000.0 + 2.0 * i for i in range(1, 20))])  # a slow first report: compilation
    monkeypatch.setattr("trainer.terminal.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    terminal = Terminal(total=2_000, seconds=0.0, stream=stream)
    for images in range(100, 2_001, 100):
        terminal.report(images, {})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "100 of 2,000 images (5.0%), 0.10 images/s, 5:16:40 left"
    assert lines[14] == "1,500 of 2,000 images (75.0%), 50 images/s, 0:00:10 left"
    assert lines[-1] == "2,000 of 2,000 images (100.0%), 50 images/s, 0:00:00 left"


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = open_terminal(total=10, enabled=False)
    terminal.note("a")
    terminal.advance(1)
    terminal.report(1, LOSSES)
    terminal.finish("b")
    terminal.close()
    assert capsys.readouterr() == ("", "")
    assert {n for n in vars(Terminal) if not n.startswith("_")} == {
        n for n in vars(NoTerminal) if not n.startswith("_")
    }
