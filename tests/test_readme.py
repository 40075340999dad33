"""Every command of the pages works as it stands there; only trainings are made short, and the data are few.

RULES says how each command is run. A command that no rule knows fails, and so does a rule that no page needs.
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from launch import machines
from launch.cli import VERBS
from tests import starts
from tests.launch import made as runs_made
from tests.starts import ROOT, SHORT
from tools.shards.make import parse as make_options
from tools.soak.slurm import parse as soak_of_slurm
from trainer import config as configuration

PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("", "trainer", "trainer/*", "launch", "configs", "configs/*", "tools/*")
    for path in ROOT.glob(f"{folder}/README.md" if folder else "README.md")
)
PROGRAMS = ("tandem", "make", "python", "accelerate", "torchrun", "tensorboard", "pip")
PLACEHOLDERS = {"CONFIG": "configs/vaegan_fashion.yaml", "RUN": "runs/vaegan_fashion"}
BIN = Path(sys.executable).parent


def commands(page: str) -> list[str]:
    """Commands of a page: indented lines, and inline code with arguments, that begin with a program; no comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    candidates = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    candidates += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    found = [candidate.split("  #")[0].split(" # ")[0].strip() for candidate in candidates]
    found = [command for command in found if command.split(" ")[0] in PROGRAMS and " " in command]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- how they are run
def forked(words: list[str], work: Path) -> None:
    """`tandem ...` as it stands."""
    starts.tandem(work / "logs", *words[1:], cwd=work).ok()


def trained(words: list[str], work: Path) -> None:
    """`tandem train ...`, short; into the folder that the page names, so that the page's next command finds it."""
    overrides = (*SHORT, *starts.small(words[2]), "checkpoint.resume=auto")
    starts.tandem(work / "logs", *words[1:], *overrides, cwd=work).ok()


