"""What a user sees of an error."""

import errno
import subprocess
import sys
from collections.abc import Callable

import pytest

from trainer.errors import boundary, naming


def failing(error: BaseException) -> Callable[[list[str]], int]:
    def main(_argv: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("optim.lrr: no such key; nearest: lr"), "optim.lrr: no such key; nearest: lr"),
        (ValueError("two\n  lines\n"), "two; lines"),
        (ValueError(), "ValueError"),
        (
            ValueError("\u00fc\x1b]0;title\x07\udcfe: is empty"),
            r"\u00fc\x1b]0;title\x07\udcfe: is empty".replace(r"\u00fc", "\u00fc"),
        ),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "No space left on device: runs/a"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("the file is cut short"), "the file is cut short"),
        (PermissionError(errno.EACCES, "Permission denied", b"runs"), "Permission denied: runs"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "Invalid cross-device link: a -> b"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_and_code_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert boundary(failing(error), []) == 2
    assert capsys.readouterr() == ("", f"tandem: error: {line}\n")


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert boundary(failing(KeyError("lost")), []) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("KeyError: 'lost'\n")


def test_an_interrupt_is_code_130_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert boundary(failing(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr() == ("", "")


def test_main_gets_the_arguments_and_its_code_is_returned() -> None:
    assert boundary(len, ["a", "b", "c"]) == 3


def test_a_reporter_gets_the_text_instead_of_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    boundary(failing(ValueError("no")), [], report=said.append)
    assert said == ["tandem: error: no"]
    assert capsys.readouterr() == ("", "")


def test_development_mode_shows_the_traceback_of_a_mistake_too() -> None:
    script = "import sys; from trainer.errors import boundary; sys.exit(boundary(lambda argv: int('x'), []))"
    ran = subprocess.run([sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("Traceback")
    assert ran.stderr.endswith("tandem: error: invalid literal for int() with base 10: 'x'\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: data/a"),
        (OSError(errno.ENOENT, "No such file or directory", "other"), "No such file or directory: other"),
        (OSError("the file is cut short"), "the file is cut short"),
        (ValueError("no"), "no"),
    ],
)
def test_a_failure_of_the_system_without_a_name_gets_one(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_argv: list[str]) -> int:
        with naming("data/a"):
            raise error

    assert boundary(main, []) == 2
    assert capsys.readouterr().err == f"tandem: error: {line}\n"


def test_a_rank_leaves_with_its_code_and_all_that_it_said() -> None:
    script = "import atexit; from trainer.errors import leave; atexit.register(print, 'torn down');"
    script += "print('said', end=''); leave(3)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "said", "")
