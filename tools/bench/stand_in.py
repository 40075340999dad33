"""Empty packages in the place of those that a bare machine lacks and a benchmark imports without using them: readers of
images and of shards, Accelerate. What asks for one of their names gets a class that does nothing."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

UNUSED = ("accelerate", "braceexpand", "cv2", "PIL", "simplejpeg", "tensorboard", "webdataset")


class _Anything(type):
    """A class of which every attribute is such a class too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(name)


def placeholder(name: str) -> Any:
    """It may be inherited, caught as an exception, called, and asked for more of its kind."""
    return _Anything(name, (Exception,), {})


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, absent: Sequence[str]) -> None:
        self.absent = absent

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.absent:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


def install(names: Sequence[str] = UNUSED) -> list[str]:
    """Those of `names` that are not installed, and from now on seem to be; before anything of trainer is imported."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        sys.meta_path.append(_Finder(absent))
    return absent
