"""The `tandem` command from outside."""

import importlib.util
import os
import subprocess
import sys

import pytest

from launch.cli import VERBS, find


def tandem(*arguments: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
    ran = subprocess.run([sys.executable, "-m", "launch.cli", *arguments], capture_output=True, text=True, timeout=60)
    assert ran.returncode == code, ran.stderr
    return ran


def test_help_lists_every_verb_and_an_example() -> None:
    shown = tandem("--help").stdout
    assert all(f"  {name} " in shown and verb.help in shown for name, verb in VERBS.items())
    assert "example:" in shown


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_help_of_a_group_lists_its_verbs(flag: str) -> None:
    shown = tandem("data", flag).stdout
    group = {name for name in VERBS if name.startswith("data ")}
    assert all((f"  {name} " in shown) == (name in group) for name in VERBS)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from launch import cli; sys.argv = ['tandem', '--help']; code = cli.main();"
        "heavy = {'torch', 'numpy', 'tyro', 'pydantic', 'accelerate', 'PIL', 'rich', 'yaml'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_without_a_verb_the_usage_is_shown_and_the_exit_code_is_2() -> None:
    assert "usage: tandem VERB" in tandem(code=2).stdout


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["trian", "a.yaml"], "did you mean train?"),
        (["data", "mkae"], "did you mean data make?"),
        (["data"], "say which: data make, "),
        (["xyzzy"], "tandem --help"),
    ],
)
def test_an_unknown_verb_is_answered_with_the_nearest(argv: list[str], hint: str) -> None:
    said = tandem(*argv, code=2)
    assert said.stdout == ""
    assert said.stderr.startswith("tandem: error: ")
    assert hint in said.stderr
    assert said.stderr.count("\n") == 1


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_gets_what_follows_it(name: str) -> None:
    assert find([*name.split(), "a", "--b"]) == (VERBS[name], ["a", "--b"])


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_leads_to_a_module_that_exists(name: str) -> None:
    assert importlib.util.find_spec(VERBS[name].module) is not None


def test_a_closed_pipe_ends_the_command_without_a_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([sys.executable, "-u", "-m", "launch.cli", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, b"")
