"""Does a run under SLURM come to the same weights however often it is interrupted?

    python -m tools.soak.slurm --events 20 --seed 0
    python -m tools.soak.slurm --events 6 --images 20480 --ranks 1 --dir /tmp/soak

A small VAE-GAN is trained by `tandem train` without a break, then by `tandem submit` on two nodes while it is
preempted, told to stop, run into its time limit, bereft of a rank or a node, and requeued, as drawn from the seed.
There is a line for each event. Exit code 1 where the run is not done at the end, or where a weight, a moment of an
optimiser or a loss differs in one bit. Root, on a Debian with SLURM (`python -m tools.slurm install`): it starts a
cluster of its own.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from tools.shards import encode
from tools.slurm.cluster import Cluster, temporary
from tools.slurm.job import OVER, Submitted, scontrol
from trainer.data import tar
from trainer.errors import boundary

ROOT = Path(__file__).parents[2]
BATCH, EVERY = 64, 256  # images of an update, and from checkpoint to checkpoint
MINUTES = 60  # time limit of the job
EARLY = 0.2  # share of the events that come while a start is still on its way
START = 8.0  # seconds within which those come
PATIENCE = 240.0  # seconds without the start that must come after an event
HEADS = f"{'event':<26}{'images':>8}{'restarts':>10}{'lost':>8}{'s to go on':>14}"
OVERRIDES = (
    f"batch={BATCH}", "data.cache_mb=64", "optim.warmup=640", "optim.ema_half_life=1000", "method.adversarial_from=640",
    "method.adversarial_ramp=1280", f"log.every={BATCH}", "log.pictures_every=0", "log.evaluate_every=2560",
    "log.evaluate_images=64", "log.hang_after=120", f"checkpoint.every={EVERY}", "checkpoint.keep_best=false",
)  # fmt: skip
"""On top of configs/vaegan_fashion.yaml."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak.slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=20, help="(default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the events, their moments and victims (default: 0)")
    parser.add_argument("--images", type=int, help="that the run trains on (default: 2048 an event, and 2048 more)")
    parser.add_argument("--ranks", type=int, default=2, help="on each of the two nodes (default: 2)")
    parser.add_argument("--dir", type=Path, help="to keep the runs in (default: a temporary folder)")
    parser.add_argument("--cluster", type=Path, help="folder of a running cluster of tools.slurm; it needs 3 nodes")
    given = parser.parse_args(argv)
    if given.events < 0 or given.ranks < 1 or BATCH % (2 * given.ranks):
        parser.error(f"--events is at least 0, and 2 x --ranks divide {BATCH}")
    if given.images is None:
        given.images = 2048 * (given.events + 1)
    return given


def main(argv: list[str]) -> int:
    given = parse(argv)
    with contextlib.ExitStack() as held:
        folder = given.dir or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tandem-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        for split, images in (("train", 600), ("test", 128)):
            write_set(folder / "data" / split, images)
        golden, run = folder / "golden", folder / "run"
        began = time.monotonic()
        tandem("train", *words(given, folder, golden), "--processes", str(2 * given.ranks))
        seconds = time.monotonic() - began
        print(f"uninterrupted, {2 * given.ranks} ranks: {given.images:,} images in {seconds:.0f} s", flush=True)
        cluster = Cluster(given.cluster) if given.cluster else held.enter_context(temporary(nodes=3, cpus=4, gpus=0))
        os.environ.update(cluster.exports())
        told = soak(Soak(cluster, submit(given, folder, run), given), given.events, random.Random(given.seed))  # noqa: S311
        differences = compare(golden, run)
        print("\n".join([*differences, summary(given, told, run, differences)]), flush=True)
    return 1 if differences or len(told) < given.events else 0


# ------------------------------------------------------------------ the run
def write_set(folder: Path, images: int) -> None:
    """Squares of chance, of 4 x 4 levels."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(images)
    with (folder / "00000.tar").open("wb") as file:
        for number in range(images):
            image = np.kron(chance.integers(0, 256, (4, 4)), np.ones((7, 7))).astype(np.uint8)[:, :, None]
            file.write(tar.member(f"{number:05d}.npy", encode.npy(image)))
        file.write(tar.end(file.tell()))


def words(given: argparse.Namespace, folder: Path, run: Path) -> list[str]:
    """Of a command line: config and overrides."""
    own = (f"run={run}", f"images={given.images}", f"data.path={folder}/data")
    return [str(ROOT / "configs" / "vaegan_fashion.yaml"), *own, *OVERRIDES]


def tandem(*argv: str) -> str:
    command = [sys.executable, "-m", "launch.cli", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"tandem {argv[0]} ended with {ran.returncode}: {ran.stderr.strip() or ran.stdout.strip()}")
    return ran.stdout


def submit(given: argparse.Namespace, folder: Path, run: Path) -> Submitted:
    file = folder / "cluster.yaml"
    asked = {"kind": "slurm", "time": MINUTES, "signal_lead": 30, "nodes": 2, "ranks_per_node": given.ranks}
    file.write_text(json.dumps({**asked, "requeues": 1000}))  # JSON is YAML
    said = tandem("submit", *words(given, folder, run), "--cluster", str(file))
    return Submitted(run, said.split()[1].rstrip(":"))


# ------------------------------------------------------------------ what happens to it
@dataclass(frozen=True)
class Told:
    """What an event came to."""

    event: str
    images: int
    """At which its start ended."""
    lost: int
    """Of those, what the next start did again."""
    seconds: float
    """From the event until the next start had met and found where it goes on."""


class Soak:
    """A job and what may be done to it. An event returns what is to be done once the job has stopped."""

    def __init__(self, cluster: Cluster, job: Submitted, given: argparse.Namespace) -> None:
        self.cluster, self.job, self.world, self.images = cluster, job, 2 * given.ranks, given.images

    # ---------------------------------------------------------------- events
    def preempt(self, chance: random.Random) -> Callable[[], None]:
        node = chance.choice(self.nodes())
        _slurm("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
        return _nothing

    def notice(self, chance: random.Random) -> Callable[[], None]:
        _slurm("scancel", "--signal=USR2", self.job.number)
        return _nothing

    def time_limit(self, chance: random.Random) -> Callable[[], None]:
        hours, minutes, _ = map(int, self.job.show()["RunTime"].split(":"))
        self._limit(60 * hours + minutes + 1)
        return lambda: self._limit(MINUTES)

    def kill(self, chance: random.Random) -> Callable[[], None]:
        while (process := self._process(chance.randrange(self.world))) is None:
            time.sleep(0.1)
        os.kill(process, signal.SIGKILL)
        return _nothing

    def lose_node(self, chance: random.Random) -> Callable[[], None]:
        node = chance.choice(self.nodes())
        self.cluster.fail(node)
        return lambda: self.cluster.begin(node)

    def requeue(self, chance: random.Random) -> Callable[[], None]:
        scontrol("requeue", self.job.number)
        return _nothing

    # ---------------------------------------------------------------- what is known of it
    def nodes(self) -> list[str]:
        return scontrol("show", "hostnames", self.job.show()["NodeList"]).split()

    def _process(self, rank: int) -> int | None:
        """Of a rank, also before it has become the trainer."""
        marks = {f"SLURM_JOB_ID={self.job.number}", "SLURM_STEP_ID=0", f"SLURM_PROCID={rank}"}
        for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
            with contextlib.suppress(OSError):
                if {mark.encode() for mark in marks} <= set((path / "environ").read_bytes().split(b"\0")):
                    return int(path.name)
        return None

    def reached(self, start: int, *, now: bool = True) -> int:
        """Images that a start has come to, by the heartbeats of its ranks; now: and since the last of those."""
        found = 0
        for path in (self.job.run / "heartbeats").glob("rank*.json"):
            told = _read(path)
            if told.get("restart") == start:
                since = time.time() - told["time"] if now and told["at"] in ("data", "step") else 0.0
                found = max(found, told["images"] + int(since * (told["images_per_second"] or 0)))
        return found

    def restarts(self) -> int:
        return int(self.job.show()["Restarts"])

    def begun(self) -> int | None:
        """The number of restarts, once rank 0 has a process; None where the job is over."""
        limit = time.monotonic() + PATIENCE
        while self.job.state() not in OVER:
            if self._process(0) is not None:
                return self.restarts()
            if time.monotonic() > limit:
                raise RuntimeError(f"rank 0 has no process\n{self.job.said()}")
            time.sleep(0.1)
        return None

    def at_work(self, start: int) -> bool:
        shown = self.job.show()
        return shown["JobState"] == "RUNNING" and int(shown["Restarts"]) == start

    def stopped(self, start: int) -> int | None:
        """The images at which a start ended, once it has; None where it was the last, and done."""
        images, limit = self.saved(), time.monotonic() + PATIENCE
        while self.restarts() == start:
            if self.job.state() == "COMPLETED":
                return None
            if self.job.state() in OVER or time.monotonic() > limit:
                raise RuntimeError(f"the job is {self.job.state()}, and does not start again\n{self.job.said()}")
            time.sleep(0.1)
        for _ in range(10):  # the last heartbeat of a rank that is ending
            images = max(images, self.reached(start, now=False))
            time.sleep(0.2)
        return images

    def saved(self) -> int:
        folder = self.job.run / "checkpoints"
        return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)

    def _limit(self, minutes: int) -> None:
        scontrol("update", f"JobId={self.job.number}", f"TimeLimit={minutes}")


EVENTS: Mapping[str, tuple[Callable[[Soak, random.Random], Callable[[], None]], int]] = {
    "preempted": (Soak.preempt, 4),
    "USR2": (Soak.notice, 3),
    "time limit": (Soak.time_limit, 1),
    "rank killed": (Soak.kill, 5),
    "node lost": (Soak.lose_node, 3),
    "requeued": (Soak.requeue, 3),
}
"""And how often each is drawn."""
SUDDEN = ("rank killed", "node lost")
"""After which no rank tells how far it came: that is known by the speed and the last heartbeat."""


def drawn(events: int, chance: random.Random) -> list[str]:
    """Each kind once, as far as there is room, before any comes again."""
    first = chance.sample(list(EVENTS), len(EVENTS))
    more = chance.choices(list(EVENTS), [weight for _, weight in EVENTS.values()], k=max(0, events - len(first)))
    return [*first, *more][:events]


def soak(run: Soak, events: int, chance: random.Random) -> list[Told]:
    """All events, and the run to its end; fewer where it was done before."""
    print(HEADS, flush=True)
    told: list[Told] = []
    waiting: list[tuple[str, int, int, float]] = []  # events whose next start has not come so far
    before, hasty = 0, False  # the newest checkpoint when the last event was over; whether it came early
    for number, name in enumerate(drawn(events, chance)):
        early, delay, share = chance.random() < EARLY, chance.uniform(0, START), chance.random()
        while (start := run.begun()) is not None:
            soon = early and not hasty and number > 0  # three starts in a row that come to nothing are a crash loop
            target = run.saved() + share * (run.images - run.saved()) / (events - number + 1)
            until = time.monotonic() + delay
            while run.at_work(start) and not (
                time.monotonic() > until if soon else run.reached(start) >= target and run.saved() > before
            ):
                told += settle(run, waiting)
                time.sleep(0.1)
            if run.at_work(start):  # and not ended by another thing meanwhile
                break
        if start is None:
            break
        at, hasty = time.time(), soon
        reached = run.reached(start) // BATCH * BATCH if name in SUDDEN else 0
        done = EVENTS[name][0](run, chance)
        images = run.stopped(start)
        done()
        before = run.saved()
        if images is None:
            break
        waiting.append((f"{name}{' at its start' if soon else ''}", start, max(images, reached), at))
    run.job.wait(seconds=10 * PATIENCE)
    if run.job.state() != "COMPLETED":
        raise RuntimeError(f"the job is {run.job.state()}\n{run.job.said()}")
    return told + settle(run, waiting)


def settle(run: Soak, waiting: list[tuple[str, int, int, float]]) -> list[Told]:
    """Prints and returns the events after which a start has come."""
    found = []
    starts = run.job.lines("attempts.jsonl")
    while waiting and (later := [line for line in starts if line["restart"] > waiting[0][1]]):
        name, start, images, at = waiting.pop(0)
        one = Told(name, images, max(0, images - later[0]["images"]), later[0]["time"] - at)
        print(f"{name:<26}{images:>8,}{start + 1:>10}{one.lost:>8,}{one.seconds:>14.1f}", flush=True)
        found.append(one)
    return found


# ------------------------------------------------------------------ what it came to
def compare(golden: Path, run: Path) -> list[str]:
    """What differs, in words."""
    found = []
    ends = [max((folder / "checkpoints").iterdir()) for folder in (golden, run)]
    if ends[0].name != ends[1].name:
        return [f"the run is at {int(ends[1].name):,} images, the uninterrupted one at {int(ends[0].name):,}"]
    digests = [_read(end / "manifest.json")["files"] for end in ends]
    names = sorted(name for name in digests[0] | digests[1] if name.endswith(".safetensors"))
    found += [f"{name} differs" for name in names if digests[0].get(name) != digests[1].get(name)]
    curves = [losses(folder) for folder in (golden, run)]
    for tag in sorted(curves[0].keys() | curves[1].keys()):
        one, other = (curve.get(tag, {}) for curve in curves)
        steps = sorted(step for step in one.keys() | other.keys() if one.get(step) != other.get(step))
        if steps:
            found.append(f"{tag} differs at {len(steps)} of {len(one)} points, first at {steps[0]:,} images")
    return found


def losses(run: Path) -> dict[str, dict[int, list[float]]]:
    """{tag: {images: values}} of a run's board."""
    board = EventAccumulator(str(run / "board"), tensor_size_guidance={"scalars": 0})
    board.Reload()
    found: dict[str, dict[int, list[float]]] = {}
    for tag in board.Tags()["tensors"]:
        if tag.startswith(("loss/", "test/")):
            for event in board.Tensors(tag):
                found.setdefault(tag, {}).setdefault(event.step, []).append(float(make_ndarray(event.tensor_proto)))
    return found


def summary(given: argparse.Namespace, told: Sequence[Told], run: Path, differences: Sequence[str]) -> str:
    lost = sum(one.lost for one in told)
    points = sum(map(len, losses(run).values()))
    same = "NOT those" if differences else f"those of the uninterrupted run, bit for bit ({points:,} losses compared)"
    return (
        f"{given.images:,} images, {2 * given.ranks} ranks on 2 nodes, {len(told)} of {given.events} events, "
        f"{len(_starts(run))} starts, {lost:,} images lost to replay ({lost / given.images:.1%}): weights, optimisers "
        f"and losses are {same}"
    )


def _starts(run: Path) -> list[str]:
    return (run / "attempts.jsonl").read_text().splitlines()


def _read(path: Path) -> dict[str, Any]:
    """{} for what is not there, or not yet."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(path.read_text()))
    return {}


def _slurm(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def _nothing() -> None: ...


if __name__ == "__main__":
    sys.exit(boundary(main, sys.argv[1:]))
