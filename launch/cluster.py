"""What a run asks of a cluster: one YAML file, typed, in which a typo is named with the nearest key."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError

from trainer import bounds, config_errors, config_yaml

OURS = {
    "nodes": "nodes", "ntasks": "nodes and ranks_per_node", "ntasks-per-node": "ranks_per_node",
    "gpus-per-node": "gpus_per_node", "gpus": "gpus_per_node", "gres": "gpus_per_node",
    "cpus-per-task": "cpus_per_rank", "mem": "memory", "time": "time", "partition": "partition",
    "account": "account", "qos": "qos", "constraint": "constraint", "exclude": "exclude",
    "reservation": "reservation", "mail-user": "mail", "mail-type": "mail", "signal": "signal_lead",
    "job-name": "name", "requeue": "requeues", "no-requeue": "requeues", "output": "", "error": "", "open-mode": "",
    "array": "", "chdir": "", "wrap": "", "export": "",
}  # fmt: skip
"""Options that are not for `sbatch` to set, and the key that sets them; "": tandem does, and depends on it."""


@dataclass(frozen=True)
class MailConfig:
    """SLURM's mail about the job."""

    address: str
    """Whom to write to."""
    events: tuple[Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "ALL"], ...] = ("END", "FAIL")
    """What to write about."""

    def __post_init__(self) -> None:
        if not self.events:
            raise ValueError("events: name at least one, or leave `mail` out")


@dataclass(frozen=True)
class ContainerConfig:
    """Ranks run inside an image of apptainer, which must hold the packages of `environment.json`; the code of the
    project is not taken from it."""

    image: str
    """Path of a .sif file or folder, or docker://..., as `apptainer exec` takes it."""
    binds: tuple[str, ...] = ()
    """Further --bind: source, source:destination or source:destination:ro. The folder where the job was submitted and
    the run's folder are bound anyway."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `apptainer exec`."""
    program: str = "apptainer"
    """The program on the nodes: apptainer, singularity, or a path."""
    python: str = "python3"
    """Python inside the image."""


