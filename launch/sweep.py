"""`tandem sweep`: a run for each combination of values and each seed, as one job array of SLURM, or on this machine."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import cluster as clusters
from launch import folders, results, snapshot, submit
from launch.env import describe
from launch.here import LocalJob
from trainer import config as configuration
from trainer.config import Config
from trainer.errors import shown

HELP = """\
Train a config with each combination of several values of keys, and with several seeds: a job array of SLURM whose
elements are runs of their own, with one copy of the code. The sweep's folder is `run=FOLDER`, or the config's `run`
with _sweep behind; a run is a folder in it, such as optim.lr=1e-4,seed=0. When all are done, --table FOLDER shows their
last evaluation, mean and deviation over the seeds, and writes it as results.json and results.csv.
"""
EXAMPLE = """\
examples:
  tandem sweep configs/vae_fashion.yaml optim.lr=1e-3,2e-3 --seeds 3 --cluster configs/cluster/cpu.yaml --dry-run
  tandem sweep configs/vae_fashion.yaml optim.betas=[0.5,0.99],[0.9,0.99] --cluster local --max-running 2 --dry-run
  tandem sweep --table runs/vae_fashion_sweep
"""
OPEN, CLOSE = "[{(", "]})"
MOST = 10_000  # runs of a sweep
NAME = 120  # letters of a folder at most; file systems take 255


@dataclass(frozen=True)
class Element:
    """A run of a sweep."""

    values: dict[str, str]
    """What it is given beside what all have, the seed too."""
    config: Config
    folder: str
    """In the sweep's."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tandem sweep",
        description=HELP,
        epilog=EXAMPLE,
        usage="tandem sweep CONFIG key=value,value ... [--seeds N] --cluster FILE [--max-running N] [--dry-run]\n"
        "       tandem sweep --table FOLDER [--json | --csv]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG key=value,value", help="values between commas; [a,b] is one"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each combination, from `seed` on")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="such as configs/cluster/slurm.yaml; or: local")
    parser.add_argument("--max-running", type=int, metavar="N", help="runs at a time (default: SLURM's; local: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and the batch script, no more")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="show the results of a sweep")
    parser.add_argument("--json", action="store_true", help="the table for programs")
    parser.add_argument("--csv", action="store_true", help="a line a run")
    options, more = parser.parse_known_intermixed_args(argv)
    words = [*options.words, *more]
    if options.table is not None:
        if words or options.cluster or options.dry_run:
            raise ValueError("--table: stands alone, with the folder of a sweep")
        return table(options.table, as_json=options.json, as_csv=options.csv)
    if not words or options.cluster is None:
        raise ValueError("command line: a config and --cluster are needed; see `tandem sweep --help`")
    if options.seeds < 1 or (options.max_running is not None and options.max_running < 1):
        raise ValueError(f"--{'seeds' if options.seeds < 1 else 'max-running'}: 1 is the least")
    overrides, own = submit.sorted_words(words[1:])
    folder, elements = expand(Path(words[0]), overrides, seeds=options.seeds)
    job = plan(folder, elements, clusters.load(options.cluster, own), at_once=options.max_running)
    if options.dry_run:
        print("\n".join(f"# {job.run.name}/{one.folder}" for one in elements))
        print(submit.preview(job))
        return 0
    number = send(job, elements, command=["tandem", "sweep", *argv])
    print(f"job {number}: {len(elements)} runs in {folder}; `tandem status {folders.quoted(folder)}` shows them")
    return 0


# ---------------------------------------------------------------- which runs
def expand(path: Path, overrides: Sequence[str], *, seeds: int) -> tuple[Path, list[Element]]:
    """The sweep's folder and its runs, the seeds of a combination behind each other. ValueError names the key."""
    given = [word.partition("=")[::2] for word in overrides]
    axes = {key: parts for key, value in given if len(parts := split(value)) > 1}
    plain = [f"{key}={value}" for key, value in given if key not in axes]
    if "run" in axes:
        raise ValueError("run: one folder, of the sweep; its runs are named by their values")
    if "seed" in axes and seeds > 1:
        raise ValueError("seed: is given values, and --seeds too; leave one out")
    base = configuration.load(path, plain)
    named = any(key == "run" for key, _ in given)
    folder = base.run if named else base.run.with_name(f"{base.run.name}_sweep")
    if not axes and seeds == 1:
        raise ValueError("command line: a sweep needs several values of a key (optim.lr=1e-4,3e-4), or --seeds N")
    many = math.prod(map(len, axes.values())) * (1 if "seed" in axes else seeds)
    if many > MOST:
        raise ValueError(f"command line: {many:,} runs; a sweep has at most {MOST:,}: fewer values or seeds")
    found: list[Element] = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        for number in range(seeds):
            own = chosen if "seed" in chosen else {**chosen, "seed": str(base.seed + number)}
            name = folder_name(own)
            config = configuration.load(path, [*plain, *(f"{key}={value}" for key, value in own.items())])
            found.append(Element(own, dataclasses.replace(config, run=folder / name), name))
    _refuse_twins([dataclasses.replace(one.config, run=folder) for one in found], found)
    if len({one.folder for one in found}) < len(found):  # values that differ in signs that no folder can have
        found = [
            dataclasses.replace(
                one,
                folder=f"{number:03d},{one.folder}",
                config=dataclasses.replace(one.config, run=folder / f"{number:03d},{one.folder}"),
            )
            for number, one in enumerate(found)
        ]
    return folder, found


def _refuse_twins(configs: Sequence[Config], elements: Sequence[Element]) -> None:
    """ValueError where two runs would be the same, such as those of 1e-3 and 0.001."""
    seen: dict[str, Element] = {}
    for config, one in zip(configs, elements, strict=True):
        first = seen.setdefault(repr(config), one)
        if first is not one:
            raise ValueError(f"command line: two runs would be the same: {first.folder} and {one.folder}")


