"""Shards that a program writes to its standard output: `pipe:PROGRAM ARGUMENT ... {name}`, started without a shell."""

import os
import re
import selectors
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import BinaryIO

from trainer.data.fetched import Pace, TryAgain
from trainer.data.growing import Part
from trainer.data.remote import redacted, refuse_secrets

_READ = 1 << 20  # bytes at a time


_SECRET = re.compile(
    r"(?i)(?:token|secret|passw(?:or)?d|passwd|api[-_]?key|access[-_]?key|credentials?|signature|authorization|bearer)"
)
_PLACE = re.compile(r"(?i)file|path|dir|env|fd|name")


class Program:
    """The source behind a program. The command stands in the run's config, checkpoints and board, so it must hold no
    secret: what looks like one is refused. Its arguments are in no message."""

    def __init__(self, command: str, split: str, *, timeout: float) -> None:
        """command: words as a shell would split them; {name} becomes train/index.json, train/train-00000.tar ...
        timeout: seconds without a byte."""
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"data.path: pipe: is not a command ({error})") from None
        if not any("{name}" in word for word in self._words[1:]):
            raise ValueError("data.path: pipe: needs an argument with {name} in it, in whose place the file is named")
        for word in self._words:
            _refuse_secret(word)
        self._split, self._timeout = split, timeout
        self._program = Path(self._words[0]).name
        self.name = f"pipe:{self._program}:{split}"
        self.key = f"{command}\n{split}"

    def names(self) -> list[str]:
        raise ValueError(
            f"data.path: {self.name}: a program cannot list its shards; make an index with `tandem data index` where "
            "they are and let it give index.json too"
        )

    def more(self, name: str, part: Part) -> bool:
        """The whole file: a program cannot go on in the middle."""
        part.restart()
        argv = [word.replace("{name}", f"{self._split}/{name}") for word in self._words]
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, start_new_session=True
                )
            except OSError as error:
                raise ValueError(f"data.path: {self.name}: {self._program}: {error.strerror}") from None
            with process:
                try:
                    self._read(process, part)
                    process.wait(self._timeout)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise TryAgain(f"{self._program} did not end") from None
                except BaseException:
                    os.killpg(process.pid, signal.SIGKILL)  # a stalled one, and what it started
                    raise
            if process.returncode:
                raise TryAgain(f"{self._program} ended with exit code {process.returncode}{self._last(said, argv)}")
        return True

    def _read(self, process: "subprocess.Popen[bytes]", part: Part) -> None:
        assert process.stdout is not None
        output, pace = process.stdout.fileno(), Pace(self._timeout)
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while True:
                if not selector.select(self._timeout):
                    raise TryAgain(f"{self._program} gave no byte for {self._timeout:g} s")
                block = os.read(output, _READ)
                if not block:
                    return
                pace(len(block))
                part.write(block)

    def _last(self, said: BinaryIO, argv: list[str]) -> str:
        """The last line that the program wrote to its standard error, without its arguments."""
        said.seek(0, os.SEEK_END)
        said.seek(max(0, said.tell() - 1000))
        lines = said.read().decode("utf-8", "backslashreplace").split("\n")
        line = redacted(next((line.strip() for line in reversed(lines) if line.strip()), ""))
        for word in argv[1:]:
            for part in (word, *re.split("[=:]", word)):
                if len(part) > 5 and " " not in part.strip() and self._split not in part:
                    line = line.replace(part, "...")
        return f": {line[:200]}" if line else ""


def _refuse_secret(word: str) -> None:
    """ValueError for --token=..., "Authorization: ...", https://user:password@... and their like; a name of a file or a
    variable that holds one is none."""
    if "://" in word:
        refuse_secrets(word)
    found = _SECRET.search(word)
    if found and not _PLACE.search(word[found.end() :].partition("=")[0]):
        raise ValueError(
            f"data.path: pipe: {found[0]} in an argument may be a secret, and the command stands in the run's config "
            "and on its board; let the program read it from its environment or from a file"
        )