def program(words: list[str], work: Path, *, code: int = 0) -> str:
    """A program of the environment in a process of its own."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == code, f"{shlex.join(words)}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout + ran.stderr


def launched(words: list[str], work: Path) -> None:
    """Another launcher, short, in a folder of its own."""
    out = program([*words, *SHORT, f"run=runs/launched{len(list((work / 'runs').iterdir()))}"], work)
    assert "everything is in" in out


def made(words: list[str], work: Path) -> None:
    """`make TARGET`: what it would do, and the programs in it exist; the targets themselves start this very test."""
    told = program(["make", "-n", *words[1:]], ROOT)
    for module in re.findall(r"-m (tools\.\w+)", told):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    assert told


def fashion_made(words: list[str], work: Path) -> None:
    """Onto the whole set, which is there already (`fashion`); tests/tools/test_shards_fashion.py makes one."""
    said = starts.tandem(work / "logs", *words[1:-1], str(ROOT / "data" / "fashion-mnist"), cwd=work).ok()
    assert "already complete" in said.out


def folder_made(words: list[str], work: Path) -> None:
    """From a folder of colour pictures of two sizes, which is put where the page has one."""
    source = work / words[4]
    if not source.exists():
        for number in range(40):
            path = source / ("cats" if number % 2 else "dogs") / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (150 + number % 2, 140), (number, 5 * number, 200)).save(path)
    forked(words, work)


def understood(words: list[str], work: Path) -> None:
    """Its options exist; tests/tools/test_shards_*.py makes the set, from packages that are not fetched."""
    assert make_options(words[3:]).dest


def board_shown(words: list[str], work: Path) -> None:
    """TensorBoard on the folder, asked for its runs."""
    with subprocess.Popen(
        [str(BIN / words[0]), *words[1:], "--port", "0"], cwd=work, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "http://" in line)
        address = re.search(r"http://\S+", line)[0]  # type: ignore[index]
        for _ in range(100):
            with urllib.request.urlopen(f"{address}data/runs") as answer:
                runs = answer.read().decode()
            if "vaegan_fashion" in runs:
                break
            time.sleep(0.1)
        process.terminate()
        process.stderr.read()
    assert "vaegan_fashion" in runs


def benchmarked(words: list[str], work: Path) -> None:
    """Its options and models exist; tests/tools/test_bench*.py run it, which takes minutes as a page has it."""
    at = 4 if words[2].endswith("data") else 3  # after the verb
    module = importlib.import_module(".".join([words[2], *words[3:at]]))
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        module.main(["--help"])
    parts = {part for word in words[at:] for part in ([word] if word.startswith("--") else word.split(",")) if part}
    unknown = [part for part in parts if part[0].isalpha() and "." not in part and part not in told.getvalue()]
    unknown += [part for part in parts if part.startswith("--") and part not in told.getvalue()]
    assert not unknown, f"{unknown} are not in the help"


def measured(words: list[str], work: Path) -> None:
    """Few samples; runs that the page trained before."""
    program([sys.executable, *words[1:], "--samples", "100"], work)


def soaked(words: list[str], work: Path) -> None:
    """Fewer samples and kills."""
    program([sys.executable, *words[1:], "--samples", "6000", "--kills", "2"], work)


def installed(words: list[str], work: Path) -> None:
    """`pip install .` of a copy of what git knows, without its dependencies, into a folder."""
    copy, target = work / "copy", work / "installed"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in files.split("\0")[:-1]:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--target", str(target)]
    program([sys.executable, "-m", *words[:2], *options, "."], copy)
    assert (target / "bin" / "tandem").exists()
    assert (target / "trainer" / "loop.py").exists() and not (target / "tests").exists()


def helped(words: list[str], work: Path) -> None:
    said = starts.tandem(work / "logs", *words[1:], cwd=work).ok()
    assert "usage:" in said.out


def shown(words: list[str], work: Path) -> None:
    """What would be submitted; tests/slurm submits."""
    dry = [word for word in words if word != "--dry-run"]
    said = starts.tandem(work / "logs", *dry[1:], "--dry-run", cwd=work).ok()
    if "local" in words:
        assert "tandem train" in said.out
    else:
        assert "#!/bin/bash" in said.out and "srun" in said.out


def of_submitted(words: list[str], work: Path) -> None:
    """On runs that were submitted and are done; tests/launch and tests/slurm have others."""
    for word in words[2:]:
        if word.startswith("runs/"):
            run = runs_made.here(work / word)
            (run / "logs").mkdir(exist_ok=True)
            (run / "logs" / "local-1_0.log").write_text("trained\n")
            runs_made.ended(run, 0, "done")
    said = starts.tandem(work / "logs", *words[1:], cwd=work)
    if words[1] == "resubmit":
        assert "is done; for more" in said.refused()
    else:
        assert ("trained" if words[1] == "logs" else "is over already: done") in said.ok().out


def tabled(words: list[str], work: Path) -> None:
    runs_made.sweep(work / words[3])
    assert "20.5 ± 0.71" in starts.tandem(work / "logs", *words[1:], cwd=work).ok().out


def of_slurm(words: list[str], work: Path) -> None:
    """Its verb and options exist; tests/slurm starts a cluster."""
    told = program([sys.executable, "-m", "tools.slurm", "--help"], ROOT)
    assert all(word.strip("`") in told for word in words[3:])


def refused(words: list[str], work: Path) -> None:
    """A launcher that silently starts fewer processes than it was asked for."""
    said = program([*words, "-m", "trainer", PLACEHOLDERS["CONFIG"], "run=runs/fewer"], work, code=1)  # accelerate's
    assert "2 processes were asked for by accelerate launch --num_processes, 1 came up" in said


def for_machines(words: list[str], work: Path) -> None:
    """Its options exist; tests/parallel/test_machines.py runs it on two machines."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    if words[0] == "accelerate":
        told = launch_command_parser().parse_args(words[2:])
        assert Path(ROOT / told.config_file).exists() and told.machine_rank == 0 and told.main_process_ip
    elif words[0] == "torchrun":
        assert get_args_parser().parse_args(words[1:]).nnodes == "2"
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--port", type=int)
        machines.add_arguments(parser)
        assert machines.chosen(parser.parse_known_args(words[2:])[0]).count == 2


def rendered(words: list[str], work: Path) -> None:
    """It prints what tests/parallel/test_zero.py measures and compares with the page; here from nothing measured."""
    from tests.parallel import table

    assert callable(table.main) and len(table.render({})) == len(table.render(table.stated(table.PAGE.read_text())))


