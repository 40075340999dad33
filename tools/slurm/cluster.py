"""A SLURM cluster in one folder: its configuration, its daemons, and nodes that can be made to fail."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
HOSTS = Path("/etc/hosts")

# cred_expire is also how long a requeued job waits before it starts again (SLURM's default: 120 s). Otherwise short
# waits, and what many sites have: USR2 to a job that is about to be preempted, jobs that may be requeued.
CONFIG = """\
ClusterName=tandem
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/run/munge.socket,cred_expire=10
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MinJobAge=86400
MaxArraySize=1001
GresTypes=gpu
"""
PARTITIONS = """\
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
# submitit learns of failed jobs from `sacct -o JobID,State,NodeList --parsable2 -j ID ...`, which needs a database.
SACCT = """\
#!/bin/sh
# Stands in for sacct: the same columns, from what the controller remembers (MinJobAge).
echo 'JobID|State|NodeList'
while [ $# -gt 0 ]; do
    if [ "$1" = -j ]; then
        squeue -h --states=all -r -j "$2" -o '%i|%T|%N' 2>/dev/null
        shift
    fi
    shift
done
exit 0
"""


def install() -> None:
    """The packages of Debian 12; root."""
    variables = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-yq", "--no-install-recommends", *PACKAGES]):
        ran = subprocess.run(["apt-get", *command], env=variables, stdin=subprocess.DEVNULL, check=False)
        if ran.returncode:
            raise RuntimeError(f"apt-get {command[0]} failed with exit code {ran.returncode}")