@dataclass(frozen=True)
class SlurmConfig:
    """One job of SLURM: nodes x ranks, each rank a task of srun."""

    time: int | str
    """Longest time of one start: minutes, or D-HH:MM:SS, HH:MM:SS, D-HH. The job is started again after it."""
    kind: Literal["slurm"] = "slurm"
    partition: str | None = None
    """Partition, or several with commas; null takes the cluster's default."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 0
    """GPUs of a node, each with a rank of its own; 0 on a cluster without."""
    gpu: str | None = None
    """Type of the GPUs as the cluster names it, where it has several: a100; null takes any."""
    ranks_per_node: int | None = None
    """Ranks of a node; null: one a GPU, or one a node without GPUs."""
    cpus_per_rank: int = 1
    """CPU cores of a rank: its decoders and its computation. About cores of a node / ranks of a node."""
    memory: str | None = None
    """Of a node: a number with M, G or T, such as 64G; null takes the cluster's default."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have, as sbatch takes them: a100&ib."""
    exclude: str | None = None
    """Nodes not to take, as sbatch takes them: gpu[07-09]."""
    reservation: str | None = None
    """Reservation to use."""
    name: str | None = None
    """Name of the job; null: that of the run's folder."""
    mail: MailConfig | None = None
    """Mail about the job; null writes none."""
    python: str | None = None
    """Python of the ranks: a path, or a name that `setup` puts on the PATH; null: the one that submits."""
    setup: tuple[str, ...] = ()
    """Lines of the batch script before the ranks start, as they are written: source, module load, conda activate."""
    environment: dict[str, str | int] = field(default_factory=dict)
    """Variables of the ranks: NCCL_SOCKET_IFNAME and the like."""
    container: ContainerConfig | None = None
    """Image in which the ranks run; null runs them on the node itself."""
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    """Further options of sbatch, without their dashes: {exclusive: true, nice: 100}."""
    srun: tuple[str, ...] = ()
    """Further arguments of srun."""
    requeues: int = 3
    """Starts after a failure that may pass: a killed or hung rank. Mistakes and bugs are not tried again; preemptions
    and lost nodes do not count."""
    time_limits: int | None = None
    """Starts after the time limit; null: as many as the run needs."""
    signal_lead: int | None = None
    """Seconds before the time limit at which the ranks are told to save; SLURM may be 60 s early. null: 2 x the last
    measured save of the run, at least 120."""

    def __post_init__(self) -> None:
        bounds.at_least(1, self, "nodes", "cpus_per_rank")
        bounds.at_least(0, self, "gpus_per_node", "requeues")
        for name, least in (("ranks_per_node", 1), ("time_limits", 0), ("signal_lead", 1)):
            if getattr(self, name) is not None:
                bounds.at_least(least, self, name)
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(f"ranks_per_node: {self.ranks_per_node} ranks on {self.gpus_per_node} GPUs; leave it out")
        if self.gpu is not None and not self.gpus_per_node:
            raise ValueError(f"gpu: {self.gpu} needs gpus_per_node")
        minutes(self.time)
        if self.memory is not None and not re.fullmatch(r"[1-9]\d*[MGT]", self.memory):
            raise ValueError(f"memory: {self.memory!r} is no number with M, G or T, such as 64G")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"environment: {name!r} is no name of a variable")
            if name.startswith("tandem_"):
                raise ValueError(f"environment: {name}: names with tandem_ are the batch script's own")
        for name, value in self.sbatch.items():
            _check_option(name, value)
        for where, text in _texts(self):
            if any(not sign.isprintable() for sign in text):
                raise ValueError(f"{where}: {text!r} holds a line break or control character")
        if self.signal_lead is not None and self.signal_lead >= 60 * self.minutes:
            raise ValueError(
                f"signal_lead: {self.signal_lead} s leave nothing of the time limit, {60 * self.minutes} s"
            )

    @property
    def minutes(self) -> int:
        """`time` in minutes."""
        return minutes(self.time)

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks

    def lead(self, save_seconds: float | None) -> int:
        """`signal_lead`, or what it is for a run whose last save took so long. ValueError where `time` is too short."""
        if self.signal_lead is not None:
            return self.signal_lead
        found = max(120, math.ceil(2 * (save_seconds or 0.0)))
        if 60 * self.minutes < 2 * found:
            raise ValueError(
                f"time: {self.minutes} minutes are short of twice the {found} s in which the run must be able to save; "
                "give it more, or a signal_lead"
            )
        return found


@dataclass(frozen=True)
class LocalConfig:
    """This machine, without SLURM: `--cluster local`, or a file that says `kind: local`."""

    kind: Literal["local"] = "local"
    processes: int | None = None
    """Ranks; null: one for each GPU, or one where there is none."""
    environment: dict[str, str | int] = field(default_factory=dict)
    """Variables of the ranks."""
    requeues: int = 3
    """Starts after a failure that may pass: a killed or hung rank."""

    def __post_init__(self) -> None:
        bounds.at_least(0, self, "requeues")
        if self.processes is not None:
            bounds.at_least(1, self, "processes")
        for name, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"environment: {name!r} is no name of a variable")
            if name.startswith("tandem_"):
                raise ValueError(f"environment: {name}: names with tandem_ are the batch script's own")
            if "\0" in str(value):
                raise ValueError(f"environment.{name}: holds a zero byte")


ClusterConfig: TypeAlias = SlurmConfig | LocalConfig
LOCAL = Path("local")
"""In the place of a cluster's file: LocalConfig() as it is."""


