"""`tandem train` runs Tandem's own code in a folder that has modules of the same names."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "processes", [pytest.param("1", id="in place of the command"), pytest.param("2", id="as workers")]
)
def test_modules_of_the_current_folder_are_not_taken_for_ours(tmp_path: Path, processes: str) -> None:
    own = tmp_path / "project"
    for name in ("trainer", "launch", "tools"):
        (own / name).mkdir(parents=True)
        (own / name / "__init__.py").write_text(f"raise RuntimeError('{name} of the current folder')\n")
    (own / "trainer.py").write_text("raise RuntimeError('trainer.py of the current folder')\n")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "tandem"  # as pip installs it: the current folder is not on its path
    command.write_text(f"import sys\nsys.path.append({str(ROOT)!r})\nfrom launch.cli import main\nsys.exit(main())\n")
    words = [sys.executable, str(command), "train", "absent.yaml", "--processes", processes]
    done = subprocess.run(words, cwd=own, capture_output=True, text=True, timeout=120)
    assert "of the current folder" not in done.stderr
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("tandem: error: ") and "absent.yaml" in done.stderr
