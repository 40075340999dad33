"""The set-up's judgement of an environment; a whole installation is what `make setup` does before each test run."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup/setup.py, looking at an empty folder in place of the checkout's .venv."""
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "tools" / "setup" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    for name, path in {
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / "setup.json",
        "LOG": venv / "setup.log",
    }.items():
        monkeypatch.setattr(module, name, path)
    return module


def package(setup: ModuleType, name: str) -> Path:
    """An installed package of one file, as pip leaves it."""
    site: Path = setup.VENV / "lib" / "python3.11" / "site-packages"
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text("value = 1\n")
    record = f"{name}.py,sha256=x,10\n__pycache__/{name}.cpython-311.pyc,,\n{info.name}/RECORD,,\n"
    (info / "RECORD").write_text(record)
    return info


def test_a_whole_package_is_left_alone(setup: ModuleType) -> None:
    info = package(setup, "whole")
    setup.repair_packages()
    assert info.exists()


@pytest.mark.parametrize("damage", ["file missing", "file cut short", "record missing"])
def test_a_package_that_an_interruption_left_in_pieces_is_installed_again(
    damage: str, setup: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    info = package(setup, "broken")
    file = info.parent / "broken.py"
    if damage == "file missing":
        file.unlink()
    elif damage == "file cut short":
        file.write_text("val")
    else:
        (info / "RECORD").unlink()
    setup.repair_packages()
    assert not info.exists()
    assert "broken-1.0 is incomplete" in capsys.readouterr().out


def test_an_environment_is_up_to_date_until_what_it_was_made_for_changes(setup: ModuleType) -> None:
    setup.PYTHON.parent.mkdir(parents=True)
    setup.PYTHON.touch()
    (setup.VENV / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    assert not setup.up_to_date(gpu=False)
    setup.STAMP.write_text(json.dumps(setup.fingerprint(gpu=False)))
    assert setup.up_to_date(gpu=False)
    assert not setup.up_to_date(gpu=True)
    (setup.VENV / "pyvenv.cfg").write_text("version = 3.12.1\n")
    assert not setup.up_to_date(gpu=False)


@pytest.mark.parametrize("text", ["", '{"files": "ab', "null", "\x00\x00", "[1]"])
def test_a_stamp_that_was_cut_short_sets_up_again(text: str, setup: ModuleType) -> None:
    setup.PYTHON.parent.mkdir(parents=True)
    setup.PYTHON.touch()
    setup.STAMP.write_text(text)
    assert not setup.up_to_date(gpu=False)
    setup.STAMP.write_bytes(b"\xff\xfe")
    assert not setup.up_to_date(gpu=False)


def test_a_stamp_is_there_whole_or_not_at_all(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.VENV.mkdir()
    setup.write_stamp(gpu=False)
    assert json.loads(setup.STAMP.read_text()) == setup.fingerprint(gpu=False)
    before = setup.STAMP.read_bytes()

    def half(path: Path, text: str) -> None:
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        setup.write_stamp(gpu=True)
    assert setup.STAMP.read_bytes() == before


def test_types_are_checked_for_the_oldest_python_that_is_promised(setup: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (promised,) = re.findall(r'^requires-python = ">=([0-9.]+)"', text, re.MULTILINE)
    (checked,) = re.findall(r'^python_version = "([0-9.]+)"', text, re.MULTILINE)
    assert checked == promised == ".".join(map(str, setup.OLDEST_PYTHON))


def test_without_a_gpu_no_cuda_build_is_asked_for_while_a_cpu_build_may_be_had(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def refuse_first(arguments: list[str]) -> bool:
        asked.append(arguments)
        return len(asked) == 2

    monkeypatch.setattr(setup, "installed_torch", lambda: "")
    monkeypatch.setattr(setup, "pip_install", refuse_first)
    monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
    setup.install_torch(gpu=False)
    version = setup.tested_torch()
    assert all(f"torch=={version}+cpu" in arguments for arguments in asked)
    assert setup.CPU_INDEX not in asked[0]  # what pip is configured with comes first
    assert setup.CPU_INDEX in asked[1]


def test_with_a_gpu_a_cpu_build_is_replaced(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[str]] = []
    version = setup.tested_torch()
    monkeypatch.setattr(setup, "installed_torch", lambda: f"{version}+cpu" if not done else version)
    for name in ("run", "pip_install"):
        monkeypatch.setattr(setup, name, lambda arguments: bool(done.append(arguments)) or True)
    setup.install_torch(gpu=True)
    assert done[0][-3:] == ["uninstall", "-y", "torch"]
    assert done[1:] == [[f"torch=={version}"]]


def test_a_python_without_venv_is_told_what_to_install(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(setup.SetupError, match=r"sudo apt-get install python3\.\d+-venv"):
        setup.make_environment(system_packages=False)


def test_the_tested_set_names_exact_versions_within_the_ranges_of_the_project(setup: ModuleType) -> None:
    from packaging.requirements import Requirement

    lines = [line for line in setup.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    tested = {}
    for requirement in map(Requirement, lines):
        (only,) = requirement.specifier
        assert only.operator == "=="
        tested[re.sub(r"[-_.]+", "-", requirement.name).lower()] = only.version
    text = (ROOT / "pyproject.toml").read_text()
    asked = re.findall(r'"([A-Za-z0-9-]+>=[0-9.]+)"', text.replace("setuptools", ""))
    assert len(asked) > 20
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(tested[requirement.name.lower()]), requirement


def test_it_runs_on_the_standard_library_alone() -> None:
    script = ROOT / "tools" / "setup" / "setup.py"
    ran = subprocess.run([sys.executable, "-I", "-S", str(script), "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "--freeze" in ran.stdout
