"""What a user sees of an error: a mistake is one line and exit code 2, a bug keeps its traceback."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

USER_MISTAKE = 2  # the exit code of argparse and tyro for a bad command line
BUG = 1
INTERRUPTED = 130  # 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE: `tandem ... | head`
TERMINATED = 143  # 128 + SIGTERM
UNMET = 69  # the port at which the ranks of this start were to meet is taken; EX_UNAVAILABLE
HUNG = 70  # no progress for log.hang_after seconds
OUT_OF_MEMORY = 71
FAILED = 72  # RUN/failed: nobody should start this run again before a person has looked
ASKS_AGAIN = 75  # saved, and RUN/requeue asks for another start; EX_TEMPFAIL
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Ending(Exception):
    """Ends a run with one line and an exit code of its own."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def code_of(error: BaseException) -> int:
    """The exit code of a process that ends by `error`."""
    if isinstance(error, Ending):
        return error.code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return USER_MISTAKE if isinstance(error, (ValueError, OSError)) else BUG


def one_line(error: ValueError | OSError | Ending) -> str:
    """The error's text on one line, without Python's `[Errno 28]`: `No space left on device: runs/a/board`."""
    if isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        return f"{error.strerror}: {' -> '.join(names)}" if names else error.strerror
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """A failure of the system that names no file (a write to a full disk, a read of a bad one) names this one."""
    try:
        yield
    except OSError as error:
        if error.strerror and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def shown(text: str) -> str:
    """A line for a terminal: what could steer it (a name may hold anything) or has no sign is spelled out."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Ends a rank without Python's teardown, in which a thread of gloo that still lets go of its last tensor aborts the
    process (torch 2.13, ProcessGroupGloo::runLoop): a run that is done would end with 134. A signal that comes this
    late changes nothing."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it is gone
            stream.flush()
    os._exit(code)


def boundary(main: Callable[[list[str]], int], argv: list[str], *, report: Callable[[str], None] = to_stderr) -> int:
    """Runs `main(argv)` and returns the exit code of the process.

    ValueError and OSError are the user's to mend: `tandem: error: ...` and 2; so is Ending, with its own code. Ctrl-C
    is 130. Anything else is a bug:
    its traceback and 1. `python -X dev` shows the traceback of a user's mistake too. `report` gets the text; a launcher
    of several ranks passes its own, so that it can print the first failure only.
    """
    try:
        return main(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail again
        return BROKEN_PIPE
    except (ValueError, OSError, Ending) as error:
        if sys.flags.dev_mode:
            report(traceback.format_exc().rstrip())
        report(f"tandem: error: {shown(one_line(error))}")
        return code_of(error)
    except Exception:  # noqa: BLE001  reported in full
        report(traceback.format_exc().rstrip())
        return BUG
