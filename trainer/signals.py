"""What asks a run to stop, from the first line of its process to the last.

    SIGINT            a person: saves, exit code 130; a second one ends the process at once
    SIGTERM           the end: saves where `checkpoint.notice` allows that, 143
    SIGUSR2, SIGUSR1  the notice of a time limit or a preemption: saves, writes RUN/requeue, 75; no SIGTERM changes that

A handler notes and nothing else: between two updates the ranks agree on the largest request among theirs. Whoever
starts a process of ours may `hold` the signals before: none that comes in between is lost, or kills it.
"""

import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Literal

from trainer.errors import ASKS_AGAIN, INTERRUPTED, STOPS

AGAIN = 1 << 10
"""A request is the exit code of its signal; one to be started again is this + the signal's number: above all codes."""
NOTICES = (signal.SIGUSR1, signal.SIGUSR2)
SHOW_CURSOR = b"\x1b[?25h\n"


def exit_code(request: int) -> int:
    return ASKS_AGAIN if request >= AGAIN else request


def name(request: int) -> str:
    """`USR2` of a request."""
    return signal.Signals(request - (AGAIN if request >= AGAIN else 128)).name.removeprefix("SIG")


def hold() -> None:
    """Keeps signals waiting, over an exec too, until the process that is meant has its handlers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def release() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


class Signals:
    """`with Signals() as signals:` while inside, what comes sets `signals.request`. See `install` for what is outside.

    Before and after an error inside, SIGINT and SIGTERM end the process at once, as nothing could be saved, and a
    notice is kept for when training begins. After a good end nothing but SIGINT is listened to."""

    def __init__(self) -> None:
        self.request = 0
        """The gravest that came; 0: none. See AGAIN."""
        self.terminated: float | None = None
        """When the first SIGTERM came, of time.monotonic()."""
        self._stage: Literal["start", "train", "end"] = "start"
        self._interrupts = 0
        self._installed = False
        self._before: dict[int, object] = {}

    def install(self) -> None:
        """Takes the signals of the whole process; from here on a notice does not kill it."""
        self._installed = True
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else self._note)
        release()

    def seconds(self) -> float:
        """Since the first SIGTERM; 0 before."""
        return 0.0 if self.terminated is None else time.monotonic() - self.terminated

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._stage != "train" or self._interrupts > 1:
                if sys.stdout.isatty():
                    os.write(sys.stdout.fileno(), SHOW_CURSOR)  # the progress bar hid it
                os._exit(INTERRUPTED)  # the user does not want to wait for a save, nor for peers
        if self._stage == "end":
            return
        if number == signal.SIGTERM and self.terminated is None:
            self.terminated = time.monotonic()
        if number in NOTICES:
            signal.signal(signal.SIGTERM, self._note)  # the rest of the notice: no reason to leave before the save
        self.request = max(self.request, (AGAIN if number in NOTICES else 128) + number)

    def __enter__(self) -> "Signals":
        self._stage, self._interrupts = "train", 0
        self._before = {number: signal.signal(number, self._note) for number in STOPS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._installed:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        elif kind is not None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._stage = "end"


_OF_PROCESS: list[Signals] = []


def install() -> None:
    """For a process that is a rank, before it imports anything heavy."""
    _OF_PROCESS.append(Signals())
    _OF_PROCESS[-1].install()


def taken() -> Signals:
    """Those that `install` took, or new ones, which give the handlers back."""
    return _OF_PROCESS[-1] if _OF_PROCESS else Signals()
