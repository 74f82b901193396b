"""Matrix products and embeddings: modules where the weight is a constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from lutra.train.importing.builder import Builder, Refusal, Value
from lutra.train.importing.onnx_ops.registry import Op, onnx_op


def linear(b: Builder, path: str, x: Value, weight: Tensor, bias: Tensor | None) -> Any:
    """`nn.Linear` of a weight of shape (outputs, inputs)."""
    if b.sizes(x)[-1] not in (None, weight.shape[1]):
        raise Refusal(
            f"its weight of shape {tuple(weight.shape)} does not fit an input of shape {b.sizes(x)}"
        )
    outputs, inputs = weight.shape
    module = nn.Linear(inputs, outputs, bias is not None, device="meta")
    module.weight = nn.Parameter(weight.float().contiguous().clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.float().clone())
    return b.module(path, module, x)


@onnx_op("MatMul")
def matmul(b: Builder, op: Op, x: Value, y: Value) -> Any:
    """A product; of a constant matrix `nn.Linear`, with the bias that is added next."""
    floats = b.dtype(x).is_floating_point and b.dtype(y).is_floating_point
    if not isinstance(x, Tensor) and isinstance(y, Tensor) and y.ndim == 2 and floats:
        ids = _hot(b, x, y.shape[0])
        if ids is not None:
            table = nn.Embedding(y.shape[0], y.shape[1], device="meta")
            table.weight = nn.Parameter(y.float().contiguous().clone())
            return b.module(op.path, table, ids)
        bias = op.context.bias_after(op, y.shape[1])
        return linear(b, op.path, x, y.t(), bias)
    return b.call(torch.matmul, x, y)


def _hot(b: Builder, x: Value, size: int) -> Any:
    """The numbers whose one-hot form a value is: its product with a matrix picks rows."""
    equal = x
    while isinstance(equal, fx.Node) and equal.target is torch.Tensor.to:
        equal = equal.args[0]  # type: ignore[assignment]
    if not isinstance(equal, fx.Node) or equal.target is not torch.eq:
        return None
    ids, places = equal.args
    if not isinstance(ids, fx.Node) or not isinstance(places, fx.Node) or places.op != "get_attr":
        return None
    order = getattr(b.root, str(places.target))
    if tuple(order.shape[-1:]) != (size,) or order.numel() != size:
        return None
    if b.dtype(ids).is_floating_point or not torch.equal(order.flatten(), torch.arange(size)):
        return None
    while ids.target is torch.Tensor.expand and isinstance(ids.args[0], fx.Node):
        if b.ndim(ids.args[0]) != b.ndim(ids):
            return None
        ids = ids.args[0]
    if b.sizes(ids)[-1] != 1 or b.ndim(ids) != b.ndim(x):
        return None
    return b.call(torch.squeeze, ids, -1)


@onnx_op("Gemm")
def _gemm(b: Builder, op: Op, x: Value, weight: Value, bias: Value | None = None) -> Any:
    alpha, beta = float(op.get("alpha", 1.0)), float(op.get("beta", 1.0))
    if op.get("transA", 0):
        x = b.call(torch.t, x)
    if isinstance(weight, Tensor) and not isinstance(x, Tensor) and weight.ndim == 2:
        matrix = weight if op.get("transB", 0) else weight.t()
        outputs = matrix.shape[0]
        if bias is None:
            return linear(b, op.path, x, matrix * alpha, None)
        if (
            isinstance(bias, Tensor)
            and bias.numel() in (1, outputs)
            and (bias.ndim < 2 or bias.shape[0] == 1)
        ):
            row = (bias.reshape(-1) * beta).expand(outputs)
            return linear(b, op.path, x, matrix * alpha, row)
    if op.get("transB", 0):
        weight = b.call(torch.t, weight)
    y = b.call(torch.matmul, x, weight)
    y = y if alpha == 1 else b.call(torch.mul, y, alpha)
    if bias is None:
        return y
    return b.call(torch.add, y, bias if beta == 1 else b.call(torch.mul, bias, beta))


@onnx_op("Einsum")
def _einsum(b: Builder, op: Op, *values: Value) -> Any:
    equation = str(op.get("equation", "")).replace(" ", "")
    return b.call(torch.einsum, equation, *values)


#: The attributes of attention that are read, or say nothing about the numbers.
_READ = {
    "is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap",
    "softmax_precision",
}  # fmt: skip


@onnx_op("Attention")
def _attention(b: Builder, op: Op, *values: Value | None) -> Any:
    q, k, v, mask, *cache = [*values, *[None] * 4][: max(4, len(values))]
    if any(c is not None for c in cache) or any(op.wants(i) for i in (1, 2, 3)):
        raise Refusal("it keeps keys and values from run to run; export the model without a cache")
    if q is None or k is None or v is None or op.get("softcap", 0.0) or op.attrs.keys() - _READ:
        raise Refusal("it has a window or a soft cap, which PyTorch's attention does not have")
    if mask is not None and (b.ndim(mask) < 2 or op.get("is_causal", 0)):
        raise Refusal("it has a mask of one axis, or a mask and is causal")
    flat = b.ndim(q) == 3
    if flat:
        counts = [int(op.get(name, 0)) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
        q, k, v = (_by_head(b, x, n) for x, n in zip((q, k, v), counts, strict=True))
    scale = op.get("scale")
    made = b.call(
        torch.nn.functional.scaled_dot_product_attention, q, k, v, mask,
        is_causal=bool(op.get("is_causal", 0)), scale=None if scale is None else float(scale),
        **({} if b.sizes(q)[1] == b.sizes(k)[1] else {"enable_gqa": True}),
    )  # fmt: skip
    return b.call(torch.flatten, b.call(torch.transpose, made, 1, 2), 2) if flat else made


def _by_head(b: Builder, x: Value, heads: int) -> Any:
    """(N, T, H d) to (N, H, T, d)."""
    width = b.sizes(x)[2]
    if width is None or heads < 1 or width % heads:
        raise Refusal(f"its {width} values cannot be divided among {heads} heads")
    return b.call(torch.transpose, b.call(torch.unflatten, x, 2, (heads, width // heads)), 1, 2)
