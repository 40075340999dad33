"""Two machines train as one, and what is wrong between them is said in one line within the stated time."""

import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import starts
from tests.parallel.launches import ACCELERATE, gan, launched, of_one_process, same_losses
from tests.parallel.machines import Machine, bend, two_machines
from trainer import config as configuration

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TIMEOUT = 4.0  # parallel.timeout of the starts that are refused, seconds
TORCHS = re.compile(r"\[(W|E)\d+ |\[/\S+/gloo/")  # of addresses without a name, of connections
SLACK = 15.0  # seconds for the start itself on busy cores


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as found:
        yield found


@pytest.fixture
def config(tmp_path: Path, few: Path) -> Path:
    return gan(tmp_path, few)


def variables(machine: Machine, *, rank: int, world: int = 2, port: int, at: str | None = None) -> dict[str, str]:
    """What a launcher on that machine would set; at: address of rank 0 as it was told."""
    found = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()} | {"MASTER_ADDR": at or machine.address}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def started(
    folder: Path, config: Path, machines: Sequence[Machine], each: Sequence[dict[str, str]], *words: Sequence[str]
) -> tuple[starts.Ended, float]:
    """The trainer on each machine with its variables and its own overrides; and the seconds that it took."""
    begun = time.monotonic()
    argv = [str(config), f"parallel.timeout={TIMEOUT}"]
    ranks = [([*argv, *(words[number] if words else ())], mine) for number, mine in enumerate(each)]
    ended = starts.each(folder / "logs", *ranks, before=[machine.enter for machine in machines[: len(each)]]).wait()
    return ended, time.monotonic() - begun


def refusals(ended: starts.Ended) -> list[str]:
    """Exit code 2 on every rank, one line of each beside what torch's C++ prints."""
    assert set(ended.codes) == {2}, f"{ended.codes}\n{ended.out}\n{ended.err}"
    lines = [line for line in ended.err.splitlines() if not TORCHS.match(line)]
    assert len(lines) == len(ended.codes), ended.err
    assert all(line.startswith("tandem: error: ") for line in lines), ended.err
    return lines


# ---------------------------------------------------------------- training
def accelerate(machines: Sequence[Machine], name: str, *words: str) -> list[list[str]]:
    shipped = ["--config_file", f"configs/accelerate/{name}.yaml", "--main_process_ip", machines[0].address]
    port = str(free_port())
    return [
        [*ACCELERATE, *shipped, "--main_process_port", port, "--machine_rank", str(number), "-m", "trainer", *words]
        for number in (0, 1)
    ]


def torchrun(machines: Sequence[Machine], *words: str) -> list[list[str]]:
    at = ["--master-addr", machines[0].address, "--master-port", str(free_port())]
    return [
        [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *at, "--node-rank", str(number), "-m", "trainer", *words]
        for number in (0, 1)
    ]


def tandem(machines: Sequence[Machine], *words: str) -> list[list[str]]:
    there = ["--machines", "2", "--address", machines[0].address, "--port", str(free_port()), "--processes", "1"]
    start = [sys.executable, "-m", "launch.cli", "train", *words, *there]
    return [[*start, "--machine", str(number)] for number in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, few: Path) -> dict[str, dict[int, float]]:
    """Losses of one process on one machine."""
    return of_one_process(tmp_path_factory.mktemp("alone"), few)


@pytest.mark.parametrize(
    ("launcher", "backend"),
    [
        ("accelerate", "ddp"),
        ("accelerate", "zero2"),
        pytest.param("torchrun", "zero2", marks=pytest.mark.slow),
        pytest.param("torchrun", "ddp", marks=pytest.mark.slow),
        ("tandem", "ddp"),
    ],
)
def test_two_machines_train_to_the_losses_of_one(
    launcher: str,
    backend: str,
    machines: tuple[Machine, Machine],
    config: Path,
    alone: dict[str, dict[int, float]],
    tmp_path: Path,
) -> None:
    if launcher == "accelerate":
        commands = accelerate(machines, f"{backend}_machines", str(config))
    else:
        words = [] if backend == "ddp" else ["parallel.kind=deepspeed", "parallel.stage=2"]
        commands = {"torchrun": torchrun, "tandem": tandem}[launcher](machines, str(config), *words)
    there = [machine.command(*command) for machine, command in zip(machines, commands, strict=True)]
    for code, said in launched(there, tmp_path):
        assert code == 0, said
    same_losses(config, alone, world=2)
    resolved = configuration.load(config.with_suffix("") / "config.yaml", []).parallel
    assert resolved.kind == ("ddp" if backend == "ddp" else "deepspeed")


# ---------------------------------------------------------------- refusals
@pytest.mark.slow
def test_a_launcher_of_accelerates_waits_no_longer_for_a_machine_than_it_is_told(
    machines: tuple[Machine, Machine], config: Path, tmp_path: Path
) -> None:
    """It waits before it starts the trainer, so these are its words."""
    begun = time.monotonic()
    command = accelerate(machines, "ddp_machines", str(config))[0]
    where = command.index("-m", 3)
    command[where:where] = ["--rdzv_conf", "timeout=3"]
    ((code, said),) = launched([machines[0].command(*command)], tmp_path)
    assert code != 0 and "1/2 clients joined" in said.splitlines()[-1] + said.splitlines()[-2]
    assert time.monotonic() - begun < 60


def test_a_machine_that_does_not_come_is_named_within_the_stated_time(
    machines: tuple[Machine, Machine], config: Path, tmp_path: Path
) -> None:
    mine = variables(machines[0], rank=0, port=free_port())
    ended, seconds = started(tmp_path, config, machines, [mine])
    (line,) = refusals(ended)
    assert f"rank 1 of 2 did not come within {TIMEOUT:g} s (parallel.timeout)" in line
    assert TIMEOUT <= seconds < TIMEOUT + SLACK
    assert not config.with_suffix("").exists()