class Cluster:
    """The cluster in `dir`. One folder, one cluster; several may run side by side on ports of their own."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_absolute() or re.search(r"\s|%", str(folder)):
            raise RuntimeError(f"--dir: {folder} must be absolute, without blanks and %")
        if folder.exists() and folder.stat().st_uid != os.getuid():
            raise RuntimeError(f"--dir: {folder} belongs to another user")
        self.dir = folder
        self.config = folder / "slurm.conf"

    def exports(self) -> dict[str, str]:
        """What the commands of SLURM need to find this cluster."""
        return {"SLURM_CONF": str(self.config), "PATH": f"{self.dir}/bin:{os.environ['PATH']}"}

    def ask(self, *command: str) -> str:
        """What a command of SLURM prints; empty where it fails."""
        variables = {**os.environ, **self.exports()}
        ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
        return ran.stdout if ran.returncode == 0 else ""

    def nodes(self) -> list[str]:
        text = self.config.read_text() if self.config.exists() else ""
        return re.findall(r"^NodeName=(node\d+) ", text, re.MULTILINE)

    # ------------------------------------------------------------------ start and stop
    def start(self, *, nodes: int, cpus: int, gpus: int, port: int) -> float:
        """Seconds until every node was idle. What an earlier start left behind is ended first."""
        began = time.monotonic()
        missing = [name for name in ("slurmctld", "slurmd", "munged", "srun") if shutil.which(name) is None]
        if missing:
            raise RuntimeError(f"{', '.join(missing)}: not found; `python -m tools.slurm install` gets them")
        self.stop()
        for name in ("run", "log", "state", "spool", "bin", "munge"):
            folder = self.dir / name
            if name in ("run", "state", "spool"):
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700 if name in ("munge", "state") else 0o755)
        self._configure(nodes=nodes, cpus=cpus, gpus=gpus, port=port)
        self._name_hosts([socket.gethostname().partition(".")[0], *self.nodes()])
        self._munged()
        _run(["slurmctld", "-c", "-i", "-f", str(self.config)])
        for node in self.nodes():
            self.begin(node)
        idle = ["sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N"]
        if not _wait(30, lambda: len(self.ask(*idle).split()) == nodes):
            raise RuntimeError(f"nodes are not idle after 30 s: see {self.dir}/log; {'; '.join(self.status()[0])}")
        return time.monotonic() - began

    def stop(self) -> None:
        """Cancels the jobs and ends the daemons."""
        if not self.dir.exists():
            return
        if self._pid("slurmctld") and self._pid("munged"):
            jobs = sorted(set(self.ask("squeue", "-h", "-o", "%A").split()))
            if jobs:
                self.ask("scancel", *jobs)
                _wait(15, lambda: not self.ask("squeue", "-h", "-o", "%A", "-t", "running,completing"))
        for node in self.nodes():
            self._end(node)
            self.fail(node)
        self._end("slurmctld")
        self._end("munged")
        self._name_hosts([])

    def status(self) -> tuple[list[str], bool]:
        """Lines on daemons and nodes, and whether all is well."""
        if not self.config.exists():
            return [f"nothing is set up in {self.dir}"], False
        pids = {name: self._pid(name) for name in ("munged", "slurmctld", *self.nodes())}
        lines = [f"{name}: {f'process {pid}' if pid else 'down'}" for name, pid in pids.items()]
        bad = self.ask("sinfo", "-h", "-N", "-t", "down,drain,fail,no_respond", "-o", "%N")
        lines += self.ask("sinfo", "-N", "-o", "%N %P %T %C %G %E").splitlines()
        return lines, all(pids.values()) and not bad

    # ------------------------------------------------------------------ nodes
    def begin(self, node: str) -> None:
        """Starts a node that is not running."""
        if not self._pid(node):
            _run(["slurmd", "-N", node, "-f", str(self.config)])

    def fail(self, node: str) -> None:
        """The node is gone at once, with everything that it runs, as if its power had failed."""
        stopped = self._processes(node)
        _signal(stopped, signal.SIGSTOP)  # so that nothing new starts meanwhile
        _signal(stopped | self._processes(node), signal.SIGKILL)
        (self.dir / "run" / f"{node}.pid").unlink(missing_ok=True)

    def _processes(self, node: str) -> set[int]:
        """Its slurmd; its step daemons, which hold its log open; its tasks, known by their environment, so also those
        that left their parent."""
        log, found = str(self.dir / "log" / f"{node}.log"), {self._pid(node) or 0}
        marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.config}".encode()}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended while we looked
                ours = (process / "comm").read_text().strip() in ("slurmd", "slurmstepd") and any(
                    str(descriptor.readlink()) == log for descriptor in (process / "fd").iterdir()
                )
                if ours or marks <= set((process / "environ").read_bytes().split(b"\0")):
                    found.add(int(process.name))
        return found - {0, os.getpid()}

    # ------------------------------------------------------------------ parts
    def _configure(self, *, nodes: int, cpus: int, gpus: int, port: int) -> None:
        host = socket.gethostname().partition(".")[0]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // nodes
        lines = [
            f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + i} CPUs={cpus} "
            f"RealMemory={memory}{f' Gres=gpu:{gpus}' if gpus else ''}"
            for i in range(1, nodes + 1)
        ]
        text = CONFIG.format(host=host, port=port, dir=self.dir) + "\n".join(lines) + "\n" + PARTITIONS
        self.config.write_text(text)
        devices = [self.dir / f"gpu{i}" for i in range(gpus)]
        for device in devices:  # slurmd insists on a device
            device.unlink(missing_ok=True)
            device.symlink_to("/dev/null")
        (self.dir / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        # nothing uses cgroups; naming a plugin spares slurmd its search for a mounted one
        (self.dir / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        sacct = self.dir / "bin" / "sacct"
        sacct.write_text(SACCT)
        sacct.chmod(0o755)

    def _name_hosts(self, names: Iterable[str]) -> None:
        """Every node's name leads here, and the host's own, which srun looks up. In place: a container mounts the
        file."""
        mark = f"# tandem's SLURM in {self.dir}"
        with HOSTS.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.read()
            kept = [line for line in before.splitlines() if not line.endswith(mark)]
            after = "\n".join([*kept, *(f"127.0.0.1 {name} {mark}" for name in names)]) + "\n"
            if after != before:
                file.seek(0)
                file.write(after)
                file.truncate()

    def _munged(self) -> None:
        key = self.dir / "munge" / "key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(128))
        paths = {
            "key-file": key,
            "socket": self.dir / "run" / "munge.socket",
            "pid-file": self.dir / "run" / "munged.pid",
            "seed-file": self.dir / "munge" / "seed",
            "log-file": self.dir / "log" / "munged.log",
        }
        # --force: that others may write to the parents of a folder in /tmp is no reason to refuse
        _run(["munged", "--force", *(f"--{name}={path}" for name, path in paths.items())])

    def _pid(self, name: str) -> int | None:
        """The living process of a pid file, and not another one that has its number by now."""
        try:
            pid = int((self.dir / "run" / f"{name}.pid").read_text())
            ours = f"{self.dir}/".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if ours else None

    def _end(self, name: str) -> None:
        pid = self._pid(name)
        if pid is None:
            return
        _signal({pid}, signal.SIGTERM)
        if not _wait(10, lambda: self._pid(name) is None):
            _signal({pid}, signal.SIGKILL)
        (self.dir / "run" / f"{name}.pid").unlink(missing_ok=True)


@contextlib.contextmanager
def temporary(*, nodes: int, cpus: int, gpus: int) -> Iterator[Cluster]:
    """A cluster of its own, on ports of its own, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="tandem-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    found = Cluster(folder)
    try:
        found.start(nodes=nodes, cpus=cpus, gpus=gpus, port=_free_ports(nodes + 1))
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for base in range(16_817 + os.getpid() % 1_000, 19_900, count):
        taken = []
        for port in range(base, base + count):
            with socket.socket() as one:
                taken.append(one.connect_ex(("127.0.0.1", port)) == 0)
        if not any(taken):
            return base
    raise RuntimeError("no free ports")


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, umask=0o022, timeout=60, check=False)
    if ran.returncode:
        raise RuntimeError(f"{command[0]} failed: {' '.join((ran.stderr or ran.stdout).split())}")


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait(seconds: float, done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
