#!/usr/bin/env python3
"""Makes the checkout ready to use: `.venv` with torch, the tested set of packages and the project itself.

    python3 tools/setup/setup.py             # what `make setup` runs: repeatable, goes on after an interruption
    python3 tools/setup/setup.py --freeze    # writes constraints.txt anew from what .venv holds

Standard library only. Without a GPU torch is the CPU build; with one it is PyPI's CUDA build, or the torch that the
system's Python already has.
"""

import argparse
import csv
import fcntl
import hashlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"  # written last: what the environment was made for
LOG = VENV / "setup.log"
CONSTRAINTS = ROOT / "tools" / "setup" / "constraints.txt"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 9)
OLDEST_TRITON = "3.6.0"  # lies beside the newest, for the tests of kernels
EXTRAS = "dev,perceptual,deepspeed,slurm,remote"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP_COMES_FROM_VENV = ("pip", "setuptools", "wheel")


class SetupError(Exception):
    """A step failed; the text says what to do next."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(command: list[str]) -> bool:
    """Runs a program with its output in the log; True if it exits with 0."""
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode == 0


def pip_install(arguments: list[str]) -> bool:
    # No upgrade of what already fits; the pip cache makes a second attempt cheap.
    return run([str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", *arguments])


def last_lines(count: int = 15) -> str:
    lines = [line for line in LOG.read_text(errors="replace").splitlines() if not line.startswith("WARNING: Location")]
    return "\n".join(f"    {line}" for line in lines[-count:])


# ---------------------------------------------------------------------------------------------- what machine this is


def has_gpu() -> bool:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60)
    return listed.returncode == 0 and "GPU" in listed.stdout


def base_python() -> str:
    """The interpreter outside any environment, so that an activated .venv is not made from itself."""
    return getattr(sys, "_base_executable", None) or sys.executable


def system_cuda_torch() -> "str | None":
    """The version of a torch with CUDA, new enough for us, that the system's Python has already; else None."""
    probe = "import torch; print(torch.__version__, torch.version.cuda)"
    found = subprocess.run([base_python(), "-c", probe], capture_output=True, text=True, check=False)
    version, _, cuda = found.stdout.strip().partition(" ")
    if found.returncode != 0 or cuda in ("", "None"):
        return None
    return version if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TORCH else None


def tested_torch() -> str:
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith("torch=="):
            return line.removeprefix("torch==").split(";")[0].strip()
    raise SetupError(f"{CONSTRAINTS} does not name torch")


def environment_settings() -> "dict[str, str]":
    """`pyvenv.cfg` of the environment; empty when there is none."""
    file = VENV / "pyvenv.cfg"
    lines = file.read_text().splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}


def fingerprint(gpu: bool) -> "dict[str, str]":
    """What the environment depends on; a change of any of these runs the set-up again."""
    files = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__))
    return {
        "files": hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest(),
        "root": str(ROOT),
        "python": environment_settings().get("version", ""),
        "gpu": str(gpu),
    }


def up_to_date(gpu: bool) -> bool:
    try:
        return PYTHON.exists() and json.loads(STAMP.read_text()) == fingerprint(gpu)
    except (FileNotFoundError, ValueError):  # ValueError: cut short
        return False


def write_stamp(gpu: bool) -> None:
    (aside := STAMP.with_suffix(".new")).write_text(json.dumps(fingerprint(gpu), indent=1))
    aside.replace(STAMP)  # a disk that is full has not left half a stamp


# ------------------------------------------------------------------------------------------------------- the stages


def is_whole(record: Path, site: Path) -> bool:
    """Whether every file that an installed package lists is there with the size that it lists."""
    for name, _, size in csv.reader(record.read_text().splitlines()):
        if name.endswith(".pyc"):
            continue
        try:
            found = (site / name).stat().st_size
        except FileNotFoundError:
            return False
        if size and int(size) != found:
            return False
    return True


def repair_packages() -> None:
    """Forgets packages that an interrupted installation left in pieces, so that pip installs them again."""
    for site in (VENV / "lib").glob("python3*/site-packages"):
        for info in site.glob("*.dist-info"):
            record = info / "RECORD"
            if not record.exists() or not is_whole(record, site):
                say(f"{info.name.removesuffix('.dist-info')} is incomplete: installing it again")
                shutil.rmtree(info)


def pip_works() -> bool:
    return PYTHON.exists() and run([str(PYTHON), "-m", "pip", "--version"])


def make_environment(*, system_packages: bool) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        package = f"python3.{sys.version_info.minor}-venv"
        raise SetupError(f"Python's venv module is not installed: sudo apt-get install {package}, then run this again")
    wanted = "true" if system_packages else "false"
    if VENV.exists() and environment_settings().get("include-system-site-packages", wanted) != wanted:
        say("the environment was made for another torch: making it anew")
        shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    repair_packages()
    options = ["--system-site-packages"] if system_packages else []
    for clear in ([], ["--clear"]):
        if pip_works():
            return
        created = subprocess.run(
            [base_python(), "-m", "venv", *options, *clear, str(VENV)], capture_output=True, text=True, check=False
        )
        LOG.touch()
        if created.returncode != 0 and clear:
            raise SetupError(f"python -m venv failed:\n{created.stdout}{created.stderr}")
    if not pip_works():
        raise SetupError(f"pip does not start in {VENV}; remove that folder and run this again")


def installed_torch() -> str:
    """The version of torch in the environment, with the `+cpu` of its metadata; empty when there is none."""
    probe = "import importlib.metadata as m; print(m.version('torch'))"
    return subprocess.run([str(PYTHON), "-c", probe], capture_output=True, text=True, check=False).stdout.strip()


