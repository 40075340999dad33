"""The table of trainer/parallel/README.md: how far two ranks under ZeRO are from one process.

    python -m tests.parallel.table

Starts what the tests start, two processes and one, and prints the table; about 5 minutes of two cores.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.parallel.cases import METHODS
from tests.parallel.conftest import start
from tests.parallel.test_zero import worst
from tests.parallel.zero import MIXED, STAGES, cases

BOUNDS = (1e-6, 3e-6, 1e-5)
COLUMNS = [f"ZeRO-{stage}" for stage in STAGES]
PAGE = Path(__file__).resolve().parents[2] / "trainer/parallel/README.md"


def measured(zero: Path, starts: Path) -> dict[tuple[str, str], float]:
    """(row, column) -> the largest difference over optimisers, clipping and accumulation."""
    found: dict[tuple[str, str], float] = {}
    for case in cases():
        row = case.method if case.discriminator is None else f"{case.method}, discriminator at {case.discriminator}"
        place = row, f"ZeRO-{case.stage}"
        found[place] = max(found.get(place, 0.0), worst(zero, starts, case))
    return found


def render(figures: Mapping[tuple[str, str], float]) -> list[str]:
    """Lines of markdown; a cell is the least of BOUNDS that holds, with room for another machine's rounding."""
    rows = [*METHODS, *(f"gan, discriminator at {discriminator}" for _, discriminator in MIXED)]

    def cell(value: float | None) -> str:
        if value is None:
            return ""
        return f"{next((bound for bound in BOUNDS if 1.5 * value < bound), BOUNDS[-1]):.0e}".replace("e-0", "e-")

    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    return lines + [f"| {row} | {' | '.join(cell(figures.get((row, column))) for column in COLUMNS)} |" for row in rows]


def stated(page: str) -> dict[tuple[str, str], float]:
    """(row, column) -> the bound that the page has in its cell."""
    lines = page.splitlines()
    first = lines.index(f"| | {' | '.join(COLUMNS)} |")
    found = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        row, *cells = (part.strip() for part in line.strip("|").split("|"))
        found |= {(row, column): float(text) for column, text in zip(COLUMNS, cells, strict=True) if text}
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        start("tests.parallel.worker", out, processes=1)
        start("tests.parallel.zero", out, processes=2)
        print("\n".join(render(measured(out, out))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