RULES: dict[str, Callable[[list[str], Path], None]] = {
    r"tandem .*--help": helped,
    r"tandem data make fashion-mnist": lambda words, work: fashion_made([*words, "data"], work),
    r"tandem data make fashion-mnist \S+": fashion_made,
    r"tandem data make folder .*": folder_made,
    r"tandem data make (emoji|faces-drawn|photos) .*": understood,
    r"tandem data (check|index|make|reshard|show|stats|verify)": lambda words, work: helped([*words, "--help"], work),
    r"tandem data (check|index|reshard|show|stats|verify) .*": forked,
    r"tandem (train|check)": lambda words, work: helped([*words, "--help"], work),
    r"tandem status( runs/.*)?": forked,
    r"tandem (cancel|logs|resubmit|status|sweep)( (RUN|CONFIG|\[).*)?": lambda words, work: helped(
        [*words[:2], "--help"], work
    ),
    r"tandem (cancel|logs|resubmit) runs/.*": of_submitted,
    r"tandem sweep --table .*": tabled,
    r"tandem sweep .*": shown,
    r"tandem submit CONFIG \[.*": lambda words, work: helped([*words[:2], "--help"], work),
    r"tandem submit": lambda words, work: helped([*words, "--help"], work),
    r"tandem submit .*": shown,
    r"python -m tools\.slurm .*": of_slurm,
    r"tandem train CONFIG \[.*": lambda words, work: trained(["tandem", "train", PLACEHOLDERS["CONFIG"]], work),
    r"tandem train config\.yaml": lambda words, work: trained(
        ["tandem", "train", "runs/vae_fashion/config.yaml", "run=runs/again"], work
    ),
    r"(accelerate launch|torchrun|tandem train) .*10\.0\.0\.1.*": for_machines,
    r"tandem train .*": trained,
    r"tandem (sample|reconstruct|interpolate)": lambda words, work: forked([*words, "runs/vaegan_fashion"], work),
    r"tandem (check|sample|reconstruct|interpolate) .*": forked,
    r"tandem export RUN .*": lambda words, work: helped([*words[:2], "--help"], work),
    r"tandem export .*": forked,
    r"tandem env( \[?--json\]?)?": lambda words, work: forked([word.strip("[]") for word in words], work),
    r"(accelerate launch|torchrun|python) .*-m trainer .*": launched,
    r"accelerate launch --cpu --num_processes 2": refused,
    r"python -X dev -m launch\.cli \.\.\.": lambda words, work: program([*words[:-1], "env"], work) and None,
    r"python -m tools\.bench\.(train|parallel|precision|memory|data (plan|read|wait)).*": benchmarked,
    r"python -m tools\.bench\.(step|losses|penalties|activations|gpu|carry|page).*": benchmarked,
    r"python -m tests\.parallel\.table": rendered,
    r"python -m tools\.quality .*": measured,
    r"python -m tools\.soak\.data .*": soaked,
    r"python -m tools\.soak\.slurm .*": lambda words, work: soak_of_slurm(words[3:]) and None,
    r"make .*": made,
    r"tensorboard --logdir runs": board_shown,
    r"pip install \.": installed,
}


def rule(command: str) -> Callable[[list[str], Path], None] | None:
    return next((how for pattern, how in RULES.items() if re.fullmatch(pattern, command)), None)


@pytest.fixture
def work(shipped: Path, tmp_path: Path) -> Path:
    """A folder of the page's own, with the data and a run of each shipped config."""
    shutil.copytree(shipped, tmp_path / "work", symlinks=True)
    return tmp_path / "work"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_works(page: str, work: Path, fashion: Path) -> None:
    for command in commands(page):
        how = rule(command)
        assert how is not None, f"{page}: no rule says how to run: {command}"
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
        try:
            how(words, work)
        except AssertionError as error:
            raise AssertionError(f"{page}: {command}\n{error}") from error


def test_every_rule_is_needed_by_a_page() -> None:
    every = [command for page in PAGES for command in commands(page)]
    unused = [
        pattern
        for pattern, how in RULES.items()
        if not any(re.fullmatch(pattern, command) and rule(command) is how for command in every)
    ]
    assert not unused


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_shows_an_example_that_a_rule_knows(verb: str, tmp_path: Path) -> None:
    said = starts.tandem(tmp_path / "logs", *verb.split(), "--help").ok()
    examples = re.findall(rf"^  (tandem {verb}.*)$", said.out, flags=re.MULTILINE)
    assert examples
    assert all(rule(example.split(" > ")[0]) for example in examples)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing


def test_the_config_of_the_first_page_is_one(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?:^    .*\n)+", text[text.index("    run:") :], flags=re.MULTILINE)[:1]
    tree = yaml.safe_load(re.sub("^    ", "", block, flags=re.MULTILINE))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert configuration.load(tmp_path / "config.yaml", []).method.kind == "vae"


def test_the_mistake_of_the_first_page_is_answered_as_it_says(tmp_path: Path) -> None:
    (shown,) = re.findall(r"`(tandem: error: [^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "vae_fashion.yaml", tmp_path / "configs" / "x.yaml")
    text = (tmp_path / "configs" / "x.yaml").read_text().replace("  lr: ", "  learning_rate: ")
    (tmp_path / "configs" / "x.yaml").write_text(text)
    said = starts.tandem(tmp_path / "logs", "train", "configs/x.yaml", cwd=tmp_path)
    assert said.refused() == shown


def test_the_demo_trains_on_two_processes_and_draws(shipped: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(shipped, work, symlinks=True)
    shutil.rmtree(work / "runs")
    out = program([sys.executable, "-m", "tools.demo", *SHORT], work)
    assert "demo done in" in out
    assert {path.name for path in (work / "runs" / "vaegan_fashion" / "pictures").iterdir()} >= {
        "samples.png", "reconstructions.png", "interpolation.png",
    }  # fmt: skip
    assert "nothing to do: " in program([sys.executable, "-m", "tools.demo", *SHORT], work)  # again: as it is
