"""`from_graph`: a graph of the engine as a PyTorch module."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lutra.errors import UnsupportedModelError
from lutra.graph import Graph
from lutra.node import Node
from lutra.train.importing.builder import Builder, Refusal, identifier
from lutra.train.importing.examples import Example, noted
from lutra.train.operators.masked_mean import masked_mean

_BATCH: Final = 11
#: Sizes that stand for those that are known at run time only.
_SIZES: Final = (320, 352, 384, 416)
Args: TypeAlias = Mapping[str, Any]
#: Makes the output of a node of its inputs, attributes and tensors.
Maker: TypeAlias = Callable[[Builder, Node, list[fx.Node], Args, Mapping[str, Tensor]], Any]


def from_graph(graph: Graph) -> nn.Module:
    """Makes a module that computes what a graph does.

    Convolutions, linear layers, embeddings, norms and recurrent layers become ordinary modules with
    the names of their nodes, so that `convert`, `finetune` and `export` take the model.

    Args:
        graph: A valid graph of float operators. An int8 embedding becomes one of floats.

    Returns:
        A `torch.fx.GraphModule` in eval mode whose arguments are the inputs of the graph. It
        returns a tensor, or a tuple of several. Inputs of integers are int64.

    Raises:
        GraphError: The graph is not valid.
        UnsupportedModelError: Operators that PyTorch does not have as such: lookups, int8 layers
            and function tables; all of them are named.

    Examples:
        >>> import torch
        >>> from lutra.train import export, from_graph
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> graph = export(model, "model.lutra", torch.rand(8, 4))
        >>> from_graph(graph)
        GraphModule(
          (_0): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    known = graph.values
    builder = Builder()
    values: dict[str, Any] = {}
    shapes, dtypes = [], []
    for value in graph.inputs:
        sizes = [
            size if size is not None else _BATCH if axis == 0 else _SIZES[(axis - 1) % len(_SIZES)]
            for axis, size in enumerate(value.shape)
        ]
        dynamic = [axis for axis, size in enumerate(value.shape) if size is None]
        dtype = torch.int64 if value.dtype == "int32" else torch.float32
        values[value.name] = builder.input(value.name, sizes, dynamic, dtype)
        shapes.append(tuple(sizes))
        dtypes.append(dtype)
    failures: list[str] = []
    for node in graph.nodes:
        given = [values.get(name) for name in node.inputs]
        reason = _no_maker(node)
        if reason or any(x is None for x in given):
            failures += [f"{node.op} (node {node.name!r}): {reason}"] if reason else []
            values[node.output] = None
            continue
        tensors = {
            role: torch.from_numpy(array.copy()) for role, array in graph.node_tensors(node).items()
        }
        try:
            values[node.output] = _made(builder, graph, node, given, tensors)
        except Refusal as refusal:
            failures.append(f"{node.op} (node {node.name!r}): {refusal}")
            values[node.output] = None
    if failures:
        raise UnsupportedModelError(
            f"from_graph: the graph cannot become a module because of {len(failures)} of its "
            f"nodes: {'; '.join(failures)}", failures,
        )  # fmt: skip
    module = builder.finish([values[name] for name in graph.outputs])
    limits = tuple(_limit(graph, value.name) for value in graph.inputs)
    names = tuple(value.name for value in graph.inputs)
    noted(
        module,
        Example(
            tuple(identifier(name) for name in names), names, tuple(graph.outputs), tuple(shapes),
            tuple(dtypes), limits, all(known[name].shape[0] is None for name in names),
        ),
    )  # fmt: skip
    return module


def _limit(graph: Graph, name: str) -> int:
    """The number that entries of an input of integers stay below."""
    rows = [
        graph.node_tensors(node)["weight"].shape[0]
        for node in graph.nodes
        if node.op == "embedding" and name in node.inputs
    ]
    return min(rows, default=2)


def _no_maker(node: Node) -> str:
    """Why a node has no place in a module; empty where it has."""
    if node.op not in _MAKERS:
        return "PyTorch has no such operator; start from the float model that it was made of"
    if any(role.endswith(("slope", "intercept")) for role in node.tensors):
        return "it reads functions from tables; start from the file without --functions"
    return ""


def _made(
    b: Builder, graph: Graph, node: Node, given: list[Any], tensors: dict[str, Tensor]
) -> Any:
    maker = _MAKERS[node.op]
    for role, tensor in tensors.items():
        b.name_constant(tensor, f"{node.name}_{role}")
    attrs: dict[str, Any] = dict(node.attrs)
    attrs["graph"] = graph
    with b.named(node.output):
        return maker(b, node, given, attrs, tensors)


def _place(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    for role, tensor in tensors.items():
        setattr(module, role, nn.Parameter(tensor.float()))
    return module


def _linear(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    outputs, inputs = t["weight"].shape
    return b.module(node.name, _place(nn.Linear(inputs, outputs, device="meta"), t), *x)


def _conv2d(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    outputs, channels, *kernel = t["weight"].shape
    module = nn.Conv2d(
        channels * a["groups"], outputs, tuple(kernel), a["stride"], a["padding"],  # type: ignore[arg-type]
        a["dilation"], a["groups"], device="meta",
    )  # fmt: skip
    return b.module(node.name, _place(module, t), *x)


def _conv_transpose2d(
    b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]
) -> Any:
    weight, groups = t["weight"], a["groups"]
    outputs, depth, *kernel = weight.shape
    module = nn.ConvTranspose2d(
        depth * groups, outputs, tuple(kernel), a["stride"], a["padding"],  # type: ignore[arg-type]
        a["output_padding"], groups, dilation=a["dilation"], device="meta",
    )  # fmt: skip
    turned = weight.reshape(groups, outputs // groups, depth, *kernel).transpose(1, 2)
    turned = turned.reshape(depth * groups, outputs // groups, *kernel).contiguous()
    return b.module(node.name, _place(module, {"weight": turned, "bias": t["bias"]}), *x)


def _embedding(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    weight = t["weight"].float()
    if "scale" in t:
        weight = weight * t["scale"].unsqueeze(1)
    table = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    module = _place(table, {"weight": weight})
    ids = x[0]
    if b.dtype(ids).is_floating_point:
        ids = b.call(torch.Tensor.to, b.call(torch.round, ids), torch.int64)
    return b.module(node.name, module, ids)


def _layer_norm(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.module(
        node.name, _place(nn.LayerNorm(t["weight"].shape, a["eps"], device="meta"), t), *x
    )


def _rms_norm(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    module = nn.RMSNorm(list(t["weight"].shape), a["eps"], device="meta")
    return b.module(node.name, _place(module, t), *x)


def _group_norm(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    module = nn.GroupNorm(a["groups"], t["weight"].shape[0], a["eps"], device="meta")
    return b.module(node.name, _place(module, t), *x)


def _recurrent(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    hidden, inputs = t["weight_hh"].shape[1], t["weight_ih"].shape[1]
    kind = nn.LSTM if node.op == "lstm" else nn.GRU
    layer = kind(inputs, hidden, batch_first=True)
    for role, tensor in t.items():
        setattr(layer, f"{role}_l0", nn.Parameter(tensor.float()))
    data, *states = x
    if a.get("cells") and not _reads_last_cells(a["graph"], node, b.sizes(data)[1], hidden):
        raise Refusal("the cell states of every step are used, and PyTorch gives those of the last")
    if a["reverse"]:
        data = b.call(torch.flip, data, [1])
    first = [b.call(torch.unsqueeze, state, 0) for state in states]
    arguments = [] if not first else [tuple(first)] if node.op == "lstm" else first

    def sketch(value: Tensor, *_: Any) -> Any:
        y = value.new_empty(value.shape[0], value.shape[1], hidden)
        last = value.new_empty(1, value.shape[0], hidden)
        return y, (last, last.clone()) if node.op == "lstm" else last

    y, last = b.module(node.name, layer, data, *arguments, sketch=sketch)
    if a.get("cells"):
        cells = b.call(torch.transpose, last[1], 0, 1)
        steps = b.size(data, 1)
        if steps != 1:
            cells = b.call(torch.Tensor.expand, cells, [-1, steps, -1])
        y = b.call(torch.cat, [y, cells], 2)
    return b.call(torch.flip, y, [1]) if a["reverse"] else y


def _reads_last_cells(graph: Graph, node: Node, steps: int | None, hidden: int) -> bool:
    """Whether of the cell states only those after the last step are read."""
    if steps == 1:
        return True
    last = 0 if node.attrs["reverse"] else (steps or 0) - 1

    def fine(name: str, hops: int) -> bool:
        if name in graph.outputs:
            return False
        for reader in graph.nodes:
            if name not in reader.inputs:
                continue
            a = reader.attrs
            ends = reader.op == "from_end" and a["axis"] == 1 and a["back"] == 1
            picks = reader.op == "slice" and a["axis"] == 1 and a["start"] == last == a["stop"] - 1  # type: ignore[operator]
            states = reader.op == "slice" and a["axis"] == 2 and a["stop"] <= hidden  # type: ignore[operator]
            passes = reader.op == "slice" and a["axis"] == 2 and hops
            if not (picks or states or (ends and not node.attrs["reverse"])) and not (
                passes and fine(reader.output, hops - 1)
            ):
                return False
        return True

    return fine(node.output, 1)


def _call(function: Callable[..., Any], *names: str, **fixed: Any) -> Maker:
    """A function of the inputs, with attributes of the node as keywords."""

    def make(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
        return b.call(function, *x, **{name: a[name] for name in names}, **fixed)

    return make


def _along(function: Callable[..., Any], *names: str) -> Maker:
    """A function of one input with attributes of the node behind it."""

    def make(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
        return b.call(function, x[0], *(a[name] for name in names))

    return make


def _compare(function: Callable[..., Any]) -> Maker:
    def make(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
        return b.call(torch.Tensor.to, b.call(function, *x), torch.float32)

    return make


def _reduce(function: Callable[..., Any]) -> Maker:
    def make(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
        return b.call(function, x[0], list(a["axes"]), keepdim=a["keepdims"])

    return make


def _l2_norm(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(torch.linalg.vector_norm, x[0], 2, list(a["axes"]), keepdim=a["keepdims"])


def _clamp(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    limit = torch.finfo(torch.float32).max
    sides = {"min": a["low"], "max": a["high"]}
    kept = {name: v for name, v in sides.items() if abs(v) < limit}
    return b.call(torch.clamp, x[0], **(kept or {"min": -limit}))


def _affine(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    shape = [-1] + [1] * (b.ndim(x[0]) - 1 - a["axis"])
    scale, bias = t["scale"], t["bias"]
    made: Any = x[0]
    if bool((scale != 1).any()):
        made = b.call(torch.mul, made, _shaped(b, node, "scale", scale, shape))
    if bool((bias != 0).any()):
        made = b.call(torch.add, made, _shaped(b, node, "bias", bias, shape))
    return made


def _shaped(b: Builder, node: Node, role: str, tensor: Tensor, shape: list[int]) -> Any:
    if bool((tensor == tensor[0]).all()):
        return float(tensor[0])
    made = tensor.reshape(shape)
    b.name_constant(made, f"{node.name}_{role}")
    return made


def _affine_scalar(
    b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]
) -> Any:
    made: Any = x[0] if a["scale"] == 1.0 else b.call(torch.mul, x[0], a["scale"])
    return made if a["bias"] == 0.0 else b.call(torch.add, made, a["bias"])


def _cast(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(torch.Tensor.to, x[0], torch.float32)


def _matmul(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    turned = [
        b.call(torch.transpose, value, -1, -2) if a[flag] else value
        for value, flag in zip(x, ("transpose_a", "transpose_b"), strict=True)
    ]
    return b.call(torch.matmul, *turned)


def _pool(function: Callable[..., Any], last: str) -> Maker:
    def make(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
        sizes = (a["kernel"], a["stride"], a["padding"])
        if last == "dilation":
            return b.call(function, x[0], *sizes, a["dilation"], a["ceil_mode"])
        return b.call(function, x[0], *sizes, a["ceil_mode"], a["count_include_pad"])

    return make


def _reshape(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(torch.reshape, x[0], [b.size(x[0], 0), *a["shape"]])


def _regroup(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    sizes = [b.size(x[0], b.ndim(x[0]) + s) if s < 0 else s for s in a["sizes"]]
    return b.call(torch.reshape, x[0], [b.size(x[0], 0), *sizes])


def _pad(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    pads = list(a["pads"])
    flat = [width for i in range(len(pads) - 2, 1, -2) for width in pads[i : i + 2]]
    return b.call(torch.constant_pad_nd, x[0], flat, a["value"])


def _picked(b: Builder, x: fx.Node, axis: int, part: slice) -> Any:
    return b.call(operator.getitem, x, (*(slice(None),) * axis, part))


def _slice(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    size = b.sizes(x[0])[a["axis"]]
    stop = None if a["stop"] >= (size or 2**31 - 1) else a["stop"]
    return _picked(b, x[0], a["axis"], slice(a["start"], stop, a["step"]))


def _trim(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return _picked(b, x[0], a["axis"], slice(a["first"], -a["last"] or None, a["step"]))


def _from_end(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(torch.select, x[0], a["axis"], -a["back"])


def _transpose(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(torch.permute, x[0], a["axes"])


def _expand(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(torch.Tensor.expand, x[0], [-1, *(size or -1 for size in a["shape"])])


def _concat(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(torch.cat, x, a["axis"])


def _gather(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    index = t["index"].long()
    b.name_constant(index, f"{node.name}_index")
    return b.call(torch.index_select, x[0], a["axis"], index)


def _take_along(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    value, index = x
    index = b.call(torch.Tensor.to, index, torch.int64)
    axis = a["axis"]
    sizes = [b.size(index if i == axis else value, i) for i in range(b.ndim(value))]
    if sizes != [b.size(index, i) for i in range(b.ndim(value))]:
        index = b.call(torch.Tensor.expand, index, sizes)
    return b.call(torch.gather, value, axis, index)


def _topk(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    values, places = b.call(torch.topk, x[0], a["k"], a["axis"], a["largest"])
    return b.call(torch.Tensor.to, places, torch.float32) if a["indices"] else values


def _where(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(torch.where, b.call(torch.ne, x[0], 0), *x[1:])


def _constant(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    value = t["value"].reshape((1, *a["shape"]))
    b.name_constant(value, f"{node.name}_value")
    count = b.size(x[0], 0)
    return b.call(torch.Tensor.expand, b.node_of(value), [count, *[-1] * len(a["shape"])])


def _masked_mean(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(masked_mean, *x)


def _position_embedding(
    b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]
) -> Any:
    rows = _rows(b, t["weight"], b.size(x[0], 1))
    return b.call(torch.add, x[0], rows)


def _rows(b: Builder, table: Tensor, count: Any) -> Any:
    if isinstance(count, int):
        return table[:count].contiguous()
    return b.call(operator.getitem, b.node_of(table), slice(0, count))


def _rotary(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    heads, width = a["heads"], t["cos"].shape[1]
    steps = b.size(x[0], 1)
    apart = b.call(torch.unflatten, x[0], 2, (heads, width))
    if a["interleaved"]:
        pairs = b.call(torch.unflatten, apart, 3, (width // 2, 2))
        even, odd = (b.call(torch.select, pairs, -1, i) for i in (0, 1))
        turned = b.call(torch.flatten, b.call(torch.stack, [b.call(torch.neg, odd), even], -1), 3)
    else:
        first, second = b.call(torch.chunk, apart, 2, -1)
        turned = b.call(torch.cat, [b.call(torch.neg, second), first], -1)
    cos, sin = (b.call(torch.unsqueeze, _rows(b, t[name], steps), 1) for name in ("cos", "sin"))
    made = b.call(torch.add, b.call(torch.mul, apart, cos), b.call(torch.mul, turned, sin))
    return b.call(torch.flatten, made, 2)


def _relative_bias(
    b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]
) -> Any:
    queries, keys = b.sizes(x[0])[2:]
    if queries is None or keys is None:
        raise Refusal("the lengths that it is for are known at run time only")
    weight = t["weight"]
    distance = torch.arange(keys) - torch.arange(queries)[:, None] + weight.shape[1] // 2
    return b.call(torch.add, x[0], weight[:, distance].contiguous())


def _attention(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    heads = a["heads"]
    apart = []
    for value in x[:3]:
        parts = b.call(torch.unflatten, value, 2, (heads, (b.sizes(value)[2] or 0) // heads))
        apart.append(b.call(torch.transpose, parts, 1, 2))
    more: dict[str, Any] = {}
    if len(x) == 4:
        if a["causal"]:
            raise Refusal("it is causal and has a mask, which PyTorch does not have at once")
        seen = b.call(torch.ne, x[3], 0)
        more["attn_mask"] = b.call(torch.unsqueeze, b.call(torch.unsqueeze, seen, 1), 1)
    made = b.call(
        F.scaled_dot_product_attention, *apart, is_causal=a["causal"], scale=a["scale"], **more
    )
    return b.call(torch.flatten, b.call(torch.transpose, made, 1, 2), 2)


def _upsample(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    mode = a.get("mode", "bicubic")
    more: dict[str, Any] = {} if "nearest" in mode else {"align_corners": a["align_corners"]}
    if len(x) == 2:
        more["size"] = [b.size(x[1], axis) for axis in (2, 3)]
    elif a["size"]:
        more["size"] = list(a["size"])
    else:
        more["scale_factor"] = [a["scale_h"], a["scale_w"]]

    def sketch(image: Tensor, size: Any = None, scale_factor: Any = None, **_: Any) -> Tensor:
        if size is None:
            size = [int(f * s) for s, f in zip(image.shape[2:], scale_factor, strict=True)]
        return image.new_empty((*image.shape[:2], *size))

    return b.call_like(sketch, F.interpolate, x[0], mode=mode, **more)


def _grid_sample(b: Builder, node: Node, x: list[fx.Node], a: Args, t: Mapping[str, Tensor]) -> Any:
    return b.call(F.grid_sample, *x, a["mode"], a["padding"], a["align_corners"])


_MAKERS: Final[dict[str, Maker]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "l2_norm": _l2_norm,
    "lstm": _recurrent,
    "gru": _recurrent,
    "matmul": _matmul,
    "attention": _attention,
    "masked_attention": _attention,
    "masked_mean": _masked_mean,
    "position_embedding": _position_embedding,
    "relative_bias": _relative_bias,
    "rotary": _rotary,
    "relu": _call(torch.relu),
    "relu6": _call(F.relu6),
    "clamp": _clamp,
    "cast": _cast,
    "affine": _affine,
    "affine_scalar": _affine_scalar,
    "softmax": _along(torch.softmax, "axis"),
    "leaky_relu": _along(F.leaky_relu, "slope"),
    "gelu": _call(F.gelu, "approximate"),
    "silu": _call(F.silu),
    "tanh": _call(torch.tanh),
    "sigmoid": _call(torch.sigmoid),
    "exp": _call(torch.exp),
    "erf": _call(torch.erf),
    "sqrt": _call(torch.sqrt),
    "rsqrt": _call(torch.rsqrt),
    "reciprocal": _call(torch.reciprocal),
    "log": _call(torch.log),
    "elu": _call(F.elu),
    "softplus": _call(F.softplus),
    "mish": _call(F.mish),
    "add": _call(torch.add),
    "sub": _call(torch.sub),
    "mul": _call(torch.mul),
    "div": _call(torch.div),
    "maximum": _call(torch.maximum),
    "minimum": _call(torch.minimum),
    "greater": _compare(torch.gt),
    "greater_equal": _compare(torch.ge),
    "equal": _compare(torch.eq),
    "where": _where,
    "constant": _constant,
    "abs": _call(torch.abs),
    "sign": _call(torch.sign),
    "floor": _call(torch.floor),
    "ceil": _call(torch.ceil),
    "round": _call(torch.round),
    "hardswish": _call(F.hardswish),
    "sin": _call(torch.sin),
    "cos": _call(torch.cos),
    "max_pool2d": _pool(F.max_pool2d, "dilation"),
    "avg_pool2d": _pool(F.avg_pool2d, "count_include_pad"),
    "adaptive_avg_pool2d": _along(F.adaptive_avg_pool2d, "output_size"),
    "adaptive_max_pool2d": _along(F.adaptive_max_pool2d, "output_size"),
    "mean": _reduce(torch.mean),
    "max": _reduce(torch.amax),
    "cumsum": _along(torch.cumsum, "axis"),
    "pixel_shuffle": _along(F.pixel_shuffle, "factor"),
    "upsample": _upsample,
    "upsample_bicubic": _upsample,
    "grid_sample": _grid_sample,
    "flatten": _along(torch.flatten, "start_axis"),
    "reshape": _reshape,
    "regroup": _regroup,
    "pad": _pad,
    "slice": _slice,
    "trim": _trim,
    "from_end": _from_end,
    "flip": lambda b, node, x, a, t: b.call(torch.flip, x[0], [a["axis"]]),
    "concat": _concat,
    "transpose": _transpose,
    "expand": _expand,
    "gather": _gather,
    "take_along": _take_along,
    "topk": _topk,
}
