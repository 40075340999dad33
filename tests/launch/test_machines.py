"""What `tandem train --machines` is told must be whole; tests/parallel/test_machines.py trains with it."""

import pytest

from launch import local
from launch.machines import ALONE, Machines, add_arguments, chosen


def read(*argv: str) -> Machines:
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    add_arguments(parser)
    return chosen(parser.parse_args(argv))


def test_one_machine_needs_to_be_told_nothing() -> None:
    assert read() == ALONE


def test_each_machine_is_told_which_it_is() -> None:
    words = ["--machines", "3", "--address", "10.0.0.1", "--port", "29500"]
    assert read(*words, "--machine", "2") == Machines(3, 2, "10.0.0.1")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--machines", "0"], "--machines: 0 is not a number of machines"),
        (["--machines", "2"], "--machines: several need --machine, --address and --port"),
        (["--machine", "0"], "--machines: several need"),
        (["--machines", "2", "--machine", "0", "--address", "a"], "several need --machine, --address and --port"),
        (["--machines", "2", "--machine", "2", "--address", "a", "--port", "1"], "--machine: 2 is none of 2"),
    ],
)
def test_half_of_it_is_refused(argv: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        local.main(["config.yaml", *argv])
