"""Function tables as operators: native kernels on the CPU, PyTorch elsewhere.

`lutra::piecewise`, `lutra::table_softmax`, `lutra::table_layer_norm`, `lutra::table_rms_norm` and
`lutra::table_attention` are custom operators, so that `torch.export` keeps each as one node. Their
arguments are those of the torch operators that they stand for, and the tables.

Gradients: that of `piecewise` is the slope of the entry. Those of the others are the gradients of
the exact operator, at the outputs of the table where a softmax needs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lutra.train.operators import native

_LOG2_E = 1.44269504
_LOW, _HIGH = -87.0, 88.0  # as lutra.reference.functions


def _lines(x: Tensor, index: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    return torch.addcmul(intercept[index], slope[index], x)


def portable_piecewise(x: Tensor, breakpoint: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    """y of x, both float32 of any shape; see `lutra.functions.Piecewise`."""
    index = torch.bucketize(x, breakpoint, right=True)
    chosen = slope[index]
    line = torch.addcmul(intercept[index], chosen, x)
    flat = (chosen == 0) & ~torch.isnan(x)
    return torch.where(flat, intercept[index], line)


def portable_exp(x: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    """The range-reduced exponential of float32; see `lutra.ops.functions`."""
    t = x.nan_to_num(0.0).clamp(_LOW, _HIGH) * _LOG2_E
    n = torch.floor(t)
    f = t - n
    index = (f * len(slope)).long().clamp_max(len(slope) - 1)
    y = torch.ldexp(_lines(f, index, slope, intercept), n.int())
    y = torch.where(x < _LOW, torch.zeros_like(y), y)
    return torch.where(torch.isnan(x), x, y)


def _parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exponents and mantissas, int32; and significands in [1, 2)."""
    bits = x.contiguous().view(torch.int32)
    mantissa = bits & 0x7FFFFF
    return (bits >> 23 & 0xFF) - 127, mantissa, (mantissa | 0x3F800000).view(torch.float32)


def _top_bits(mantissa: Tensor, entries: int) -> Tensor:
    return (mantissa >> (23 - (entries.bit_length() - 1))).long()