def split(text: str) -> list[str]:
    """At commas outside brackets and quotes. ValueError where brackets do not match."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in OPEN:
            depth += 1
        elif sign in CLOSE:
            depth -= 1
        if depth < 0:
            break
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    if depth or quote:
        raise ValueError(f"command line: brackets or quotes do not match in {text!r}")
    parts = [part.strip() for part in parts]
    if len(parts) > 1 and not all(parts):
        raise ValueError(f"command line: a value is missing between the commas of {text!r}")
    return parts


def folder_name(values: dict[str, str]) -> str:
    """`optim.lr=1e-4,seed=0`, of signs that a folder, SLURM and a shell take as they are."""
    signs = {key: re.sub(r"[^\w.+-]+", "-", value, flags=re.ASCII).strip("-") or "-" for key, value in values.items()}
    name = ",".join(f"{key}={value}" for key, value in signs.items())
    return name if len(name) <= NAME else name[: NAME - 1] + "~"


# ---------------------------------------------------------------- their submission
def plan(
    folder: Path, elements: Sequence[Element], cluster: clusters.ClusterConfig, *, at_once: int | None
) -> submit.AnyJob:
    """One job of all. ValueError for what cannot work on so many ranks."""
    whole = submit.plan(dataclasses.replace(elements[0].config, run=folder), cluster)
    world = whole.processes if isinstance(whole, LocalJob) else whole.cluster.world
    for one in elements:
        submit.check_world(one.config, world)
    runs = tuple(whole.run / one.folder for one in elements)
    into = f"submit.{time.time_ns() // 1_000_000}"  # runs of an earlier submission need theirs
    if isinstance(whole, LocalJob):
        return dataclasses.replace(whole, elements=runs, at_once=at_once or 1, into=into)
    return dataclasses.replace(whole, elements=runs, at_once=at_once, into=into)


def send(job: submit.AnyJob, elements: Sequence[Element], *, command: list[str], root: Path = snapshot.ROOT) -> str:
    """Copies the code once and each run's config, and submits all; returns SLURM's id of the array."""
    sweep = job.run
    if (sweep / "checkpoints").exists() or (sweep / "attempts.jsonl").exists():
        raise ValueError(f"run: {sweep} is a run itself; give the sweep a folder of its own: run=FOLDER")
    job.check()
    new = not sweep.exists()
    sweep.mkdir(parents=True, exist_ok=True)
    with submit.alone(sweep):
        submit.check_idle(job.elements)
        aside: list[tuple[Path, Path | None]] = []
        try:
            job.submit.mkdir()
            taken = snapshot.take(job.code, root=root)
            folders.write_json(job.submit / "environment.json", describe())
            text = clusters.to_text(job.cluster)
            for one, run in zip(elements, job.elements, strict=True):
                run.mkdir(exist_ok=True)
                own = run / "submit"
                aside.append((own, submit.set_aside(own)))
                own.mkdir()
                copied = dataclasses.replace(submit.with_copies(one.config, job), run=run)
                (own / "config.yaml").write_text(configuration.to_text(copied), encoding="utf-8")
                (own / "cluster.yaml").write_text(text, encoding="utf-8")
            sent = job.send()
        except BaseException:
            _put_back(aside)
            shutil.rmtree(job.submit, ignore_errors=True)
            if new:
                (sweep / ".submitting").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    sweep.rmdir()
            raise
        about = {
            **sent,
            "command": command,
            "folder": str(job.folder),
            "time": time.time(),
            "commit": taken.commit,
            "changed": list(taken.changed),
            "code": str(job.code),
            **clusters.described(job.cluster),
        }
        for number, run in enumerate(job.elements):
            name = f"{sent['job']}_{number}" if sent["kind"] == "slurm" else sent["job"]
            folders.write_json(run / "submit" / "job.json", {**about, "job": name})
        earlier = folders.records(sweep) if folders.is_sweep(sweep) else []
        own_names = {one.folder for one in elements}
        told = [one for one in earlier if one["folder"] not in own_names]
        told += [{"folder": one.folder, "values": one.values} for one in elements]
        folders.write_json(sweep / folders.SWEEP, {"command": command, "elements": told})
    return str(sent["job"])


def _put_back(aside: Sequence[tuple[Path, Path | None]]) -> None:
    """Removes what was written for runs that are not submitted after all; what an earlier submission left is back."""
    for folder, before in aside:
        shutil.rmtree(folder, ignore_errors=True)
        if before is not None:
            before.rename(folder)
        for empty in (folder.parent / "logs", folder.parent):
            with contextlib.suppress(OSError):  # there is none, or it holds something
                empty.rmdir()


# ---------------------------------------------------------------- what came of them
def table(sweep: Path, *, as_json: bool, as_csv: bool) -> int:
    """Prints the results, and writes results.json and results.csv."""
    if not folders.is_sweep(sweep):
        raise ValueError(f"--table: {sweep} is no sweep's folder: no {folders.SWEEP} in it")
    found = results.read(sweep)
    folders.write_json(sweep / "results.json", results.as_json(found))
    aside = sweep / ".results.csv"
    aside.write_text(results.as_csv(found), encoding="utf-8")
    aside.replace(sweep / "results.csv")
    if as_json:
        print(json.dumps(results.as_json(found), indent=1))
    elif as_csv:
        print(results.as_csv(found), end="")
    else:
        print(shown_lines(results.as_text(found)))
    return 0


def shown_lines(text: str) -> str:
    return "\n".join(map(shown, text.splitlines()))
