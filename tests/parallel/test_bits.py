"""A start sums gradients over ranks in the order in which any other start sums them."""

import shutil
from pathlib import Path

import pytest

from tests.runs import BATCH, curves, same, tensors, write_config
from tests.starts import train


@pytest.mark.parametrize("method", ["vae", "vaegan"])
def test_four_ranks_that_go_on_come_to_the_same_bits(method: str, few: Path, tmp_path: Path) -> None:
    """Sums of two are the same in any order, of four they are not: DDP builds its buckets anew after the first update,
    in the order in which gradients became ready there."""
    config = write_config(tmp_path / "whole.yaml", method, data=few, images=12 * BATCH, checkpoint={"every": 4 * BATCH})
    train(tmp_path / "logs", str(config), world=4).wait().ok()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for images in (8, 12):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"{images * BATCH:012d}")
    train(tmp_path / "logs", str(config), f"run={tmp_path}/cut", world=4).wait().ok()
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    assert curves(tmp_path / "whole") == curves(tmp_path / "cut")
