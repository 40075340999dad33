"""The tests of kernels once more, under the oldest triton that is supported: what GPU machines with torch 2.11 have.

Its interpreter takes two to four times as long, so what triton has no part in, or hears nothing new from, is left out:
plain torch, torch's own checks of operators, compiled graphs, kernels that were spoilt on purpose, and float16."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent.parent
VERSION = "3.6.0"
OLDEST = ROOT / ".venv" / f"triton-{VERSION}"
FILES = [
    path.name
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if "triton" in path.read_text() and path.name not in (Path(__file__).name, "test_ahead_of_time.py")
]
LEFT_OUT = (  # parts of tests' names
    *("eager", "compiled", "graph", "operator", "torch_knows", "in_training"),
    *("cast", "tolerances_notice", "torch.float16"),
)

RUN = f"""
import sys, pytest, triton
assert triton.__version__ == {VERSION!r}, triton.__file__
assert triton.knobs.runtime.interpret
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not OLDEST.is_dir(), reason=f"no {OLDEST.name}: tools/setup installs it where there is no GPU")
@pytest.mark.parametrize("file", FILES)
def test_kernels_do_the_same_under_the_oldest_triton(file: str, tmp_path: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-k", " and ".join(f"not {part}" for part in LEFT_OUT)]
    report = tmp_path / "report.xml"
    result = subprocess.run(
        [sys.executable, "-c", RUN, f"tests/kernels/{file}", *options, f"--junitxml={report}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(OLDEST), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    suite = ElementTree.parse(report).getroot()[0]
    ran = int(suite.attrib["tests"]) - int(suite.attrib["skipped"])
    assert ran >= 5, "the selection leaves almost nothing"
