"""Imports run one way, as the design lays the house out; read from the source, so that nothing needs to run."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("trainer", "launch", "tools")

# What a part may import of this project. A part that is not listed may import all of `trainer`.
MAY_IMPORT = {
    "trainer.errors": (),
    "trainer.signals": ("trainer.errors",),
    "trainer.progress": (),
    "trainer.kernels": ("trainer.kernels",),
    "trainer.losses": ("trainer.losses", "trainer.kernels", "trainer.progress"),
    "trainer.networks": ("trainer.networks", "trainer.kernels"),
    "trainer.data": (
        "trainer.data",
        "trainer.kernels",
        "trainer.progress",
        "trainer.durable",
        "trainer.bounds",
        "trainer.errors",
    ),
    "launch": (
        "launch",
        "trainer.config",
        "trainer.config_yaml",
        "trainer.config_errors",
        "trainer.bounds",
        "trainer.parallel.config",
        "trainer.errors",
        "trainer.signals",
    ),
    "tools": ("tools", "trainer"),
    "tools.demo": ("tools", "trainer", "launch"),  # does what a user does, on two processes
}
# What a part must not import although it may import the rest of `trainer`: what stands above it.
MUST_NOT_IMPORT = {
    "trainer.methods": ("trainer.config", "trainer.step", "trainer.loop", "trainer.checkpoint", "trainer.board"),
    "trainer.parallel": ("trainer.config", "trainer.step", "trainer.loop", "trainer.methods", "trainer.losses"),
    "trainer.step": ("trainer.config", "trainer.loop"),
}
ONLY_IN = {
    "accelerate": ("trainer.parallel", "tools.bench.peers"),  # a peer to measure against
    "deepspeed": ("trainer.parallel",),
    "submitit": ("launch",),
    "fsspec": ("trainer.data.remote",),
    "aiohttp": ("trainer.data.remote",),
    "litdata": ("tools.bench.data.peer",),  # peers to measure against, each in a process of its own
    "streaming": ("tools.bench.data.peer",),  # that needs torchvision, for which its process has a stand-in
}
NOWHERE = {
    "torchvision": "does not load beside the tested torch",
    "torchcodec": "does not load beside the tested torch",
    "pickle": "executes what it reads",
    "cloudpickle": "executes what it reads",
    "dill": "executes what it reads",
    "marshal": "executes what it reads",
    "shelve": "executes what it reads",
}
HARMLESS = {"pickle.UnpicklingError"}  # what torch.load raises for a file that it refuses
READS_ENVIRONMENT = ("trainer.parallel", "launch", "tools.setup", "tools.slurm", "tools.soak.slurm")


class Source(NamedTuple):
    module: str
    package: str  # what a relative import starts from
    tree: ast.Module


def source(module: str, text: str, *, is_package: bool = False) -> Source:
    return Source(module, module if is_package else module.rpartition(".")[0], ast.parse(text))


def sources() -> dict[str, Source]:
    found = {}
    for floor in FLOORS:
        for file in sorted((ROOT / floor).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            found[module] = source(module, file.read_text(), is_package=is_package)
    return found


SOURCES = sources()


def within(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def imported(found: Source, nodes: Iterator[ast.AST] | None = None) -> Iterator[str]:
    """Every module that the source imports; `from a import b` gives both a and a.b."""
    for node in ast.walk(found.tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = found.package.split(".")[: len(found.package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
            yield base


def at_start(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function bodies, no `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def part_of(module: str, table: dict[str, tuple[str, ...]]) -> str | None:
    return max((part for part in table if within(module, (part,))), key=len, default=None)


def faults(found: Source) -> list[str]:
    """What the module breaks of the rules above, one sentence each."""
    said = []
    module, names = found.module, sorted(set(imported(found)))
    for name in names:
        top = name.partition(".")[0]
        if top in NOWHERE and not HARMLESS & {name, *(n for n in names if n.startswith(f"{name}."))}:
            said.append(f"{module} imports {top}: {NOWHERE[top]}")
        if top in ONLY_IN and not within(module, ONLY_IN[top]):
            said.append(f"{module} imports {top}: only {', '.join(ONLY_IN[top])} may")
        if top not in FLOORS:
            continue
        part = part_of(module, MAY_IMPORT)
        allowed = MAY_IMPORT[part] if part else ("trainer",)
        # `from trainer import kernels` names the bare package too, which says nothing.
        if not within(name, allowed) and not (name == "trainer" and any(within(n, allowed) for n in names)):
            said.append(f"{module} imports {name}: {part or 'trainer'} may import {', '.join(allowed) or 'nothing'}")
        above = MUST_NOT_IMPORT.get(part_of(module, MUST_NOT_IMPORT) or "", ())
        if within(name, above):
            said.append(f"{module} imports {name}, which stands above it")
    for node in ast.walk(found.tree):
        said.extend(f"{module}:{getattr(node, 'lineno', 0)} {fault}" for fault in unsafe(node, module))
    return said


def unsafe(node: ast.AST, module: str) -> Iterator[str]:
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv"):
        if not within(module, READS_ENVIRONMENT):
            yield "uses the environment: a knob is a field of the config"
    elif (
        isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.optim" and within(module, ("trainer.networks",))
    ):
        yield "uses an optimiser: networks are pure modules"
    elif isinstance(node, ast.Call):
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        function = ast.unparse(node.func)
        if function == "torch.load" and keywords.get("weights_only") != "True":
            yield "calls torch.load without weights_only=True"
        if function == "yaml.load" and keywords.get("Loader") in (
            None,
            "yaml.Loader",
            "yaml.FullLoader",
            "yaml.UnsafeLoader",
        ):
            yield "calls yaml.load with an unsafe loader"
        if keywords.get("shell") == "True" or function in ("os.system", "os.popen"):
            yield "starts a shell"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_module_keeps_to_its_floor(module: str) -> None:
    assert faults(SOURCES[module]) == []


def test_imports_make_no_circle() -> None:
    graph = {
        module: {name for name in imported(found, at_start(found.tree)) if name in SOURCES and name != module}
        for module, found in SOURCES.items()
    }
    for module, names in graph.items():  # a package's __init__ imports its own parts, and they run inside it
        graph[module] = {name for name in names if not module.startswith(f"{name}.")}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(SOURCES)


@pytest.mark.parametrize(
    ("module", "text", "word"),
    [
        ("trainer.loop", "import launch.local", "launch.local"),
        ("trainer.loop", "def late():\n    from tools import shards", "tools.shards"),
        ("trainer.loop", "import accelerate", "only trainer.parallel"),
        ("trainer.loop", "from torchvision.ops import nms", "torchvision"),
        ("trainer.loop", "import os\nos.environ['A']", "environment"),
        ("trainer.loop", "import torch\ntorch.load('a')", "weights_only"),
        ("trainer.loop", "import subprocess\nsubprocess.run('ls', shell=True)", "shell"),
        ("trainer.checkpoint", "import pickle", "pickle"),
        ("trainer.networks.blocks", "from trainer import losses", "trainer.losses"),
        ("trainer.networks.blocks", "from ..losses.divergence import kl", "trainer.losses.divergence"),
        ("trainer.networks.blocks", "import torch\ntorch.optim.Adam", "optimiser"),
        ("trainer.kernels.noise", "from trainer.networks import shapes", "trainer.networks"),
        ("trainer.methods.vae", "from trainer.loop import train", "above"),
        ("launch.local", "from trainer.loop import train", "trainer.loop"),
        ("tools.sample", "from launch.local import launch", "launch.local"),
    ],
)
def test_a_module_that_breaks_a_rule_is_named(module: str, text: str, word: str) -> None:
    said = faults(source(module, text))
    assert said, text
    assert any(word in sentence for sentence in said)
    assert all(sentence.startswith(module) for sentence in said)


def test_what_the_rules_allow_is_not_named() -> None:
    allowed = "import torch\nfrom trainer import kernels\nfrom trainer.kernels.noise import normal"
    assert faults(source("trainer.networks.blocks", allowed)) == []
    assert faults(source("trainer.parallel.ddp", "import os, accelerate\nos.environ.get('RANK')")) == []
