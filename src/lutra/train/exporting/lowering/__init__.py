"""From a captured torch program to a graph: one small function per torch operator.

The files mirror `lutra.ops`. To add an operator, write a function like those in them; `core`
explains its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.export import ExportedProgram

from lutra.train.exporting.lowering import (  # noqa: F401  (they register)
    arithmetic,
    arrange,
    attention,
    bias,
    comparisons,
    conv_transpose,
    dense,
    elementwise,
    frozen,
    functions,
    group_norm,
    image,
    int8_recurrent,
    norm,
    ordered,
    pads,
    pairwise,
    parts,
    pool,
    products,
    recurrent,
    reduce,
    rotary,
    scatter,
    select,
    sequence,
    shape,
    tables,
)
from lutra.train.exporting.lowering.activations import combine_activations
from lutra.train.exporting.lowering.core import Lowered, Lowering, Ref, UnsupportedUse, lowers
from lutra.train.exporting.lowering.decompose import decomposed
from lutra.train.exporting.lowering.patterns import combine
from lutra.train.exporting.lowering.points import without_detours
from lutra.train.exporting.lowering.walk import Walk

__all__ = ["Lowered", "Lowering", "Ref", "UnsupportedUse", "decomposed", "lower", "lowers"]


def lower(
    program: ExportedProgram,
    input_names: Sequence[str],
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    longest: int | None = None,
) -> Lowered:
    """Turn a captured program into a graph.

    Args:
        program: From `capture.capture`: functional, axis 0 of every input dynamic. Attention,
            masked means and activations become one operator each in it.
        input_names: One per input.
        output_names: One per output; by default the keys of a returned dict, else `output` or
            `output_0`, `output_1`, ...
        metadata: Put into the graph as it is.
        longest: Of a decoder, the most tokens of a text: so many positions have tables where the
            model sets no limit; by default `core.LONGEST`.

    Returns:
        The graph, not yet validated, and the torch node behind each of its values.

    Raises:
        UnsupportedModelError: Operators that lutra cannot run, all of them in one message.
    """
    combine(program)
    combine_activations(program)
    bias.combine_biases(program, longest)
    rotary.combine_rotary(program)
    return Walk(program, longest).run(input_names, output_names, metadata or {}, without_detours)
