"""Where the dense model behind a converted one comes from when a folder is loaded.

A converted model is built again from its dense model. That is a model that the caller gives, a
graph or an ONNX file beside the weights, or a class of `transformers` with its configuration. No
code is read from a folder.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import nn

from lutra.errors import InputError, LutraError
from lutra.format import graph_to_bytes, load_graph
from lutra.graph import Graph
from lutra.train.functions.calls import Swapped
from lutra.train.importing.examples import arguments_of
from lutra.train.importing.graph import from_graph
from lutra.train.importing.onnx import load_onnx

#: The names that a file of the dense model has in a folder.
GRAPH: Final = "dense.lutra"
ONNX: Final = "dense.onnx"

Dense = nn.Module | Callable[[], nn.Module]


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class of a model, without what function tables put in front of it."""
    kind = type(model)
    return kind.__mro__[2] if isinstance(model, Swapped) else kind


def describe(
    model: nn.Module, dense: str | os.PathLike[str] | Graph | None
) -> tuple[dict[str, Any] | None, bytes | None]:
    """How the dense model of a converted one is made again.

    Args:
        model: the converted model.
        dense: a graph or file that its dense model was made of; None looks whether it is of
            `transformers`.

    Returns:
        JSON values for the configuration, None where the caller has to give the model; and the
        bytes of the file that they name, if they name one.

    Raises:
        InputError: the file is neither a `.lutra` nor an `.onnx` file, or cannot be read.
    """
    if isinstance(dense, Graph):
        return {"file": GRAPH}, graph_to_bytes(dense)
    if dense is None:
        return _transformers_entry(model), None
    path = Path(dense)
    entry: dict[str, Any]
    if path.suffix == ".lutra":
        entry = {"file": GRAPH}
    elif path.suffix == ".onnx":
        entry = {"file": ONNX, **arguments_of(model)}
    else:
        raise InputError(
            f"save_pretrained: dense={os.fspath(dense)!r} is neither a .lutra nor an .onnx file; "
            "give the file that the dense model was read from, or leave it out"
        )
    try:
        return entry, path.read_bytes()
    except OSError as error:
        raise InputError(
            f"save_pretrained: cannot read dense={os.fspath(dense)!r}: {error.strerror}; check "
            "the path"
        ) from error


def _transformers_entry(model: nn.Module) -> dict[str, Any] | None:
    """Class and configuration of a model of `transformers`."""
    transformers: Any = sys.modules.get("transformers")
    kind = class_of(model)
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    if getattr(transformers, kind.__name__, None) is not kind:
        return None
    config: Any = model.config
    entry: dict[str, Any] = {"class": kind.__name__, "config": config.to_dict()}
    attention = getattr(config, "_attn_implementation", None)
    if isinstance(attention, str):
        entry["attention"] = attention
    return {"transformers": entry}


def make(
    entry: Any, given: Dense | None, find: Callable[[str], Path], where: str, named: str
) -> nn.Module:
    """The dense model of a folder.

    Args:
        entry: from `describe`.
        given: what the caller gave: the model, or a function that returns it.
        find: gives the path of a file of the folder.
        where: the folder, for errors.
        named: the class of the model that was saved, for errors.

    Raises:
        InputError: the caller has to give the model, or gave something else.
        LutraError: the entry or the file that it names cannot be used.
    """
    if given is not None:
        made = given if isinstance(given, nn.Module) else given() if callable(given) else given
        if not isinstance(made, nn.Module):
            raise InputError(
                f"from_pretrained: model is a {type(made).__name__}; give the dense model, a "
                "torch.nn.Module, or a function that returns it"
            )
        return made
    if entry is None:
        raise InputError(
            f"from_pretrained: {where!r} holds the weights of a {named} and no code; give the "
            "dense model that was converted, or a function that returns it, as model=..."
        )
    if isinstance(entry, Mapping) and entry.get("file") == GRAPH:
        return from_graph(load_graph(find(GRAPH)))
    if isinstance(entry, Mapping) and entry.get("file") == ONNX:
        settings = {name: entry.get(name) for name in ("shapes", "constants", "batch_axes")}
        if all(value is None or isinstance(value, Mapping) for value in settings.values()):
            return load_onnx(find(ONNX), False, **settings)
    if isinstance(entry, Mapping) and isinstance(entry.get("transformers"), Mapping):
        return _of_transformers(entry["transformers"], where)
    raise LutraError(
        f"from_pretrained: config.json of {where!r} says {str(entry)[:200]} about the dense model, "
        "which this version cannot read; give it as model=..."
    )


def _of_transformers(entry: Mapping[str, Any], where: str) -> nn.Module:
    """A model of `transformers` with random weights. Only classes of the package itself count."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise LutraError(
            f"from_pretrained: {where!r} holds a model of transformers, which is not installed; "
            "install it with pip install transformers, or give the dense model as model=..."
        ) from error
    name, config = entry.get("class"), entry.get("config")
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known or not isinstance(config, Mapping):
        raise LutraError(
            f"from_pretrained: {where!r} names {name!r}, which is no class of models of this "
            "version of transformers; give the dense model as model=..."
        )
    made: Any = kind
    settings = {key: value for key, value in config.items() if key != "auto_map"}
    attention = entry.get("attention")
    more = {"attn_implementation": attention} if isinstance(attention, str) else {}
    try:
        model: nn.Module = made(made.config_class.from_dict(settings, **more))
    except Exception as error:  # whatever a class makes of a configuration
        raise LutraError(
            f"from_pretrained: {name} of transformers does not take the configuration in "
            f"{where!r} ({type(error).__name__}: {error}); give the dense model as model=..."
        ) from error
    return model
