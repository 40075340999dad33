"""python -m tools.bench.data plan|read ...: what the data plane costs. Each has a --help."""

import importlib
import sys

from trainer.errors import boundary

BENCHES = ("plan", "read")


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in BENCHES:
        raise ValueError(f"usage: python -m tools.bench.data {'|'.join(BENCHES)} ...; each has a --help")
    bench = importlib.import_module(f"tools.bench.data.{argv[0]}")
    return int(bench.main(argv[1:]))


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))
