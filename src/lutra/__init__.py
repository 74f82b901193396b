"""Neural networks by table lookup.

Running a model needs NumPy only::

    session = lutra.Session("model.lutra")
    y = session(x)

Making one needs PyTorch: ``lutra.convert``, ``lutra.finetune`` and ``lutra.export`` come from
``lutra.train``, which is imported when one of them is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from lutra._moved import MOVED, install

if TYPE_CHECKING:
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
    from lutra.generator import Completion, Generator
    from lutra.graph import Graph
    from lutra.lowbit import LowBitMatrix
    from lutra.node import Node, Value
    from lutra.reference import run_reference
    from lutra.runtime.compiled import compile_plan, save_compiled
    from lutra.runtime.cpu import cpu_info, runnable_isas
    from lutra.runtime.profile import Profile, StepProfile
    from lutra.runtime.session import Session
    from lutra.sentences import SentenceEncoder
    from lutra.stream import Stream
    from lutra.train import *  # noqa: F403

    __version__: str

__all__ = [
    "Completion",
    "EngineError",
    "FormatError",
    "Generator",
    "Graph",
    "GraphError",
    "InputError",
    "LowBitMatrix",
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
    "compile_plan",
    "cpu_info",
    "load_graph",
    "run_reference",
    "runnable_isas",
    "save_compiled",
    "save_graph",
]

#: The module of each name. They are imported when one of their names is first used, so that
#: ``lutra --help`` waits for none.
_PLACES: Final = {
    "Completion": "generator",
    "EngineError": "errors",
    "FormatError": "errors",
    "Generator": "generator",
    "Graph": "graph",
    "GraphError": "errors",
    "InputError": "errors",
    "LowBitMatrix": "lowbit",
    "LutraError": "errors",
    "Node": "node",
    "Profile": "runtime.profile",
    "SentenceEncoder": "sentences",
    "Session": "runtime.session",
    "StepProfile": "runtime.profile",
    "Stream": "stream",
    "UnsupportedCpuError": "errors",
    "UnsupportedModelError": "errors",
    "Value": "node",
    "compile_plan": "runtime.compiled",
    "cpu_info": "runtime.cpu",
    "load_graph": "format",
    "run_reference": "reference",
    "runnable_isas": "runtime.cpu",
    "save_compiled": "runtime.compiled",
    "save_graph": "format",
}
#: Modules that are attributes of the package without an import of their own.
_MODULES: Final = (
    "errors", "format", "formatting", "functions", "generator", "graph", "hardware", "hub",
    "inputs", "lowbit", "node", "ops", "preprocess", "reference", "runtime", "sentences", "stream",
)  # fmt: skip
#: The names of lutra.train that are here too. Listed, not asked for: asking imports PyTorch.
_TRAIN: Final = (
    "PQ",
    "Budget",
    "Checkpoints",
    "ConversionReport",
    "Distillation",
    "FinetuneReport",
    "FrozenInt8",
    "FrozenLookup",
    "FrozenLowBit",
    "FrozenPQ",
    "Function",
    "FunctionReport",
    "GGUFModel",
    "Int8",
    "Int8Conv2d",
    "Int8Linear",
    "Keep",
    "LayerReport",
    "Lookup",
    "LookupConv2d",
    "LookupLinear",
    "LowBit",
    "LowBitLinear",
    "PQConv2d",
    "PQLinear",
    "Schedule",
    "SpeedGate",
    "Study",
    "TableAttention",
    "TableFunction",
    "TableLayerNorm",
    "TableRMSNorm",
    "TableSoftmax",
    "Trial",
    "auto_recipe",
    "check_finite",
    "convert",
    "example_inputs",
    "export",
    "export_decoder",
    "finetune",
    "fit_relu_net",
    "from_graph",
    "from_pretrained",
    "load_gguf",
    "load_llama2c",
    "load_llama2c_tokenizer",
    "load_onnx",
    "masked_mean",
    "optimize",
    "push_to_hub",
    "recipe_from_json",
    "recipe_to_json",
    "reconstruction_loss",
    "save_pretrained",
)

install(MOVED)


def __getattr__(name: str) -> Any:
    """Fetches a name on first use."""
    if name in _PLACES:
        value = getattr(import_module(f"lutra.{_PLACES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"lutra.{name}")
    elif name == "__version__":
        value = _version()
    else:
        return _of_training(name)
    globals()[name] = value
    return value


def _of_training(name: str) -> Any:
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


def _version() -> str:
    metadata = import_module("importlib.metadata")
    try:
        found: str = metadata.version("lutra")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES, *_MODULES, *_TRAIN, "__version__"})
