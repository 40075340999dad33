"""Which rank is the odd one, and in what."""

from typing import Any

import pytest

from trainer.parallel import agreement


@pytest.mark.parametrize(
    ("values", "right", "odd"),
    [
        ([5, 5], 0, []),
        ([5, 6], 0, [1]),  # even: rank 0 is right
        ([6, 5], 0, [1]),
        ([6, 5, 5], 1, [0]),
        ([5, 5, 6, 5], 0, [2]),
        ([5, 6, 7, 6], 1, [0, 2]),
        ([None, None], 0, []),  # shards, which nobody else holds
    ],
)
def test_the_majority_is_right(values: list[int | None], right: int, odd: list[int]) -> None:
    assert agreement.odd_ones(values) == (right, odd)


def told(**changes: Any) -> dict[str, Any]:
    return agreement.mine({"optim.lr": 1e-3, "batch": 16, "seed": 0, "images": 64}, device="cpu") | changes


def test_all_alike_is_no_disagreement() -> None:
    assert agreement.disagreement([told(), told(), told()]) is None


def test_it_names_the_rank_and_what_differs() -> None:
    assert "rank 2 differs from rank 0 in torch: 2.9.0 instead of " in str(
        agreement.disagreement([told(), told(), told(torch="2.9.0")])
    )
    assert "rank 0 differs from rank 1 in device: cuda instead of cpu" in str(
        agreement.disagreement([told(device="cuda"), told(), told()])
    )
    one = {"optim.lr": "0.01", "batch": "32", "seed": "1", "images": "1", "more": "2"}
    text = str(agreement.disagreement([told(), told(config=one), told(config=one), told()]))
    assert text == (
        "rank 1 (and 1 more of 4) has another config than rank 0: optim.lr 0.01 instead of 0.001, batch 32 instead of "
        "16, seed 1 instead of 0 and 2 more"
    )


def test_code_is_compared_before_packages_and_config() -> None:
    """Other code may read another config from the same file: the cause is said, and not what follows from it."""
    assert list(told()) == ["code", "device", "torch", "accelerate", "deepspeed", "config"]
