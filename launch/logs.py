"""`tandem logs`: what the ranks of a run print, over its starts."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import folders, state
from trainer.errors import to_stderr

HELP = """\
Print what rank 0 of a run printed in its newest start. With -f what comes from now on too, over all further starts,
until the job has ended, with the lines in which the job says why it starts again.
"""
EXAMPLE = """\
examples:
  tandem logs runs/vaegan_fashion
  tandem logs runs/vaegan_fashion -f --rank all
"""
BANNER = re.compile(rb"^tandem: job \S+, start \d+, ", re.MULTILINE)
STEERING = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
"""Sequences that colour a terminal, move its cursor, or set its title (ECMA-48)."""
TELLS = re.compile(r"^(tandem: |srun: error: |slurmstepd: error: |sbatch: error: )")
"""Lines of the batch script's log that a person wants to see."""
LOOK, ASK = 0.3, 3.0  # seconds between looks at the files, and between questions how the job is doing


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem logs",
        description=HELP,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a submitted run")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    parser.add_argument("--rank", default="0", metavar="N", help="of another rank, or all (default: 0)")
    parser.add_argument(
        "--starts", choices=("last", "all"), default="last", help="of all starts of the job, or the last"
    )
    options = parser.parse_args(argv)
    if options.rank != "all" and not options.rank.isdecimal():
        raise ValueError(f"--rank: {options.rank!r} is neither a rank nor all")
    run: Path = options.run
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder")
    if folders.is_sweep(run):
        raise ValueError(f"{run} is a sweep; name one of its runs: {', '.join(p.name for p in folders.elements(run))}")
    if not (run / "submit" / "job.json").exists():
        raise ValueError(f"{run}: was not submitted; what it prints goes to the terminal where it was started")
    rank = None if options.rank == "all" else int(options.rank)
    if options.follow:
        return follow(run, rank, whole=options.starts == "all")
    files = newest(run, rank)
    if not files:
        (now,), _ = state.look([run])
        raise ValueError(
            f"{run}: no log yet of rank {options.rank}; it is {now.state}{f': {now.why}' if now.why else ''}"
        )
    for file in files:
        reader = Reader(file, _prefix(file, rank), begin=0 if options.starts == "all" else last_start(file))
        for line in (*reader.lines(), *reader.rest()):
            print(line)
    return 0


def newest(run: Path, rank: int | None) -> list[Path]:
    """The logs of a rank, or of all by rank, of the job that wrote last."""
    wanted = "*" if rank is None else str(rank)
    found = [path for path in (run / "logs").glob(f"*_{wanted}.log") if path.stem.rpartition("_")[2].isdecimal()]
    if not found:
        return []
    last = max(found, key=lambda path: path.stat().st_mtime).stem.rpartition("_")[0]
    return sorted((path for path in found if path.stem.rpartition("_")[0] == last), key=_rank)


def last_start(path: Path) -> int:
    """The byte at which what the last start printed begins."""
    return max((found.start() for found in BANNER.finditer(path.read_bytes())), default=0)


def clean(line: str) -> str:
    """Without colours, and of what a carriage return has written over itself only the last."""
    parts = [part for part in STEERING.sub("", line).rstrip("\r\n").split("\r") if part.strip()]
    text = parts[-1] if parts else ""
    return "".join(sign if sign.isprintable() or sign == "\t" else "" for sign in text).rstrip()


@dataclass
class Reader:
    """Whole lines of a file that grows."""

    path: Path
    prefix: str = ""
    begin: int = 0
    only: "re.Pattern[str] | None" = None
    """Of which lines; None: all."""
    _cut: bytes = b""

    def lines(self) -> list[str]:
        """Those that have come since."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin)
                came = file.read()
        except FileNotFoundError:
            return []
        self.begin += len(came)
        *whole, self._cut = (self._cut + came).split(b"\n")
        return self._shown(whole)

    def rest(self) -> list[str]:
        """What came last and does not end with a line's end."""
        cut, self._cut = self._cut, b""
        return self._shown([cut] if cut else [])

    def _shown(self, came: Sequence[bytes]) -> list[str]:
        cleaned = [clean(line.decode(errors="replace")) for line in came]
        bars = [not line and came[index].strip() != b"" for index, line in enumerate(cleaned)]
        kept = [line for line, bar in zip(cleaned, bars, strict=True) if not bar]  # nothing but a bar's steering
        return [self.prefix + line for line in kept if self.only is None or self.only.match(line)]


def follow(run: Path, rank: int | None, *, whole: bool) -> int:
    """Prints until the job is over. Ctrl-C ends the following, not the job."""
    readers: dict[Path, Reader] = {}
    asked, over, told = 0.0, False, ""
    while True:
        batch = max((run / "logs").glob("[!.]*.log"), key=_written, default=None)
        for file in newest(run, rank):
            if file not in readers:
                begin = 0 if whole or readers else last_start(file)
                readers[file] = Reader(file, _prefix(file, rank), begin=begin)
        if batch is not None:
            own = batch.with_name(f"{batch.stem.partition('_')[0]}.log")
            if own not in readers:
                begin = own.stat().st_size if own.exists() and not whole else 0
                readers[own] = Reader(own, "", begin=begin, only=TELLS)
        for reader in list(readers.values()):
            for line in (*reader.lines(), *(reader.rest() if over else ())):
                print(line, flush=True)
        if over:
            return 0
        if time.monotonic() - asked > ASK:
            (now,), _ = state.look([run])
            asked = time.monotonic()
            over = not now.active and now.state != "unknown"
            said = f"{now.state}{f': {now.why}' if now.why else ''}"
            if over or (now.state in ("pending", "requeued") and said != told):
                to_stderr(f"tandem: {run}: {said}")
            told = said
        time.sleep(LOOK)


def _prefix(file: Path, rank: int | None) -> str:
    return f"[{_rank(file)}] " if rank is None else ""


def _rank(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _written(path: Path) -> float:
    return path.stat().st_mtime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
