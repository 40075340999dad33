"""The `tandem` command: a table of verbs. Imports nothing heavy, so that `tandem --help` answers at once."""

import difflib
import importlib
import sys
from typing import NamedTuple

from trainer.errors import USER_MISTAKE, boundary


class Verb(NamedTuple):
    """Where a verb lives. `function` takes the rest of the command line and returns the exit code."""

    module: str
    function: str
    help: str


VERBS = {
    "train": Verb("launch.local", "main", "train a config on this machine, on one or more processes"),
    "submit": Verb(
        "launch.submit", "main", "submit a config to SLURM; the job goes on after preemption and time limit"
    ),
    "status": Verb("launch.status", "main", "say how runs are doing: state, images, speed, slowest rank, why it waits"),
    "logs": Verb("launch.logs", "main", "print what a submitted run prints; -f follows it over all its starts"),
    "cancel": Verb("launch.cancel", "main", "end submitted runs, and say what is saved of them"),
    "resubmit": Verb("launch.resubmit", "main", "submit a run again that has ended, with the code it had"),
    "sweep": Verb("launch.sweep", "main", "train each combination of several values and seeds; compare them"),
    "check": Verb("trainer.check", "main", "say what a config would do (size, memory, batches) and try two batches"),
    "data make": Verb("tools.shards.make", "main", "make WebDataset shards from a folder of images or a named set"),
    "data index": Verb("tools.shards.index", "main", "index shards of any other maker, or renew the index of a set"),
    "data verify": Verb("tools.shards.check", "main", "verify shards against their index; --deep decodes every image"),
    "data reshard": Verb("tools.shards.reshard", "main", "cut, shuffle, resize or re-encode shards of any maker anew"),
    "data stats": Verb("tools.shards.stats", "main", "measure a set: levels, classes, copies, frames, grids; draw it"),
    "data show": Verb("tools.shards.show", "main", "draw what a batch of a config looks like to the networks"),
    "data check": Verb("tools.shards.check", "main", "another name of data verify"),
    "sample": Verb("tools.draw", "sample", "draw a grid of samples from a run"),
    "reconstruct": Verb("tools.draw", "reconstruct", "draw images beside their reconstructions by a run"),
    "interpolate": Verb("tools.draw", "interpolate", "draw walks between two latents of a run"),
    "export": Verb("tools.export", "main", "write the autoencoder of a run as diffusers loads it"),
    "env": Verb("launch.env", "main", "print versions, devices, NCCL, SLURM and git state for a bug report"),
}

EXAMPLE = """\
example:
  tandem data make fashion-mnist data/fashion
  tandem train configs/vaegan_fashion.yaml --processes 2
  tandem sample runs/vaegan_fashion

`tandem VERB --help` says more, with an example."""


HELP = ("-h", "--help", "help")


def usage(group: str = "") -> str:
    """Of all verbs, or of those of a group."""
    shown = {name: verb for name, verb in VERBS.items() if name.startswith(group)}
    width = max(map(len, shown))
    rows = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in shown.items())
    if group:
        return f"usage: tandem {group}VERB ...\n\nverbs:\n{rows}\n\n`tandem {group}VERB --help` says more."
    return f"usage: tandem VERB ...\n\nTrain VAEs, GANs and VAE-GANs, and measure them.\n\nverbs:\n{rows}\n\n{EXAMPLE}"


def find(argv: list[str]) -> tuple[Verb, list[str]]:
    """The verb that `argv` begins with, and what follows it. ValueError names the nearest verb."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in VERBS:
            return VERBS[name], argv[words:]
    group = [name for name in VERBS if name.startswith(f"{argv[0]} ")]
    if group and (len(argv) == 1 or argv[1].startswith("-")):
        raise ValueError(f"{argv[0]}: say which: {', '.join(group)} (see tandem --help)")
    name = " ".join(argv[:2]) if group else argv[0]
    nearest = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"no such verb: {name}{hint} (tandem --help lists them)")


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in HELP:
        print(usage())
        return 0 if argv else USER_MISTAKE
    group = f"{argv[0]} "
    if argv[1:] and argv[1] in HELP and any(name.startswith(group) for name in VERBS):
        print(usage(group))
        return 0
    verb, rest = find(argv)
    function = getattr(importlib.import_module(verb.module), verb.function)
    return int(function(rest))


def main() -> int:
    return boundary(dispatch, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
