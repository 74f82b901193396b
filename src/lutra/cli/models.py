"""The model of ``lutra convert``: built by a function, or read from an ONNX or a .lutra file."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lutra.cli.common import UserError, read_array
from lutra.errors import LutraError
from lutra.format import load_graph

#: How a size that differs from run to run is written.
_ANY = ("?", "*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how an ONNX file is read."""
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=N,...",
        help="of an ONNX file: the shape of an input whose sizes it leaves open, ? for any size",
    )
    parser.add_argument(
        "--constant",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of an ONNX file: a number, or a .npy file, for what shall be no input",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="of an ONNX file: do not compare it with its module on random inputs",
    )


def is_file(target: str) -> bool:
    """Whether a model is read from a file of a format of its own."""
    return target.endswith((".onnx", ".lutra"))


def load(args: argparse.Namespace, torch: Any, train: Any) -> Any:
    """The model as a ``torch.nn.Module``.

    Raises:
        LutraError: If it cannot be read, imported or built.
    """
    onnx_only = {"shape": args.shape, "constant": args.constant, "no-check": args.no_check}
    for name, given in onnx_only.items():
        if given and not args.model.endswith(".onnx"):
            raise UserError(f"--{name} is for ONNX files, and {args.model!r} is none; leave it out")
    if args.model.endswith(".onnx"):
        return train.load_onnx(
            args.model,
            not args.no_check,
            shapes=dict(_shape(text) for text in args.shape),
            constants=dict(_constant(text) for text in args.constant),
        )
    if args.model.endswith(".lutra"):
        return train.from_graph(load_graph(args.model))
    model = build(args.model)
    if not isinstance(model, torch.nn.Module):
        raise UserError(
            f"{args.model!r} gave a {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model


def _shape(text: str) -> tuple[str, tuple[int | None, ...]]:
    name, _, sizes = text.rpartition("=")
    parts = sizes.split(",")
    if not name or not all(part in _ANY or (part.isdecimal() and int(part)) for part in parts):
        raise UserError(f"--shape {text!r} is no shape; write it like x=?,3,224,224")
    return name, tuple(None if part in _ANY else int(part) for part in parts)


def _constant(text: str) -> tuple[str, Any]:
    name, _, value = text.rpartition("=")
    if name and value.endswith(".npy"):
        return name, read_array(value)
    try:
        number = float(value)
    except ValueError:
        name = ""
    if not name:
        raise UserError(
            f"--constant {text!r} is no number; write it like rate=16000 or h=zeros.npy"
        )
    return name, int(number) if number.is_integer() else number


def build(target: str) -> Any:
    """Calls the function that a target names, or takes the module that it names.

    Args:
        target: ``pkg.mod:build`` or ``file.py:build``.

    Raises:
        UserError: If there is no such function, or if it fails.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UserError(f"{target!r} names no function; use pkg.mod:build or file.py:build")
    if "" not in sys.path:  # as with python -m: modules of the current folder can be named
        sys.path.insert(0, "")
    try:
        module = _from_file(place) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise UserError(
            f"cannot import {place!r}: there is no module {error.name!r}; check the name, or "
            "install what it needs"
        ) from error
    except LutraError:
        raise
    except Exception as error:
        raise UserError(f"cannot import {place!r}: {type(error).__name__}: {error}") from error
    build: Callable[[], Any] | None = getattr(module, name, None)
    if callable(getattr(build, "state_dict", None)) and not isinstance(build, type):
        return build  # the model itself
    if not callable(build):
        raise UserError(f"{place!r} has no function {name!r}; check the part after the colon")
    try:
        return build()
    except Exception as error:
        raise UserError(f"{target!r} failed: {type(error).__name__}: {error}") from error


def _from_file(path: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"cannot read {path!r}: there is no such file; check the path")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Under its name, because pickling, dataclasses and torch look there for where code comes from.
    sys.modules.setdefault(file.stem, module)
    spec.loader.exec_module(module)
    return module