def portable_reciprocal(x: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    """The range-reduced 1 / x of float32."""
    exponent, mantissa, m = _parts(x)
    y = torch.ldexp(_lines(m, _top_bits(mantissa, len(slope)), slope, intercept), -exponent)
    y = torch.where(exponent < 127, y, torch.zeros_like(y))
    return torch.where(torch.isnan(x), x, torch.where(torch.signbit(x), -y, y))


def portable_rsqrt(x: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    """The range-reduced 1 / sqrt(x) of float32."""
    exponent, mantissa, m = _parts(x.nan_to_num(0.0).clamp(0.0, torch.finfo(torch.float32).max))
    odd, half = exponent & 1, len(slope) // 2
    index = odd.long() * half + _top_bits(mantissa, half)
    y = torch.ldexp(_lines(m * (1 + odd), index, slope, intercept), -(exponent >> 1))
    return torch.where(x >= 0, y, torch.full_like(y, math.nan))


_PORTABLE: dict[str, Callable[..., Tensor]] = {
    "piecewise": portable_piecewise,
    "table_exp": portable_exp,
    "table_reciprocal": portable_reciprocal,
    "table_rsqrt": portable_rsqrt,
}


def _apply(kernel: str, x: Tensor, *tables: Tensor) -> Tensor:
    """A function of each element, float32: the engine's kernel on the CPU."""
    if x.device.type == "cpu":
        return native.function(kernel, x, tables)
    return _PORTABLE[kernel](x, *tables)


def _softmax(x: Tensor, dim: int, exp: tuple[Tensor, Tensor], inverse: Any) -> Tensor:
    """Softmax of float32; a row of -inf, of masked keys alone, becomes 0."""
    top = x.amax(dim, keepdim=True)
    shifted = x - torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    powers = _apply("table_exp", shifted, *exp)
    total = powers.sum(dim, keepdim=True)
    share = _apply("table_reciprocal", total, *inverse)
    return powers * torch.where(total == 0, torch.zeros_like(share), share)


# ---- one function -------------------------------------------------------------------------------


@torch.library.custom_op("lutra::piecewise", mutates_args=())
def piecewise(x: Tensor, breakpoint: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    """A table of x (any shape): breakpoint (E - 1), slope (E), intercept (E), all float32."""
    y: Tensor = _apply("piecewise", x.float(), breakpoint, slope, intercept).to(x.dtype)
    return y


@piecewise.register_fake
def _(x: Tensor, breakpoint: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_piecewise(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, breakpoint, slope, _ = inputs
    ctx.save_for_backward(x, breakpoint, slope)


def _piecewise_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, breakpoint, slope = ctx.saved_tensors
    chosen = slope[torch.bucketize(x.float(), breakpoint, right=True)]
    return gradient * chosen.to(gradient.dtype), None, None, None


piecewise.register_autograd(_piecewise_backward, setup_context=_save_piecewise)


# ---- softmax ------------------------------------------------------------------------------------


@torch.library.custom_op("lutra::table_softmax", mutates_args=())
def table_softmax(
    x: Tensor,
    exp_slope: Tensor,
    exp_intercept: Tensor,
    reciprocal_slope: Tensor,
    reciprocal_intercept: Tensor,
    dim: int,
) -> Tensor:
    """Softmax of x along an axis; tables (E) float32 as those of `lutra.functions.Reduced`."""
    exp, inverse = (exp_slope, exp_intercept), (reciprocal_slope, reciprocal_intercept)
    return _softmax(x.float(), dim, exp, inverse).to(x.dtype)


@table_softmax.register_fake
def _(
    x: Tensor,
    exp_slope: Tensor,
    exp_intercept: Tensor,
    reciprocal_slope: Tensor,
    reciprocal_intercept: Tensor,
    dim: int,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.dim = inputs[5]


def _softmax_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    product = y * gradient
    return product - y * product.sum(ctx.dim, keepdim=True), None, None, None, None, None


table_softmax.register_autograd(_softmax_backward, setup_context=_save_softmax)


# ---- norms --------------------------------------------------------------------------------------


@torch.library.custom_op("lutra::table_layer_norm", mutates_args=())
def table_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rsqrt_slope: Tensor,
    rsqrt_intercept: Tensor,
    eps: float,
) -> Tensor:
    """Layer norm of x (..., D) over its last axis; weight and bias (D)."""
    rows = x.float()
    centred = rows - rows.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    scale = _apply("table_rsqrt", variance + eps, rsqrt_slope, rsqrt_intercept)
    return (centred * scale * weight.float() + bias.float()).to(x.dtype)


@table_layer_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rsqrt_slope: Tensor,
    rsqrt_intercept: Tensor,
    eps: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("lutra::table_rms_norm", mutates_args=())
def table_rms_norm(
    x: Tensor, weight: Tensor, rsqrt_slope: Tensor, rsqrt_intercept: Tensor, eps: float
) -> Tensor:
    """Root-mean-square norm of x (..., D) over its last axis; weight (D)."""
    rows = x.float()
    square = rows.square().mean(-1, keepdim=True)
    scale = _apply("table_rsqrt", square + eps, rsqrt_slope, rsqrt_intercept)
    return (rows * scale * weight.float()).to(x.dtype)


@table_rms_norm.register_fake
def _(
    x: Tensor, weight: Tensor, rsqrt_slope: Tensor, rsqrt_intercept: Tensor, eps: float
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[5]


def _layer_norm_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), ctx.eps)

    return (*_exact_gradients(exact, ctx, gradient), None, None, None)


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[4]


def _rms_norm_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), ctx.eps)

    return (*_exact_gradients(exact, ctx, gradient), None, None, None)


def _exact_gradients(
    exact: Callable[..., Tensor], ctx: Any, gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of the exact operator for the first inputs, which the context saved."""
    saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[: len(saved)]
    with torch.enable_grad():
        inputs = [
            t.detach().requires_grad_(need) if t is not None else None
            for t, need in zip(saved, needed, strict=True)
        ]
        y = exact(*inputs)
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, gradient))
    return tuple(
        next(found) if need and t is not None else None
        for t, need in zip(inputs, needed, strict=True)
    )


table_layer_norm.register_autograd(_layer_norm_backward, setup_context=_save_layer_norm)
table_rms_norm.register_autograd(_rms_norm_backward, setup_context=_save_rms_norm)


# ---- attention ----------------------------------------------------------------------------------


def masked_scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """The scores (..., T, S) of an attention; -inf where a mask forbids it."""
    scores = query @ key.transpose(-1, -2) * scale
    if is_causal:
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + attn_mask.to(scores.dtype)


@torch.library.custom_op("lutra::table_attention", mutates_args=())
def table_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    exp_slope: Tensor,
    exp_intercept: Tensor,
    reciprocal_slope: Tensor,
    reciprocal_intercept: Tensor,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """F.scaled_dot_product_attention of query (..., T, d), key and value (..., S, d).

    `attn_mask` is bool (True may be attended) or added to the scores. A query that may attend to
    nothing gets 0.
    """
    scores = masked_scores(query.float(), key.float(), attn_mask, is_causal, scale)
    exp, inverse = (exp_slope, exp_intercept), (reciprocal_slope, reciprocal_intercept)
    return (_softmax(scores, -1, exp, inverse) @ value.float()).to(query.dtype)


@table_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    exp_slope: Tensor,
    exp_intercept: Tensor,
    reciprocal_slope: Tensor,
    reciprocal_intercept: Tensor,
    is_causal: bool,
    scale: float,
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.is_causal, ctx.scale = inputs[8], inputs[9]


def _attention_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=ctx.is_causal, scale=ctx.scale
        )

    return (*_exact_gradients(exact, ctx, gradient), *(None,) * 6)


table_attention.register_autograd(_attention_backward, setup_context=_save_attention)
