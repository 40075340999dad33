"""A progress bar for what is done before a run: on stderr, where that is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[float], None]]:
    """Gives the function that moves it, by shards or parts of one."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # here: most starts need none
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    shards = "shard" if total == 1 else "shards"
    text = TextColumn(f"{{task.description}} {{task.completed:.0f}} of {{task.total}} {shards}")
    with Progress(text, BarColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
