"""The graph of a decoder with a cache, from the graph that computes a whole text at once.

The graph before takes ids (N, T) and gives scores (N, T, V). The graph after takes ``tokens``
(N, T), ``start`` (N,), the number of tokens of each sequence that earlier runs brought, and
``picked`` (N, P), the tokens of the run whose scores are wanted, and gives ``logits`` (N, P, V).
What is not replaced here treats tokens one by one, or the graph after would not compute what the
graph before does; that is checked by running both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lutra.errors import UnsupportedModelError
from lutra.graph import Graph
from lutra.node import Array, Node, Value
from lutra.ops import OPS
from lutra.ops.functions import FUNCTIONS
from lutra.ops.spec import flag, integer, ints, number
from lutra.preprocess.tokens import LOGITS, PICKED, START, TOKENS
from lutra.train.operators.scores import MASKED

#: What scores go through between the product of queries and keys and the softmax.
_SCORES = (
    "affine", "affine_scalar", "add", "mul", "tanh", "relative_bias", "maximum",
    "reshape", "regroup",
)  # fmt: skip
_ROWWISE = ("rms_norm", "layer_norm", "affine_scalar", *FUNCTIONS)


def with_cache(graph: Graph, length: int) -> Graph:
    """The graph with a cache.

    Args:
        graph: Of a decoder that takes ids only, each token seeing those before it.
        length: The most tokens of a sequence.

    Raises:
        UnsupportedModelError: If it is something else.
    """
    graph = _named(_with_norms(graph))
    makers = {node.output: node for node in graph.nodes}
    for node in graph.nodes:
        if node.op == "softmax":
            _need_known_scores(graph, makers, node)
    if not any(node.op == "attention" for node in graph.nodes):
        raise UnsupportedModelError(
            "export_decoder: the model has no attention that lutra knows, so there is nothing to "
            "cache; use lutra.train.export"
        )
    nodes, tensors = [], dict(graph.tensors)
    for node in graph.nodes:
        if node.op == "attention":
            flat, node = _cached_attention(node, makers, graph.values, length)
            nodes += flat
        elif node.op in ("rotary", "position_embedding"):
            node = _from_start(node, tensors, length)
        nodes.append(node)
    start, picked = Value(START, "int32", (None,)), Value(PICKED, "int32", (None, None))
    made = replace(graph, inputs=(*graph.inputs, start, picked), nodes=tuple(nodes))
    return _shared(_without_unused(replace(_picking(made), tensors=tensors)))


def _named(graph: Graph) -> Graph:
    """The graph with the names of input and output that every decoder has."""
    ids = [value for value in graph.inputs if value.dtype == "int32"]
    outputs = [graph.values[name].shape for name in graph.outputs]
    if len(graph.inputs) != 1 or len(ids) != 1 or ids[0].shape != (None, None):
        raise UnsupportedModelError(
            f"export_decoder: the model takes {[(v.name, v.shape) for v in graph.inputs]}; a "
            "decoder takes ids (N, T), of any number of tokens"
        )
    if len(outputs) != 1 or len(outputs[0]) != 3:
        raise UnsupportedModelError(
            f"export_decoder: the model gives outputs of the shapes {outputs}; a decoder gives "
            "scores (N, T, vocabulary)"
        )
    names = {ids[0].name: TOKENS, graph.outputs[0]: LOGITS}
    nodes = tuple(
        replace(
            node,
            inputs=tuple(names.get(name, name) for name in node.inputs),
            output=names.get(node.output, node.output),
        )
        for node in graph.nodes
    )
    return replace(graph, inputs=(replace(ids[0], name=TOKENS),), outputs=(LOGITS,), nodes=nodes)


def _need_known_scores(graph: Graph, makers: Mapping[str, Node], softmax: Node) -> None:
    """Raises UnsupportedModelError if the scores of an attention stayed apart from its softmax."""
    passed: list[Node] = []
    node = makers.get(softmax.inputs[0])
    while node is not None and node.op in _SCORES:
        passed.append(node)
        node = makers.get(node.inputs[0])
    if node is None or node.op != "matmul":
        return  # weights of experts, say
    for each in passed:
        if each.op == "tanh":
            what = "squashes its scores by tanh (`attn_logit_softcapping`)"
        elif each.op == "relative_bias" and _adds_numbers(graph.tensors[each.tensors["weight"]]):
            what = "adds numbers to its scores that depend on distances (ALiBi, say)"
        else:
            continue
        break
    else:
        what = f"computes its scores by {', '.join(each.op for each in reversed(passed))}"
    raise UnsupportedModelError(
        f"export_decoder: the attention with the node {softmax.name!r} {what}, which attention "
        "over a cache does not know; use a model without, or lutra.train.export"
    )


def _adds_numbers(bias: Array) -> bool:
    """Whether a bias of distances is more than a mask."""
    return bool(((bias != 0) & (bias > MASKED)).any())


def _cached_attention(
    node: Node, makers: Mapping[str, Node], values: Mapping[str, Value], length: int
) -> tuple[list[Node], Node]:
    """Attention over a cache, and the nodes before it that bring heads side by side."""
    q, k, v, *mask = node.inputs
    if mask or not flag(node, "causal"):
        raise UnsupportedModelError(
            f"export_decoder: node {node.name!r} is attention "
            f"{'with a mask' if mask else 'to later tokens'}; a decoder sees all earlier tokens "
            "and no later ones"
        )
    heads = integer(node, "heads")
    keys, values_ = (_unrepeated(name, makers, heads) for name in (k, v))
    (k, groups), (v, others) = keys, values_
    if groups != others:
        (k, v), groups = node.inputs[1:3], heads
    flat = [
        Node("flatten", f"{node.name}.{role}", (name,), f"{node.name}.{role}", {"start_axis": 2})
        for role, name in (("k", k), ("v", v))
        if len(values[name].shape) == 4
    ]
    made = {each.inputs[0]: each.output for each in flat}
    attrs = {
        "heads": heads,
        "kv_heads": groups,
        "scale": number(node, "scale"),
        "length": length,
    }
    inputs = (q, made.get(k, k), made.get(v, v), START)
    return flat, replace(node, op="cached_attention", inputs=inputs, attrs=attrs)


def _unrepeated(name: str, makers: Mapping[str, Node], heads: int) -> tuple[str, int]:
    """Keys or values whose heads are repeated, before that, and how many heads they have.

    Before that they are (N, T, G d), or (N, T, G, d) where heads were moved around.
    """
    flat = makers.get(name)
    expand = makers.get(flat.inputs[0]) if flat is not None and flat.op == "flatten" else None
    apart = makers.get(expand.inputs[0]) if expand is not None and expand.op == "expand" else None
    if expand is None or apart is None or apart.op != "reshape":
        return name, heads
    sizes, times = ints(apart, "shape")[-3:], ints(expand, "shape")
    if len(times) != 4 or times[0] or times[1] or times[3] or sizes[1] != 1:
        return name, heads
    return (apart.inputs[0], sizes[0]) if sizes[0] * times[2] == heads else (name, heads)


def _from_start(node: Node, tensors: dict[str, Array], length: int) -> Node:
    """What depends on positions, from the start on, with as many positions as the cache."""
    roles = {}
    for role, name in node.tensors.items():
        rows = tensors[name]
        if len(rows) < length:
            raise UnsupportedModelError(
                f"export_decoder: node {node.name!r} has {len(rows)} positions and "
                f"max_length={length}; choose {len(rows)} at most"
            )
        roles[role] = f"{name}[:{length}]"
        tensors[roles[role]] = np.ascontiguousarray(rows[:length])
    return replace(node, inputs=(node.inputs[0], START), tensors=roles)


def _picking(graph: Graph) -> Graph:
    """The graph with the wanted tokens picked as early as nothing behind mixes tokens."""
    makers = {node.output: node for node in graph.nodes}
    first = makers[LOGITS]
    while len(first.inputs) == 1 and _is_rowwise(first):
        before = makers.get(first.inputs[0])
        if before is None or len(before.inputs) != 1 or not _is_rowwise(before):
            break
        first = before
    if len(first.inputs) != 1 or not _is_rowwise(first):
        raise UnsupportedModelError(
            f"export_decoder: the scores are made by node {first.name!r} ({first.op}); a decoder "
            "ends in a linear layer"
        )
    pick = Node("pick_tokens", PICKED, (first.inputs[0], PICKED), f"{PICKED}.tokens")
    nodes: list[Node] = []
    for node in graph.nodes:
        if node is first:
            nodes += [pick, replace(node, inputs=(pick.output,))]
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _is_rowwise(node: Node) -> bool:
    return node.op in _ROWWISE or OPS[node.op].output_axis == -1


def _with_norms(graph: Graph) -> Graph:
    """The graph with what many operators compute of an RMS norm in one."""
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for name in set(node.inputs):
            readers.setdefault(name, []).append(node)
    replaced: dict[str, Node] = {}
    dropped: set[str] = set()
    for node in graph.nodes:
        found = _norm(graph, readers, node)
        if found is not None:
            last, norm = found
            replaced[last[-1].name] = norm
            dropped.update(each.name for each in last)
    nodes = tuple(
        replaced.get(node.name, node)
        for node in graph.nodes
        if node.name not in dropped or node.name in replaced
    )
    return _without_unused(replace(graph, nodes=nodes))


#: x * x, its mean, + eps, 1 / sqrt, x times that; then the weight, with features as channels.
_NORM = ("mul", "mean", "affine_scalar", "rsqrt", "mul", "transpose", "affine", "transpose")


def _norm(
    graph: Graph, readers: Mapping[str, Sequence[Node]], first: Node
) -> tuple[list[Node], Node] | None:
    """The nodes of an RMS norm that begins with a node, and the node that replaces them."""
    if first.op != "mul" or len(set(first.inputs)) != 1:
        return None
    x, chain = first.inputs[0], [first]
    while len(chain) < len(_NORM):
        behind = readers.get(chain[-1].output, [])
        if len(behind) != 1 or behind[0].op != _NORM[len(chain)]:
            return None
        chain.append(behind[0])
    _, mean, shift, root, scaled, turned, weight, back = chain
    last = len(graph.values[x].shape) - 1
    scales = {role: graph.tensors[name] for role, name in weight.tensors.items()}
    if (
        ints(mean, "axes") != (last,)
        or number(shift, "scale") != 1.0
        or number(shift, "bias") <= 0.0
        or set(scaled.inputs) != {x, root.output}
        or ints(turned, "axes") != (0, last, *range(1, last))
        or ints(back, "axes") != (0, *range(2, last + 1), 1)
        or scales["bias"].any()
    ):
        return None
    attrs = {"eps": number(shift, "bias")}
    roles = {"weight": weight.tensors["scale"]}
    return chain, Node("rms_norm", first.name, (x,), back.output, attrs, roles)


def _without_unused(graph: Graph) -> Graph:
    """The graph without nodes that nobody reads, and without their tensors."""
    wanted, kept = set(graph.outputs), []
    for node in reversed(graph.nodes):
        if node.output in wanted:
            wanted.update(node.inputs)
            kept.append(node)
    used = _used(kept)
    tensors = {name: array for name, array in graph.tensors.items() if name in used}
    return replace(graph, nodes=tuple(reversed(kept)), tensors=tensors)


def _shared(graph: Graph) -> Graph:
    """The graph with tensors of the same content once: angles of all layers, tied weights."""
    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    names = {}
    for name, array in graph.tensors.items():
        content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
        names[name] = first.setdefault((array.dtype.name, array.shape, content), name)
    nodes = tuple(
        replace(node, tensors={role: names[name] for role, name in node.tensors.items()})
        for node in graph.nodes
    )
    used = _used(nodes)
    tensors = {name: array for name, array in graph.tensors.items() if name in used}
    return replace(graph, nodes=nodes, tensors=tensors)


def _used(nodes: Iterable[Node]) -> set[str]:
    return {name for node in nodes for name in node.tensors.values()}
