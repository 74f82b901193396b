"""The operators of a graph: one file for each family, collected here by name."""

from __future__ import annotations

from difflib import get_close_matches

from lutra._moved import MOVED_OPS, install
from lutra.errors import GraphError
from lutra.ops import (
    conv_transpose,
    decoder,
    dense,
    elementwise,
    functions,
    group_norm,
    image,
    int8,
    int8_recurrent,
    lookup,
    lowbit,
    matmul,
    norm,
    pointwise,
    pool,
    positions,
    pq,
    recurrent,
    resample,
    select,
    sequence,
    shape,
)
from lutra.ops.spec import REQUIRED, Attr, Cost, OpSpec, TensorRole

__all__ = ["OPS", "REQUIRED", "Attr", "Cost", "OpSpec", "TensorRole", "op_spec", "register"]

#: Every operator by name.
OPS: dict[str, OpSpec] = {
    spec.name: spec
    for family in (
        pq,
        lookup,
        int8,
        lowbit,
        decoder,
        dense,
        conv_transpose,
        matmul,
        elementwise,
        functions,
        pointwise,
        norm,
        group_norm,
        sequence,
        positions,
        recurrent,
        int8_recurrent,
        select,
        pool,
        image,
        resample,
        shape,
    )
    for spec in family.SPECS
}


def register(spec: OpSpec) -> None:
    """Makes an operator known to graphs and files, beside those of lutra.

    Args:
        spec: Its rules. What computes it is registered by ``lutra.reference.register`` and, for the
            engine, ``lutra.runtime.plugins.load_ops``.

    Raises:
        GraphError: If there is an operator of that name.
    """
    if spec.name in OPS:
        raise GraphError(f"there is an operator {spec.name!r} already; choose another name")
    OPS[spec.name] = spec


def op_spec(name: str, where: str = "the graph") -> OpSpec:
    """The rules of an operator.

    Args:
        name: Name of the operator.
        where: What asks for it, for the error.

    Raises:
        GraphError: If there is no such operator.
    """
    spec = OPS.get(name)
    if spec is None:
        near = get_close_matches(name, OPS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(OPS))}"
        raise GraphError(f"{where} uses the unknown operator {name[:80]!r}; {hint}")
    return spec


install(MOVED_OPS)