@pytest.mark.parametrize("at", ["10.77.0.9", "127.0.0.9", "nowhere.invalid"])
def test_an_address_at_which_nobody_answers_is_named_within_the_stated_time(
    at: str, machines: tuple[Machine, Machine], config: Path, tmp_path: Path
) -> None:
    mine = variables(machines[1], rank=1, port=free_port(), at=at)
    ended, seconds = started(tmp_path, config, [machines[1]], [mine])
    (line,) = refusals(ended)
    assert f"rank 1 of 2 found nobody at {at}:" in line and "MASTER_ADDR" in line
    assert seconds < 2 * TIMEOUT + SLACK


def test_a_machine_rank_that_two_machines_have_is_named_on_both(
    machines: tuple[Machine, Machine], config: Path, tmp_path: Path
) -> None:
    port = free_port()
    each = [variables(machines[0], rank=0, port=port) for _ in machines]
    ended, seconds = started(tmp_path, config, machines, each)
    lines = refusals(ended)
    if machines[1].namespace is None:  # one host has one port of that number
        assert any("MASTER_PORT: rank 0 cannot listen" in line for line in lines)
    else:
        assert all("rank 0 was started twice" in line and "machine rank of its own" in line for line in lines), lines
    assert seconds < 2 * TIMEOUT + SLACK


@pytest.mark.parametrize(
    ("changed", "words", "said"),
    [
        ({"WORLD_SIZE": "4"}, [], "rank 1 is one of 4, rank 0 one of 2"),
        ({"RANK": "2", "WORLD_SIZE": "4"}, [], "rank 2 is one of 4, rank 0 one of 2"),
        ({}, ["optim.lr=1e-3"], "rank 1 has another config than rank 0: optim.lr 0.001 instead of 0.002"),
        ({}, ["parallel.kind=deepspeed"], "parallel.kind deepspeed instead of ddp"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, [], "could not be connected within"),
    ],
)
def test_ranks_that_do_not_fit_together_say_so_on_each_machine(
    changed: dict[str, str],
    words: list[str],
    said: str,
    machines: tuple[Machine, Machine],
    config: Path,
    tmp_path: Path,
) -> None:
    port = free_port()
    each = [variables(machines[0], rank=rank, port=port) for rank in (0, 1)]
    if "GLOO_SOCKET_IFNAME" in changed:
        if machines[1].namespace is None:
            pytest.skip("on one host every rank reaches the loopback of the others")
        each[0] |= changed  # as on machines whose own name is an address of the loopback
    each[1] |= changed
    ended, seconds = started(tmp_path, config, machines, each, [], words)
    for line in refusals(ended):
        assert said in line
    assert seconds < 3 * TIMEOUT + SLACK
    assert not config.with_suffix("").exists()


def test_machines_with_their_own_copies_of_the_data_may_keep_them_where_they_like(
    machines: tuple[Machine, Machine], config: Path, few: Path, tmp_path: Path
) -> None:
    shutil.copytree(few, tmp_path / "copy")
    port = free_port()
    each = [variables(machines[0], rank=rank, port=port) for rank in (0, 1)]
    ended, _ = started(tmp_path, config, machines, each, [], [f"data.path={tmp_path / 'copy'}"])
    ended.ok()


def test_a_machine_with_other_code_is_named(machines: tuple[Machine, Machine], config: Path, tmp_path: Path) -> None:
    shutil.copytree(starts.ROOT / "trainer", tmp_path / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "trainer" / "progress.py").open("a") as changed:
        changed.write("# another version\n")
    port = free_port()
    argv = [str(config), f"parallel.timeout={TIMEOUT + SLACK}"]
    first = starts.each(
        tmp_path / "logs", (argv, variables(machines[0], rank=0, port=port)), before=[machines[0].enter]
    )
    other = subprocess.run(
        machines[1].command(sys.executable, "-m", "trainer", *argv),
        cwd=tmp_path,
        env=os.environ | variables(machines[0], rank=1, port=port),
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = refusals(first.wait())
    assert "rank 1 differs from rank 0 in code: " in line and "sources " in line
    assert other.returncode == 2 and other.stderr.splitlines()[-1] == line


# ---------------------------------------------------------------- weights
def test_a_rank_whose_weights_drift_is_named_and_good_checkpoints_stay(
    machines: tuple[Machine, Machine], config: Path, tmp_path: Path
) -> None:
    port = free_port()
    ranks = [([str(config)], variables(machines[0], rank=rank, port=port)) for rank in (0, 1)]
    ended = starts.each(tmp_path / "logs", *ranks, before=[machines[0].enter, functools.partial(bend, machines[1], 3)])
    for line in refusals(_without_progress(ended.wait())):
        assert "at 48 images rank 1 no longer holds the weights of generator that rank 0 holds" in line
    kept = sorted(int(path.name) for path in (config.with_suffix("") / "checkpoints").iterdir() if path.is_dir())
    assert kept == [16, 32]
    # and with 0 nobody looks
    port = free_port()
    again = [([*argv, "log.compare_every=0"], mine | {"MASTER_PORT": str(port)}) for argv, mine in ranks]
    bent = functools.partial(bend, machines[1], 1)
    starts.each(tmp_path / "logs", *again, before=[machines[0].enter, bent]).wait().ok()


def _without_progress(ended: starts.Ended) -> starts.Ended:
    """Without the lines of the progress bar."""
    return starts.Ended(ended.codes, ended.out, "\n".join(line for line in ended.err.splitlines() if "tandem:" in line))
