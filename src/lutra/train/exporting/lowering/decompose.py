"""Operators without a lowering, written by torch in operators that have one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram, default_decompositions

from lutra.train.exporting.capture import quiet
from lutra.train.exporting.lowering import (
    small_matrices,
    special_functions,
    unrolled,
    volumes,
    written,
)
from lutra.train.exporting.lowering.complex_numbers import split_complex
from lutra.train.exporting.lowering.core import LOWERINGS
from lutra.train.exporting.lowering.hints import has_hint
from lutra.train.exporting.lowering.rewrite import rewrite
from lutra.train.exporting.lowering.sources import Sources

_ROUNDS = 3  # what torch writes may have to be written again
#: Operators that this package writes.
_WRITTEN = {
    **volumes.WRITTEN,
    **small_matrices.WRITTEN,
    **special_functions.WRITTEN,
    **unrolled.WRITTEN,
    **written.WRITTEN,
}


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """Write activations' operators that have no lowering in others, where all of those have one.

    Operators with a hint of their own stay, unless this package writes them: there is a better way
    than what torch would write.

    Args:
        program: From `capture.capture`.

    Returns:
        The program; as it was where something would be left, so that errors name the operators of
        the model.
    """
    split_complex(program)
    rewrite(program)
    made = program
    for _ in range(_ROUNDS):
        missing = _missing(made)
        if not missing:
            return made
        from_torch: dict[Any, Any] = dict(default_decompositions())
        known = {op: each for op, each in from_torch.items() if not has_hint(str(op))}
        known |= _WRITTEN
        if not all(target in known for target in missing):
            return program
        with quiet(), torch.no_grad():
            made = made.run_decompositions({target: known[target] for target in missing})
    return program if _missing(made) else made


def _missing(program: ExportedProgram) -> list[OpOverload]:
    sources = Sources(program)
    targets = [
        node.target
        for node in program.graph.nodes
        if isinstance(node.target, OpOverload) and _must_be_lowered(sources, node)
    ]
    return list(dict.fromkeys(targets))


def _must_be_lowered(sources: Sources, node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.target in written.OF_INTEGERS and str(node.target) not in LOWERINGS:
        deferred = sources.deferred(node)
        if deferred is not None and deferred.inputs:
            return True
    if str(node.target) == "aten.lstm.input" and unrolled.projects(*node.args[2:4]):  # type: ignore[arg-type]
        return True
    makes_numbers = not isinstance(value, (int, float, bool)) and value is not None
    return makes_numbers and sources.is_activation(node) and str(node.target) not in LOWERINGS
