"""What must fit when a run goes on: the configuration, and the names and shapes of tensors (F4-2, F4-5)."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.resume import bare_names, changed, match, refuse_changes

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


class Wrapper(nn.Module):  # what DDP does to names
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def inner_compiled() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    net[1] = compiled(net[1])
    return net


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, compiled, lambda m: Wrapper(compiled(m)), lambda m: compiled(Wrapper(m)), lambda m: Wrapper(Wrapper(m))],
)
@pytest.mark.parametrize("inside", [False, True])
def test_wrappers_leave_no_trace_in_names(wrap: "type[Wrapper]", inside: bool) -> None:
    bare = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1))).state_dict()
    module = inner_compiled() if inside else nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))
    wrapped: dict[str, Tensor] = wrap(module).state_dict()
    names = bare_names(wrapped)
    match(bare, names, "wrapped")
    assert [t.data_ptr() for t in names.values()] == [t.data_ptr() for t in wrapped.values()]


def test_bare_names_keep_a_name_that_only_contains_module() -> None:
    assert bare_names({"submodule.weight": torch.ones(1), "a.module.b": torch.ones(1)}).keys() == {
        "submodule.weight",
        "a.module.b",
    }
