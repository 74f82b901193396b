"""Neural networks by table lookup.

Running a model needs NumPy only::

    session = lutra.Session("model.lutra")
    y = session(x)

Making one needs PyTorch: ``lutra.convert``, ``lutra.finetune`` and ``lutra.export`` come from
``lutra.train``, which is imported when one of them is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from lutra._moved import MOVED, install
from lutra.errors import (
    EngineError,
    FormatError,
    GraphError,
    InputError,
    LutraError,
    UnsupportedCpuError,
    UnsupportedModelError,
)
from lutra.format import load_graph, save_graph
from lutra.graph import Graph
from lutra.node import Node, Value
from lutra.reference import run_reference
from lutra.runtime.cpu import cpu_info, runnable_isas
from lutra.runtime.profile import Profile, StepProfile
from lutra.runtime.session import Session
from lutra.sentences import SentenceEncoder
from lutra.stream import Stream

if TYPE_CHECKING:
    from lutra.train import *  # noqa: F403

__all__ = [
    "EngineError",
    "FormatError",
    "Graph",
    "GraphError",
    "InputError",
    "LutraError",
    "Node",
    "Profile",
    "SentenceEncoder",
    "Session",
    "StepProfile",
    "Stream",
    "UnsupportedCpuError",
    "UnsupportedModelError",
    "Value",
    "__version__",
    "cpu_info",
    "load_graph",
    "run_reference",
    "runnable_isas",
    "save_graph",
]

#: The names of lutra.train that are here too. Listed, not asked for: asking imports PyTorch.
_TRAIN: Final = (
    "PQ",
    "Checkpoints",
    "ConversionReport",
    "Distillation",
    "FinetuneReport",
    "FrozenInt8",
    "FrozenLookup",
    "FrozenPQ",
    "Function",
    "FunctionReport",
    "Int8",
    "Int8Conv2d",
    "Int8Linear",
    "Keep",
    "LayerReport",
    "Lookup",
    "LookupConv2d",
    "LookupLinear",
    "PQConv2d",
    "PQLinear",
    "Schedule",
    "SpeedGate",
    "TableAttention",
    "TableFunction",
    "TableLayerNorm",
    "TableRMSNorm",
    "TableSoftmax",
    "auto_recipe",
    "check_finite",
    "convert",
    "export",
    "finetune",
    "fit_relu_net",
    "masked_mean",
    "recipe_from_json",
    "recipe_to_json",
    "reconstruction_loss",
)

try:
    __version__ = version("lutra")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

install(MOVED)


def __getattr__(name: str) -> Any:
    """Fetches the names of lutra.train on first use."""
    if name not in _TRAIN and name != "train":
        raise AttributeError(f"module 'lutra' has no attribute {name!r}")
    try:
        train = import_module("lutra.train")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise ImportError(
            f"lutra.{name} needs PyTorch; install it with: pip install 'lutra[train]'"
        ) from error
    return train if name == "train" else getattr(train, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRAIN})
