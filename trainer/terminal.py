"""What a person sees while a run trains: a progress bar on a terminal, plain lines in a file or a pipe."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

SHOWN = 4  # losses beside the bar
WINDOW = 10  # reports over which the speed is taken
BAR = 24  # columns


class Terminal:
    """A bar with images/s, time left and a few losses; notes print above it. See `open_terminal`.

    Where `stream` is no terminal: a line for a report, at most one in `seconds`, without carriage returns and colours.
    """

    def __init__(self, *, total: int, start: int = 0, seconds: float = 10.0, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._total, self._seconds = total, seconds
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), start)], maxlen=WINDOW + 1)
        self._printed = -float("inf")
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.fields[share]}", markup=False),
                BarColumn(bar_width=BAR),
                TextColumn("{task.fields[told]}", markup=False),
                console=Console(file=self._stream),
                refresh_per_second=4,  # its thread takes the interpreter's lock from the training loop
            )
            self._task = self._bar.add_task("", total=total, completed=start, share=self._share(start), told="")
            self._bar.start()

    def advance(self, images: int) -> None:
        """Moves the bar to `images` images seen; cheap enough for every step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=images, share=self._share(images))

    def report(self, images: int, values: Mapping[str, float]) -> None:
        """Shows the speed, the time left, and the first values whose tag begins with `loss/`."""
        now = time.monotonic()
        self._seen.append((now, images))
        parts = [*self._pace(), *_losses(values)]
        told = ", ".join(parts)
        if self._bar is not None:
            while parts and len(self._share(images)) + BAR + len(told) + 3 > self._bar.console.width:
                told = ", ".join(parts := parts[:-1])  # whole numbers or none: the bar itself must stay in sight
            self._bar.update(self._task, completed=images, share=self._share(images), told=told)
        elif now - self._printed >= self._seconds or images >= self._total:
            self._printed = now
            self._print(f"{self._share(images)}, {told}" if told else self._share(images))

    def note(self, line: str) -> None:
        """A line that stays: above the bar, or between the reports."""
        if self._bar is not None:
            self._bar.console.print(Text(line), soft_wrap=True)
        else:
            self._print(line)

    def finish(self, line: str) -> None:
        """Takes the bar away and prints the last line: what was written where."""
        self.close()
        self._print(line)

    def close(self) -> None:
        """Gives the terminal back as it was; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _share(self, images: int) -> str:
        return f"{images:,} of {self._total:,} images ({images / self._total:.1%})"

    def _pace(self) -> list[str]:
        """Images per second over the last reports, and the time that the rest takes at this speed."""
        (before, start), (now, images) = self._seen[0], self._seen[-1]
        if now <= before or images <= start:
            return []
        speed = (images - start) / (now - before)
        left = timedelta(seconds=round((self._total - images) / speed))
        return [f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.2f} images/s", f"{left} left"]


class NoTerminal:
    """Takes what Terminal takes and shows nothing: for ranks other than 0."""

    def advance(self, images: int) -> None: ...

    def report(self, images: int, values: Mapping[str, float]) -> None: ...

    def note(self, line: str) -> None: ...

    def finish(self, line: str) -> None: ...

    def close(self) -> None: ...


def open_terminal(*, total: int, start: int = 0, enabled: bool = True) -> Terminal | NoTerminal:
    """What shows a run of `total` images that goes on from `start`; `enabled` is false on all ranks but 0."""
    return Terminal(total=total, start=start) if enabled else NoTerminal()


def _losses(values: Mapping[str, float]) -> list[str]:
    losses = [(tag.removeprefix("loss/"), value) for tag, value in values.items() if tag.startswith("loss/")]
    return [f"{name} {value:.4g}" for name, value in losses[:SHOWN]]