def minutes(time: int | str) -> int:
    """SLURM's time limit in whole minutes. ValueError begins with the key."""
    days, hours, mins, seconds = 0, 0, 0, 0
    if isinstance(time, int):
        mins = time
    elif found := re.fullmatch(r"(\d+)-(\d{1,2})(?::(\d{2})(?::(\d{2}))?)?", time, re.ASCII):
        days, hours, mins, seconds = (int(part or 0) for part in found.groups())
    elif found := re.fullmatch(r"(\d+):(\d{2}):(\d{2})", time, re.ASCII):
        hours, mins, seconds = (int(part) for part in found.groups())
    elif time.isascii() and time.isdecimal():
        mins = int(time)
    else:
        raise ValueError(f"time: {time!r} is neither minutes nor D-HH:MM:SS, HH:MM:SS or D-HH")
    if (days and hours > 23) or ((days or hours) and mins > 59) or seconds > 59:
        raise ValueError(f"time: {time!r} has more than 23 hours, 59 minutes or 59 seconds in their places")
    total = 1440 * days + 60 * hours + mins + math.ceil(seconds / 60)
    if not 1 <= total <= 366 * 1440:
        raise ValueError(f"time: {time!r} must be from a minute to a year")
    return total


def load(path: Path, overrides: list[str] = ()) -> ClusterConfig:  # type: ignore[assignment]
    """The cluster in `path` with `overrides` ("nodes=4") on top. ValueError in one line, as trainer.config's."""
    tree = {"kind": "local"} if path == LOCAL and not path.exists() else config_yaml.read(path)
    given = config_yaml.merge(tree, overrides)
    kind = tree.get("kind", "slurm")
    if kind not in KINDS:
        raise ValueError(f"{path}: kind: {kind!r} is none of {', '.join(KINDS)}")
    config = KINDS[kind]
    try:
        found: ClusterConfig = _adapter(config).validate_json(config_yaml.to_json(tree), strict=True)
    except ValidationError as error:
        raise ValueError(config_errors.explain(error, config, source=str(path), overrides=given)) from None
    return found


def to_text(config: ClusterConfig) -> str:
    """YAML that `load` takes back."""
    return config_yaml.write(_adapter(type(config)).dump_python(config, mode="json"))


def _check_option(name: str, value: str | int | bool) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
        raise ValueError(f"sbatch: {name!r} is no option of sbatch; long names without dashes before them: exclusive")
    key = OURS.get(name)
    short = next((one for one in OURS if key is None and one.startswith(name)), None)
    if short is not None:
        raise ValueError(f"sbatch: {name!r}: sbatch would take it for {short}; write options out")
    if key is not None:
        raise ValueError(f"sbatch: {name} {f'is what the key {key} says' if key else 'is set by tandem'}")
    if value is False:
        raise ValueError(f"sbatch: {name}: false; leave an option out that is not wanted")


def _texts(config: SlurmConfig) -> list[tuple[str, str]]:
    """Every text that goes into the batch script, with its key."""
    found = [
        (name, value)
        for name in ("partition", "gpu", "account", "qos", "constraint", "exclude", "reservation", "name", "python")
        if isinstance(value := getattr(config, name), str)
    ]
    found += [("setup", line) for line in config.setup] + [("srun", word) for word in config.srun]
    found += [(f"environment.{name}", str(value)) for name, value in config.environment.items()]
    found += [(f"sbatch.{name}", value) for name, value in config.sbatch.items() if isinstance(value, str)]
    if config.mail is not None:
        found.append(("mail.address", config.mail.address))
    if (box := config.container) is not None:
        found += [("container.image", box.image), ("container.program", box.program), ("container.python", box.python)]
        found += [("container.binds", word) for word in box.binds]
        found += [("container.arguments", word) for word in box.arguments]
    return found


KINDS: dict[str, type[ClusterConfig]] = {"slurm": SlurmConfig, "local": LocalConfig}


def _adapter(config: type[ClusterConfig]) -> "TypeAdapter[Any]":
    if config not in _ADAPTERS:
        config_errors.forbid_unknown(config)
        _ADAPTERS[config] = TypeAdapter(config)
    return _ADAPTERS[config]


_ADAPTERS: dict[type[ClusterConfig], "TypeAdapter[Any]"] = {}


def described(config: ClusterConfig) -> dict[str, Any]:
    """What job.json says of it."""
    if isinstance(config, LocalConfig):
        return {}
    return {"nodes": config.nodes, "ranks": config.world, "gpus_per_node": config.gpus_per_node}