def install_torch(*, gpu: bool) -> None:
    """Torch by itself and first: a plain range in the next step would take a CUDA build of several GB."""
    version = tested_torch()
    present = installed_torch()
    if present.partition("+")[0] == version and not (gpu and present.endswith("+cpu")):
        return
    if gpu:
        if present and not run([str(PYTHON), "-m", "pip", "uninstall", "-y", "torch"]):
            raise SetupError(f"cannot replace torch {present}:\n{last_lines()}")
        attempts = [[f"torch=={version}"]]
    else:
        cpu = ["--no-deps", f"torch=={version}+cpu"]
        attempts = [cpu, [*cpu, "--extra-index-url", CPU_INDEX, "--retries", "0", "--timeout", "15"]]
        attempts = attempts if platform.system() == "Linux" else []  # elsewhere PyPI's build is the CPU build
        attempts.append([f"torch=={version}"])
    for number, attempt in enumerate(attempts):
        if number == 2:
            say(f"no CPU build of torch {version} can be reached: taking PyPI's, with CUDA, several GB")
        if pip_install(attempt):
            break
    else:
        raise SetupError(f"torch {version} cannot be installed:\n{last_lines()}\n  all of it: {LOG}")
    if gpu and installed_torch().endswith("+cpu"):
        say("note: there is a GPU, but pip's own sources offer a CPU build of torch and it was taken")


def install_oldest_triton() -> None:
    """Where tests/kernels/test_oldest_triton.py looks for it; a GPU's torch brings the triton that it needs itself."""
    folder = VENV / f"triton-{OLDEST_TRITON}"
    if platform.system() != "Linux" or platform.machine() != "x86_64" or (folder / "triton" / "__init__.py").exists():
        return
    aside = VENV / "triton.new"
    shutil.rmtree(aside, ignore_errors=True)
    if not pip_install(["--no-deps", "--target", str(aside), f"triton=={OLDEST_TRITON}"]):
        raise SetupError(f"triton {OLDEST_TRITON} cannot be installed:\n{last_lines()}\n  all of it: {LOG}")
    aside.replace(folder)


def install_project(*, constraints: Path) -> None:
    if not pip_install(["--constraint", str(constraints), "--editable", f"{ROOT}[{EXTRAS}]"]):
        raise SetupError(f"the packages cannot be installed:\n{last_lines()}\n  all of it: {LOG}")


def check_environment() -> str:
    probe = (
        "import torch, accelerate, trainer, launch, tools;"
        "print('torch', torch.__version__, 'with CUDA' if torch.version.cuda else 'CPU build')"
    )
    ran = subprocess.run([str(PYTHON), "-W", "ignore", "-c", probe], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise SetupError(f"the environment does not work:\n{ran.stderr.strip()}")
    return ran.stdout.strip()


def stage(number: int, text: str) -> None:
    say(f"[{number}/3] {text}")


def set_up() -> None:
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"Python {platform.python_version()} is too old: use 3.10 or newer (make PYTHON=python3.11 setup)"
        )
    started = time.monotonic()
    gpu = has_gpu()
    if up_to_date(gpu):
        return
    system_torch = system_cuda_torch() if gpu else None
    stage(1, f"environment {VENV.name} for Python {platform.python_version()}, {'with' if gpu else 'no'} GPU")
    STAMP.unlink(missing_ok=True)
    make_environment(system_packages=system_torch is not None)
    constraints = CONSTRAINTS
    if gpu:  # torch and triton come together there
        constraints = VENV / "constraints.txt"
        brought = ("triton==", "torch==") if system_torch else ("triton==",)
        lines = CONSTRAINTS.read_text().splitlines(keepends=True)
        constraints.write_text("".join(line for line in lines if not line.startswith(brought)))
    if system_torch:
        stage(2, f"torch {system_torch} of the system's Python")
    else:
        stage(2, f"torch {tested_torch()}, {'CUDA build (several GB)' if gpu else 'CPU build (about 200 MB)'}")
        install_torch(gpu=gpu)
    stage(3, "the tested set of packages, and the project itself")
    install_project(constraints=constraints)
    if not gpu:
        install_oldest_triton()
    result = check_environment()
    write_stamp(gpu)
    say(f"ready in {time.monotonic() - started:.0f} s: {result}")


def freeze() -> None:
    """Writes constraints.txt from the environment; packages that need Python 3.11 get a marker for it."""
    probe = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name: [d.version, d.metadata.get('Requires-Python') or ''] for d in m.distributions()}))"
    )
    found = subprocess.run([str(PYTHON), "-c", probe], capture_output=True, text=True, check=True).stdout
    lines = []
    for name, (version, needs) in sorted(json.loads(found).items(), key=lambda item: item[0].lower()):
        if name in ("tandem", *PIP_COMES_FROM_VENV):
            continue
        marker = '; python_version >= "3.11"' if ">=3.11" in needs.replace(" ", "") else ""
        lines.append(f"{name}=={version.partition('+')[0]}{marker}\n")
    head = "# The tested set. pyproject.toml holds the ranges. Renew: python3 tools/setup/setup.py --freeze\n"
    CONSTRAINTS.write_text(head + "".join(lines))
    say(f"{len(lines)} packages written to {CONSTRAINTS.relative_to(ROOT)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--freeze", action="store_true", help="write constraints.txt from what .venv holds")
    arguments = parser.parse_args()
    with Path(__file__).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at once: the second waits and finds it done
            freeze() if arguments.freeze else set_up()
        except (SetupError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
            print(f"setup: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("setup: interrupted; run it again and it goes on from here", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
