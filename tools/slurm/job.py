"""A submitted run as tests and the soak watch it."""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@dataclass
class Submitted:
    run: Path
    number: str

    def show(self) -> dict[str, str]:
        words = scontrol("show", "job", "-o", self.number).split()
        return dict(word.partition("=")[::2] for word in words)

    def state(self) -> str:
        return self.show()["JobState"]

    def wait(self, *states: str, seconds: float = 120) -> "Submitted":
        """Until it is in one of `states`, or over."""
        limit = time.monotonic() + seconds
        while (found := self.state()) not in (states or OVER):
            assert time.monotonic() < limit, f"{self.run.name}: still {found}\n{self.said()}"
            time.sleep(0.2)
        return self

    def begun(self, starts: int = 1, seconds: float = 60) -> "Submitted":
        """Until so many starts have begun to count."""
        limit = time.monotonic() + seconds
        while len(self.lines("attempts.jsonl")) < starts:
            assert time.monotonic() < limit, f"{self.run.name}: {self.state()}\n{self.said()}"
            time.sleep(0.1)
        return self

    def wait_for(self, text: str, seconds: float = 90) -> None:
        """Until rank 0 has printed `text`."""
        limit = time.monotonic() + seconds
        while text not in self.log(0):
            assert time.monotonic() < limit and self.state() not in OVER, self.said()
            time.sleep(0.05)

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.run / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ends(self) -> list[tuple[int, str | None]]:
        """(exit code, why it was started again) of each start that came to the batch script's end."""
        return [(line["code"], line["again"]) for line in self.lines("submit/ends.jsonl")]

    def log(self, rank: int | None = None) -> str:
        """What a rank printed, or the batch script."""
        path = self.run / "logs" / (f"{self.number}.log" if rank is None else f"{self.number}_{rank}.log")
        return path.read_text() if path.exists() else ""

    def said(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted((self.run / "logs").glob("*")))


def scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True, timeout=60).stdout
