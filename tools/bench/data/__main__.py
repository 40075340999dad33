"""python -m tools.bench.data plan|read|wait ...: what the data plane costs. Each has a --help."""

import importlib
import sys

from trainer.errors import boundary

BENCHES = ("plan", "read", "wait")


def main(argv: list[str]) -> int:
    usage = f"usage: python -m tools.bench.data {'|'.join(BENCHES)} ...; each has a --help"
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    if not argv or argv[0] not in BENCHES:
        raise ValueError(usage)
    bench = importlib.import_module(f"tools.bench.data.{argv[0]}")
    return int(bench.main(argv[1:]))


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))
