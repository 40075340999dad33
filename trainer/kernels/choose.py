"""Which implementation of an operation runs: one place that chooses, says why once, and refuses what cannot run.

    eager     plain torch, any device and dtype: the definition
    compiled  the same through torch.compile
    triton    the kernel of this folder: on GPUs, or interpreted (TRITON_INTERPRET=1) by the tests
    auto      triton where a GPU and the tensors allow it, else eager

An implementation that was asked for by name and cannot run is an error.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch._functorch import config as functorch

from trainer.kernels.program import INTERPRETED, LACKING

Impl = Literal["auto", "eager", "compiled", "triton"]
Picked = Literal["eager", "compiled", "triton"]
F = TypeVar("F", bound=Callable[..., Any])

_preferred: dict[str, Impl] = {"": "auto"}
"""By operation; "" stands for all others."""
_twice: list[bool] = [False]
_said: dict[tuple[str, Picked, str], bool] = {}
"""Choices and reasons, and whether `news` has told them."""


def prefer(impl: Impl, *operations: str) -> None:
    """What `operations`, or all of them where none is named, take that are not told otherwise, in this process: the
    config's `impl`."""
    if not operations:
        _preferred.clear()
    _preferred.update(dict.fromkeys(operations or ("",), impl))


@contextlib.contextmanager
def preferred(impl: Impl, *operations: str) -> Iterator[None]:
    """`prefer` for a while: for tests and benchmarks."""
    before = dict(_preferred)
    prefer(impl, *operations)
    try:
        yield
    finally:
        _preferred.clear()
        _preferred.update(before)


@contextlib.contextmanager
def differentiated_twice() -> Iterator[None]:
    """Forwards inside are differentiated with create_graph: nothing compiled may be among them, for torch.compile
    knows no double backward (pytorch#91469), and before torch 2.11 such a gradient could silently train nothing."""
    before, _twice[0] = _twice[0], True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _twice[0] = before


def is_differentiated_twice() -> bool:
    """Whether `differentiated_twice` is in force."""
    return _twice[0]


def choose(
    operation: str,
    like: Tensor,
    *,
    impl: Impl | None = None,
    unfit: Callable[[], str | None],
    uncompilable: str | None = None,
) -> Picked:
    """What runs `operation` on tensors such as `like`.

    impl: None takes what was preferred. unfit: why the kernel cannot take these tensors, or None. uncompilable: why
    torch.compile is not for this operation, which then runs as by auto where `compiled` is merely preferred.
    ValueError, naming operation and reason, where an implementation that was asked for cannot run."""
    asked = (_preferred.get(operation) or _preferred[""]) if impl is None else impl
    assert asked in get_args(Impl), f"impl: {asked!r} is none of {get_args(Impl)}"
    if torch.compiler.is_compiling():  # part of a graph that is compiled as a whole; nothing is said from in there
        fits = asked == "triton" or (asked == "auto" and like.device.type != "cpu")
        return "triton" if fits and _reason(like, unfit) is None else "eager"
    if asked == "eager":
        return _say(operation, "eager", "asked for")
    if asked == "compiled" and (uncompilable is None or impl is not None):
        why = "it is differentiated twice, which torch.compile does not support" if _twice[0] else uncompilable
        if why is not None:
            raise ValueError(f"impl: compiled cannot run {operation}: {why}; take auto or eager")
        return _say(operation, "compiled", "asked for")
    lacks = _reason(like, unfit)
    if asked == "triton":
        if lacks is not None:
            raise ValueError(f"impl: triton cannot run {operation}: {lacks}; take auto or eager")
        return _say(operation, "triton", "asked for")
    if lacks is None and like.device.type == "cpu":
        lacks = "on the CPU kernels are interpreted, for tests"
    return _say(operation, "eager", lacks) if lacks is not None else _say(operation, "triton", "a GPU")


def news() -> list[str]:
    """One line for each implementation and reason not told yet, with the operations that it is for."""
    groups: dict[tuple[Picked, str], list[str]] = {}
    for (operation, picked, reason), told in _said.items():
        if not told:
            groups.setdefault((picked, reason), []).append(operation)
            _said[operation, picked, reason] = True
    return [f"{', '.join(sorted(names))}: {picked} ({reason})" for (picked, reason), names in groups.items()]


def _reason(like: Tensor, unfit: Callable[[], str | None]) -> str | None:
    """Why the kernel cannot run, or None."""
    if LACKING is not None:
        return LACKING
    if like.device.type != "cuda" and not (INTERPRETED and like.device.type in ("cpu", "meta")):
        return "no GPU" if like.device.type == "cpu" else f"no kernels for {like.device.type}"
    if like.dtype == torch.float64:
        return "float64 is for references"
    return unfit()


def _say(operation: str, picked: Picked, reason: str) -> Picked:
    _said.setdefault((operation, picked, reason), False)
    return picked


@cache
def compiled(function: F) -> F:
    """`function` through torch.compile, made at its first call: a graph a shape, and an error beyond torch's limit of
    them (8), for a loss that is compiled again and again is no fast loss."""
    from torch._dynamo import config as dynamo  # a second of imports, for those alone who compile
    from torch._dynamo.exc import FailOnRecompileLimitHit

    # balanced losses retain graphs, which backwards that write over what was kept refuse; these are compiled when they
    # are first run, so it holds for the whole process
    functorch.donated_buffer = False
    found = torch.compile(function, dynamic=False, fullgraph=True)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return found(*args, **kwargs)
        except FailOnRecompileLimitHit:
            name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
            raise ValueError(
                f"impl: compiled cannot run {name}: it has met more shapes than torch.compile keeps graphs for "
                f"({dynamo.recompile_limit}); take auto or eager"
            ) from None

    return cast("F", run)
