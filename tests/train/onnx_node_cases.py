"""The node tests that come with the package onnx, run through `load_onnx`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx.backend.test.loader import load_node_model_tests

from lutra.errors import LutraError
from lutra.train import load_onnx
from lutra.train.importing.onnx_file import nodes_of
from lutra.train.importing.onnx_ops import OPS

#: What the data of the tests hold besides float32: indices, shapes and masks.
_PLAIN = ("float32", "int64", "int32", "bool")


@dataclass(frozen=True)
class Case:
    """A model with inputs and the outputs that belong to them."""

    name: str
    model: Any
    inputs: dict[str, Any]
    outputs: tuple[Any, ...]


def cases() -> Iterator[Case]:
    """The tests of float32 whose operators all have an entry in the table."""
    for case in load_node_model_tests():
        model = case.model
        keys = {
            ("" if node.domain in ("", "ai.onnx") else node.domain, node.op_type)
            for node in nodes_of(model.graph)
        }
        if model.functions or not keys or not keys <= OPS.keys() or not case.data_sets:
            continue
        inputs, outputs = case.data_sets[0]
        arrays = [x for x in (*inputs, *outputs) if isinstance(x, (np.ndarray, np.generic))]
        if len(arrays) != len(inputs) + len(outputs):  # sequences and optionals
            continue
        kinds = {array.dtype.name for array in arrays}
        if not all(x.size for x in arrays):  # a size of 0 stands for one that is not known
            continue
        if "float32" in kinds and kinds <= set(_PLAIN):
            names = [value.name for value in model.graph.input]
            given = {name: np.asarray(x) for name, x in zip(names, inputs, strict=True)}
            yield Case(case.name, model, given, tuple(np.asarray(x) for x in outputs))


def outcome(case: Case) -> str:
    """Empty where the module gives the right answers; else how it fails.

    The first input, or the first of floats, stays an input; where that is refused all of them do.

    Returns:
        "refused: ..." for an error in one sentence, "wrong: ..." for anything else.
    """
    reason = "refused: it has no inputs"
    floats = [name for name, array in case.inputs.items() if array.dtype == np.float32]
    for free in ([*floats[:1], *list(case.inputs)[:1]][:1], list(case.inputs)):
        constants = {name: a for name, a in case.inputs.items() if name not in free}
        try:
            module = load_onnx(case.model, check=False, constants=constants)
        except LutraError as error:
            text = str(error)
            if "\n" in text or len(text) > 2000:
                return f"wrong: the error is no sentence: {text[:300]}"
            reason = f"refused: {text}"
            continue
        except Exception as error:
            return f"wrong: {type(error).__name__}: {str(error)[:300]}"
        return _compare(module, case, free)
    return reason


def _compare(module: Any, case: Case, free: list[str]) -> str:
    given = [torch.from_numpy(np.array(case.inputs[name])) for name in free]
    if not all(module.meta["lutra"]["example"].arguments):
        return "wrong: an argument has no name"
    try:
        with torch.no_grad():
            made = module(*given)
    except Exception as error:
        return f"wrong: it does not run: {type(error).__name__}: {str(error)[:200]}"
    made = made if isinstance(made, tuple) else (made,)
    for got, want in zip(made, case.outputs, strict=True):
        if tuple(got.shape) != want.shape:
            return f"wrong: shape {tuple(got.shape)} instead of {want.shape}"
        if not np.allclose(
            got.numpy().astype(np.float64), want.astype(np.float64), rtol=1e-3, atol=1e-5,
            equal_nan=True,
        ):  # fmt: skip
            return "wrong: other numbers"
    return ""
