"""Old paths of modules: they work for one more release, with a warning.

Each old path has a stand-in among the loaded modules. It loads nothing by itself: an attribute of
it is fetched from the new path, with a ``DeprecationWarning`` that names both.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, Final

__all__ = ["MOVED", "MOVED_OPS", "MOVED_TRAINING", "forward", "install"]

#: Old path -> new path of the modules that need no PyTorch.
MOVED: Final = {
    "lutra.audio": "lutra.preprocess.audio",
    "lutra.cpu": "lutra.runtime.cpu",
    "lutra.files": "lutra.atomic",
    "lutra.plan": "lutra.runtime.plan",
    "lutra.profile": "lutra.runtime.profile",
    "lutra.session": "lutra.runtime.session",
    "lutra.siblings": "lutra.runtime.shared_codes",
    "lutra.steps": "lutra.runtime.steps",
    "lutra.text": "lutra.formatting",
    "lutra.tokens": "lutra.preprocess.text",
}

#: The same inside lutra.ops.
MOVED_OPS: Final = {
    "lutra.ops.factors": "lutra.ops.compact_tables",
    "lutra.ops.registry": "lutra.ops.spec",
}

#: Old path -> new path of the modules that need PyTorch.
MOVED_TRAINING: Final = {
    "lutra.train.accelerated": "lutra.train.finetuning.accelerate",
    "lutra.train.calibrate": "lutra.train.conversion.calibrate",
    "lutra.train.capture": "lutra.train.exporting.capture",
    "lutra.train.check": "lutra.train.exporting.parity",
    "lutra.train.checkpoint": "lutra.train.finetuning.checkpoint",
    "lutra.train.collective": "lutra.train.distributed",
    "lutra.train.convert": "lutra.train.conversion.convert",
    "lutra.train.distill": "lutra.train.finetuning.distill",
    "lutra.train.embedding": "lutra.train.layers.int8_embedding",
    "lutra.train.export": "lutra.train.exporting.export",
    "lutra.train.factors": "lutra.train.exporting.compact_tables",
    "lutra.train.finetune": "lutra.train.finetuning.finetune",
    "lutra.train.fold": "lutra.train.exporting.fold",
    "lutra.train.function": "lutra.train.functions.modules",
    "lutra.train.function_calls": "lutra.train.functions.calls",
    "lutra.train.function_ops": "lutra.train.operators.functions",
    "lutra.train.function_swap": "lutra.train.functions.swap",
    "lutra.train.gate": "lutra.train.conversion.speed_gate",
    "lutra.train.int8": "lutra.train.layers.int8",
    "lutra.train.kmeans": "lutra.train.layers.pq_kmeans",
    "lutra.train.lookup": "lutra.train.layers.lookup",
    "lutra.train.lookup_ops": "lutra.train.operators.lookup",
    "lutra.train.lowering": "lutra.train.exporting.lowering",
    "lutra.train.lowering.core": "lutra.train.exporting.lowering.core",
    "lutra.train.native": "lutra.train.operators.native",
    "lutra.train.ops": "lutra.train.operators.pq",
    "lutra.train.pooling": "lutra.train.operators.masked_mean",
    "lutra.train.portable": "lutra.train.operators.portable",
    "lutra.train.projection": "lutra.train.layers.pq_projection",
    "lutra.train.quantized": "lutra.train.layers.base",
    "lutra.train.reconstruction": "lutra.train.layers.pq_reconstruction",
    "lutra.train.relu_net": "lutra.train.functions.relu_net",
    "lutra.train.response": "lutra.train.layers.lookup_table",
    "lutra.train.seeding": "lutra.train.finetuning.seeding",
    "lutra.train.soft": "lutra.train.layers.pq_soft",
    "lutra.train.tree": "lutra.train.layers.pq_tree",
}


class _Moved(ModuleType):
    """Stands in for a module at its old path."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to {new}.")
        self._new_path = new

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":  # of "from ... import *", which would find nothing otherwise
            return _public(import_module(self._new_path))
        if name.startswith("__"):  # tools ask every module for these
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _fetch(self.__name__, self._new_path, name)

    def __dir__(self) -> list[str]:
        return dir(import_module(self._new_path))


def install(moved: Mapping[str, str]) -> None:
    """Puts a stand-in at each old path.

    The package that a path is in gets it as an attribute too, but keeps what it has: the function
    ``lutra.train.finetune`` is not replaced by the module of that name.

    Args:
        moved: Old path -> new path; the packages of the old paths are loaded.
    """
    for old, new in moved.items():
        package, _, name = old.rpartition(".")
        sys.modules[old] = _Moved(old, new)
        if name not in vars(sys.modules[package]):
            setattr(sys.modules[package], name, sys.modules[old])


def forward(package: str, module: str, names: Collection[str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that has the path which was a module's.

    Args:
        package: The path.
        module: Where the names are now.
        names: The names of that module which are found in the package too.
    """

    def fetch(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return _fetch(package, module, name)

    return fetch


def _fetch(old: str, new: str, name: str) -> Any:
    """An attribute of the new path; warns the caller of the caller."""
    module = import_module(new)
    if not hasattr(module, name):
        raise AttributeError(f"module {old!r}, which is {new!r} now, has no attribute {name!r}")
    warnings.warn(
        f"{old}.{name} is {new}.{name} now; the old path goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(module, name)


def _public(module: ModuleType) -> list[str]:
    names: list[str] | None = getattr(module, "__all__", None)
    return [name for name in vars(module) if not name.startswith("_")] if names is None else names
