"""What of a set in the making is done: noted in DEST/.unfinished/state.json after every shard, before the shard gets
its name, so that no file of the set is there without a note."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer import durable
from trainer.data.build import Draft
from trainer.data.part import UNFINISHED


@dataclass(frozen=True)
class Step:
    """The items of one shard."""

    following: int
    """Number of the first item behind them."""
    made: Draft | None
    """None where none of them could be used."""
    image: str | None
    """The field of the image, where samples hold several."""
    converted: Mapping[str, int]
    left_out: Sequence[tuple[str, str]]
    """Name and reason."""


class State:
    """steps: of each split, in the order of its items; step n makes shard n."""

    def __init__(self, dest: Path, options: Any, steps: dict[str, list[Step]]) -> None:
        self.path = dest / UNFINISHED / "state.json"
        self.options, self.steps = options, steps

    @classmethod
    def load(cls, dest: Path) -> "State | None":
        """None where nothing is noted. ValueError: not readable."""
        path = dest / UNFINISHED / "state.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            steps = {split: [_step(**step) for step in part] for split, part in found["steps"].items()}
            return cls(dest, found["options"], steps)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"is not readable ({type(error).__name__}: {error})"
            raise ValueError(f"{path}: {what}; remove {dest} and make the set again") from None

    def note(self, split: str, number: int, step: Step) -> None:
        self.steps[split][number:] = [step, *self.steps[split][number + 1 :]]
        self.save()

    def save(self) -> None:
        steps = {split: list(map(asdict, part)) for split, part in self.steps.items()}
        aside = self.path.with_name(f".{self.path.name}.part")
        durable.write_text(aside, json.dumps({"options": self.options, "steps": steps}))
        aside.replace(self.path)
        durable.flush(self.path.parent)

    def begin(self, split: str, number: int) -> int:
        """Number of the first item of a step."""
        return self.steps[split][number - 1].following if number else 0

    def items(self, split: str, number: int) -> range:
        """Their numbers."""
        return range(self.begin(split, number), self.steps[split][number].following)

    def drafts(self, split: str) -> list[Draft]:
        return [step.made for step in self.steps[split] if step.made]

    @property
    def image(self) -> str:
        return next((step.image for part in self.steps.values() for step in part if step.image), "auto")

    @property
    def report(self) -> dict[str, Any]:
        every = [step for part in self.steps.values() for step in part]
        converted: Counter[str] = Counter()
        for step in every:
            converted.update(step.converted)
        return {"converted": dict(converted), "left_out": [[*one] for step in every for one in step.left_out]}


def _step(
    *, following: int, made: Sequence[Any] | None, image: str | None, converted: Mapping[str, int],
    left_out: Sequence[tuple[str, str]],
) -> Step:  # fmt: skip
    """From what JSON made of one."""
    return Step(
        int(following), made and Draft.of(made), image, dict(converted), [(name, why) for name, why in left_out]
    )


def whole(path: Path, made: Draft) -> bool:
    """Whether a file is that shard, to the byte."""
    return os.stat(path).st_size == made.bytes and durable.sha256(path) == made.sha256  # noqa: PTH116
