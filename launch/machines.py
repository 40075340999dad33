"""Several machines without a cluster: each is told how many there are, which one it is, and where the first one is."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Machines:
    """How many there are, which one this is (counted from 0), and the address at which number 0 is found."""

    count: int = 1
    number: int = 0
    address: str = "127.0.0.1"


ALONE = Machines()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machines", type=int, metavar="N", default=1, help="machines that each get this command")
    parser.add_argument("--machine", type=int, metavar="I", help="which of them this is; 0 holds the rendezvous")
    parser.add_argument("--address", metavar="HOST", help="where the others reach machine 0")


def chosen(options: argparse.Namespace) -> Machines:
    """From the command line. ValueError names the option."""
    if options.machines < 1:
        raise ValueError(f"--machines: {options.machines} is not a number of machines; 1 is the least")
    if options.machines == 1 and options.machine is None and options.address is None:
        return ALONE
    if options.machine is None or options.address is None or not options.port:
        raise ValueError("--machines: several need --machine, --address and --port, the last two alike on each")
    if not 0 <= options.machine < options.machines:
        raise ValueError(f"--machine: {options.machine} is none of {options.machines}; they count from 0")
    return Machines(options.machines, options.machine, options.address)
