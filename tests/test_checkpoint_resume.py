"""What must fit when a run goes on: the configuration, and the names and shapes of tensors (F4-2)."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.resume import changed, match, refuse_changes

OLD = {"seed": 1, "optim": {"lr": 1e-4, "betas": [0.0, 0.99]}, "method": {"kind": "vae", "beta": 1.0}, "ema": None}
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab:é", max_size=3)
trees = st.dictionaries(
    st.sampled_from("abc"),
    leaves | st.lists(leaves, max_size=2) | st.dictionaries(st.sampled_from("xy"), leaves),
    max_size=3,
)


def test_every_changed_field_is_named_with_both_values() -> None:
    new = {"seed": 1, "optim": {"lr": 5e-5, "betas": (0.0, 0.9)}, "method": {"kind": "vae"}, "ema": {"half_life": 5}}
    assert changed(OLD, new) == [
        ("optim.lr", 1e-4, 5e-5),
        ("optim.betas", [0.0, 0.99], [0.0, 0.9]),
        ("method.beta", 1.0, "(absent)"),
        ("ema", None, "(absent)"),
        ("ema.half_life", "(absent)", 5),
    ]


@settings(deadline=None)  # cores are shared
@given(tree=trees)
def test_a_configuration_does_not_differ_from_itself(tree: dict[str, object]) -> None:
    assert changed(tree, tree) == []


@settings(deadline=None)  # cores are shared
@given(old=trees, new=trees)
def test_changes_are_the_same_both_ways(old: dict[str, object], new: dict[str, object]) -> None:
    assert sorted(key for key, _, _ in changed(old, new)) == sorted(key for key, _, _ in changed(new, old))


def test_values_are_compared_as_yaml_holds_them() -> None:
    assert changed({"a": (1, 2), "p": Path("x/y"), "n": 1}, {"a": [1, 2], "p": "x/y", "n": 1.0}) == []
    assert changed({"a": 1}, {"a": True}) == [("a", 1, True)]
    assert changed({"a": [0]}, {"a": [False]}) == [("a", [0], [False])]
    assert changed({"a": None}, {}) == [("a", None, "(absent)")]


def test_allowed_changes_become_lines_and_others_are_refused_by_name() -> None:
    new = {**OLD, "optim": {"lr": 5e-5, "betas": [0.0, 0.99]}}
    assert refuse_changes(OLD, new, {"optim"}) == ["optim.lr: 0.0001 -> 5e-05"]
    assert refuse_changes(OLD, new, {"optim.lr"}) == ["optim.lr: 0.0001 -> 5e-05"]
    for allowed in (set(), {"opt"}, {"optim.l"}, {"optim.lr.x"}):
        with pytest.raises(ValueError, match=r"optim\.lr: 0\.0001 -> 5e-05"):
            refuse_changes(OLD, new, allowed)


def test_one_allowed_change_does_not_excuse_another() -> None:
    new = {**OLD, "seed": 2, "ema": 7}
    with pytest.raises(ValueError, match="seed: 1 -> 2") as caught:
        refuse_changes(OLD, new, {"ema"})
    assert "ema" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused_with_what_differs() -> None:
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(1), "c": torch.zeros(())}
    found = {"a": torch.zeros(3, 2), "c": torch.zeros(()), **{f"x{i}": torch.zeros(1) for i in range(6)}}
    with pytest.raises(ValueError) as caught:
        match(expected, found, "runs/a/checkpoints/1: generator")
    assert str(caught.value) == (
        "runs/a/checkpoints/1: generator is a checkpoint of another model: missing: b; "
        "unexpected: x0, x1, x2, x3 and 2 more; of another shape: a (3, 2) instead of (2, 3)"
    )
    match(expected, {name: tensor.clone() for name, tensor in reversed(expected.items())}, "same")
