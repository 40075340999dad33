"""python -m tools.slurm start: a real SLURM of several nodes on one Debian machine, for tests. README.md says more."""

import argparse
import sys
from pathlib import Path

from tools.slurm.cluster import PACKAGES, Cluster, install

EXAMPLE = f"""\
example:
  python -m tools.slurm install                 # root: apt-get {" ".join(PACKAGES)}
  python -m tools.slurm start
  eval "$(python -m tools.slurm env)"
  srun -N2 --ntasks-per-node=2 hostname
  python -m tools.slurm stop
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.slurm",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=["install", "start", "env", "status", "fail-node", "start-node", "stop"])
    parser.add_argument("node", nargs="?", help="node1, node2, ...: of fail-node and start-node")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/tandem-slurm"), help="everything of the cluster")  # noqa: S108
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=4, help="of a node; may exceed the real ones")
    parser.add_argument("--gpus", type=int, default=2, help="of a node; counted and handed out, but not there")
    parser.add_argument("--port", type=int, default=16817, help="of the controller; the nodes take the next ones")
    options = parser.parse_args(argv)
    if min(options.nodes, options.cpus) < 1 or options.gpus < 0:
        parser.error("--nodes and --cpus are at least 1, --gpus at least 0")
    cluster = Cluster(options.dir)
    if options.verb == "install":
        install()
    elif options.verb == "start":
        seconds = cluster.start(nodes=options.nodes, cpus=options.cpus, gpus=options.gpus, port=options.port)
        print(f"slurm: {options.nodes} nodes ready in {seconds:.1f} s")
    elif options.verb == "env":
        print("export " + " ".join(f"{name}={value}" for name, value in cluster.exports().items()))
    elif options.verb == "status":
        lines, well = cluster.status()
        print("\n".join(lines))
        return 0 if well else 1
    elif options.verb == "stop":
        cluster.stop()
    elif options.node not in cluster.nodes():
        parser.error(f"{options.verb}: no such node: {options.node}; there are {', '.join(cluster.nodes()) or 'none'}")
    elif options.verb == "fail-node":
        cluster.fail(options.node)
    else:
        cluster.begin(options.node)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (RuntimeError, OSError) as error:
        sys.exit(f"slurm: {error}")
