"""The reference executor: NumPy, slow and obvious. It is the specification of every operator.

The engine must give the same bits for lookup and int8 layers, and the same numbers to float
rounding for the dense operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from lutra.errors import GraphError, InputError
from lutra.formatting import did_you_mean, shape_text
from lutra.graph import Graph, fits
from lutra.inputs import cast_input
from lutra.node import Array, Node
from lutra.ops import op_spec
from lutra.ops.functions import FUNCTIONS
from lutra.ops.pointwise import BENDS, CHOICES
from lutra.reference import (
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
from lutra.reference.decoder import Past

__all__ = ["KERNELS", "register", "run_node", "run_reference"]

#: ``kernel(node, inputs, tensors)`` gives the output; ``tensors`` maps role to array.
Kernel: TypeAlias = Callable[[Node, Sequence[Array], Mapping[str, Array]], Array]

#: What computes each operator.
KERNELS: Final[dict[str, Kernel]] = {
    "pq_conv2d": pq.pq_conv2d,
    "pq_linear": pq.pq_linear,
    "lookup_conv2d": lookup.lookup_conv2d,
    "lookup_linear": lookup.lookup_linear,
    "int8_conv2d": int8.int8_conv2d,
    "int8_linear": int8.int8_linear,
    "lowbit_linear": lowbit.lowbit_linear,
    "conv2d": dense.conv2d,
    "linear": dense.linear,
    "conv_transpose2d": conv_transpose.conv_transpose2d,
    "matmul": matmul.matmul,
    **dict.fromkeys(FUNCTIONS, functions.function),
    "piecewise": functions.piecewise,
    "layer_norm": norm.layer_norm,
    "rms_norm": norm.rms_norm,
    "l2_norm": norm.l2_norm,
    "group_norm": group_norm.group_norm,
    "embedding": sequence.embedding,
    "position_embedding": sequence.position_embedding,
    "masked_mean": sequence.masked_mean,
    "attention": sequence.attention,
    "masked_attention": sequence.attention,
    "cached_attention": decoder.cached_attention,
    "gather": sequence.gather,
    "lstm": recurrent.lstm,
    "gru": recurrent.gru,
    "int8_lstm": int8_recurrent.recurrent,
    "int8_gru": int8_recurrent.recurrent,
    "topk": select.topk,
    "take_along": select.take_along,
    "from_end": select.from_end,
    "flip": select.flip,
    "trim": select.trim,
    "pick_tokens": decoder.pick_tokens,
    "rotary": positions.rotary,
    "relative_bias": positions.relative_bias,
    "relu": elementwise.clamp,
    "relu6": elementwise.clamp,
    "clamp": elementwise.clamp,
    "add": elementwise.pair,
    "sub": elementwise.pair,
    "mul": elementwise.pair,
    "div": elementwise.pair,
    "cast": elementwise.cast,
    "affine_scalar": elementwise.affine_scalar,
    "affine": elementwise.affine,
    "softmax": elementwise.softmax,
    **dict.fromkeys(CHOICES, pointwise.choice),
    **dict.fromkeys(BENDS, pointwise.bend),
    "leaky_relu": pointwise.leaky_relu,
    "where": pointwise.where,
    "constant": pointwise.constant,
    "max_pool2d": pool.max_pool2d,
    "avg_pool2d": pool.avg_pool2d,
    "adaptive_avg_pool2d": pool.adaptive_avg_pool2d,
    "adaptive_max_pool2d": pool.adaptive_max_pool2d,
    "mean": pool.mean,
    "max": pool.max_,
    "cumsum": pool.cumsum,
    "pixel_shuffle": image.pixel_shuffle,
    "upsample": image.upsample,
    "upsample_bicubic": resample.upsample_bicubic,
    "grid_sample": resample.grid_sample,
    "flatten": shape.flatten,
    "reshape": shape.reshape,
    "regroup": shape.regroup,
    "pad": shape.pad,
    "slice": shape.slice_,
    "concat": shape.concat,
    "transpose": shape.transpose,
    "expand": shape.expand,
}


def register(op: str, kernel: Kernel) -> None:
    """Says what computes an operator that was registered with ``lutra.ops.register``.

    Raises:
        GraphError: If there is no such operator, or it is computed already.
    """
    op_spec(op, "lutra.reference.register")
    if op in KERNELS:
        raise GraphError(f"the operator {op!r} has a reference already; choose another name")
    KERNELS[op] = kernel


def run_reference(
    graph: Graph,
    inputs: Mapping[str, Array] | Sequence[Array],
    *,
    intermediates: bool = False,
    cache: dict[str, Past] | None = None,
) -> dict[str, Array]:
    """Runs a graph in NumPy.

    Args:
        graph: The graph.
        inputs: Arrays by input name, or in the order of the graph's inputs, of the dtypes that
            ``Session.run`` takes. NaN and infinity are allowed: grids quantise NaN to 0 and clamp
            infinity.
        intermediates: Whether to return every value instead of the outputs only.
        cache: What earlier runs left of each sequence, for decoders, by node name; an empty dict
            before the first run. It is changed. Without it a run is alone.

    Returns:
        float32 arrays by value name; inputs of dtype int32 stay int32.

    Raises:
        GraphError: If the graph is not valid.
        InputError: If an input is missing, unknown, or of the wrong dtype or shape, or if it holds
            an id that an embedding has no row for.
    """
    expected = graph.values
    values = _named(graph, inputs)
    for node in graph.nodes:
        given = [values[name] for name in node.inputs]
        tensors = graph.node_tensors(node)
        if cache is not None and node.op == "cached_attention":
            past = cache.setdefault(node.name, [])
            values[node.output] = decoder.cached_attention(node, given, tensors, past)
        else:
            values[node.output] = run_node(node, given, tensors)
    wanted = expected if intermediates else graph.outputs
    return {name: values[name] for name in wanted}


def run_node(node: Node, inputs: Sequence[Array], tensors: Mapping[str, Array]) -> Array:
    """Runs one node of a valid graph.

    Args:
        node: The node.
        inputs: Its inputs, float32 or int32.
        tensors: Its tensors by role.

    Returns:
        Its float32 output.
    """
    return KERNELS[node.op](node, inputs, tensors)


def _named(graph: Graph, inputs: Mapping[str, Array] | Sequence[Array]) -> dict[str, Array]:
    """The inputs by name, checked."""
    names = [value.name for value in graph.inputs]
    if not isinstance(inputs, Mapping):
        if len(inputs) != len(names):
            raise InputError(
                f"run_reference: got {len(inputs)} inputs for a graph with {len(names)}; "
                f"give one array for each of {names}"
            )
        inputs = dict(zip(names, inputs, strict=True))
    if set(inputs) != set(names):
        unknown = next((name for name in inputs if name not in names), "")
        raise InputError(
            f"run_reference: got the inputs {list(inputs)}; {did_you_mean(unknown, names)}"
            f"give exactly {names}"
        )
    batch: int | None = None
    result: dict[str, Array] = {}
    for value in graph.inputs:
        array = cast_input(f"run_reference: input {value.name!r}", value, inputs[value.name])
        want = value.shape
        if want[0] is None and array.ndim:
            batch = array.shape[0] if batch is None else batch
            want = (batch, *want[1:])
        if not fits(array.shape, want):
            raise InputError(
                f"run_reference: input {value.name!r} has shape {array.shape}; it must be "
                f"{shape_text(want)}"
            )
        result[value.name] = array
    if graph.is_dynamic:
        try:
            # an empty batch is no harm to NumPy
            graph.infer({n: (max(1, len(x)), *x.shape[1:]) for n, x in result.items()})
        except GraphError as error:
            raise InputError(f"run_reference: {error}") from error
    return result
