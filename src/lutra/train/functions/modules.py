"""Function tables as PyTorch modules.

The tables are buffers: they move and are saved with the model. What they compute is one custom
operator of `lutra.train.operators.functions` each, which gives the gradient of the function too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.functions import Piecewise, Reduced, fit, fit_exp, fit_reciprocal, fit_rsqrt
from lutra.train.operators import functions as ops


class TableFunction(nn.Module):
    """A function of one number by a table: x -> y of the same shape and dtype.

    Args:
        table: The table.
    """

    breakpoint: Tensor
    slope: Tensor
    intercept: Tensor

    def __init__(self, table: Piecewise) -> None:
        super().__init__()
        self.function = table.name
        for role, array in table.tensors.items():
            self.register_buffer(role, torch.tensor(array))

    @classmethod
    def fit(cls, fn: Any, *args: Any, **settings: Any) -> TableFunction:
        """A module of the table that `lutra.functions.fit` makes of the same arguments."""
        return cls(fit(fn, *args, **settings))

    @property
    def table(self) -> Piecewise:
        """The table as arrays."""
        points, slope, intercept = (
            t.cpu().numpy() for t in (self.breakpoint, self.slope, self.intercept)
        )
        return Piecewise(points, slope, intercept, self.function)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ops.piecewise(x, self.breakpoint, self.slope, self.intercept)
        return y

    def extra_repr(self) -> str:
        return f"{self.function}, entries={len(self.slope)}"


def _register(module: nn.Module, *tables: Reduced) -> None:
    for table in tables:
        for role, array in table.tensors.items():
            module.register_buffer(role, torch.tensor(array))


class _SoftmaxTables(nn.Module):
    exp_slope: Tensor
    exp_intercept: Tensor
    reciprocal_slope: Tensor
    reciprocal_intercept: Tensor

    def __init__(self, entries: int) -> None:
        super().__init__()
        _register(self, fit_exp(entries), fit_reciprocal(entries))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tables, in the order in which the operators take them."""
        return (
            self.exp_slope,
            self.exp_intercept,
            self.reciprocal_slope,
            self.reciprocal_intercept,
        )


class TableSoftmax(_SoftmaxTables):
    """Softmax with a table for exp and one for the reciprocal of the sum.

    Args:
        dim: The axis, where `forward` is not given one.
        entries: Of each table: 8, 16 or 32.
    """

    def __init__(self, dim: int = -1, entries: int = 16) -> None:
        super().__init__(entries)
        self.dim = dim

    def forward(self, x: Tensor, dim: int | None = None) -> Tensor:
        y: Tensor = ops.table_softmax(x, *self.tensors, self.dim if dim is None else dim)
        return y

    def extra_repr(self) -> str:
        return f"dim={self.dim}, entries={len(self.exp_slope)}"


class TableAttention(_SoftmaxTables):
    """`F.scaled_dot_product_attention` with the tables of a softmax.

    Args:
        entries: Of each table: 8, 16 or 32.
    """

    def __init__(self, entries: int = 16) -> None:
        super().__init__(entries)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As the function of torch; shapes (..., T, d), (..., S, d), (..., S, d)."""
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        if dropout_p > 0.0:
            scores = ops.masked_scores(query, key, attn_mask, is_causal, factor)
            share: Tensor = ops.table_softmax(scores, *self.tensors, -1)
            return F.dropout(share, dropout_p) @ value
        y: Tensor = ops.table_attention(
            query, key, value, attn_mask, *self.tensors, is_causal, factor
        )
        return y


class TableLayerNorm(nn.Module):
    """Layer norm over the last axis with a table for 1 / sqrt(variance + eps).

    Args:
        size: D, the size of the axis.
        eps: Added to the variance.
        entries: Of the table: 8, 16 or 32.
    """

    rsqrt_slope: Tensor
    rsqrt_intercept: Tensor

    def __init__(self, size: int, eps: float = 1e-5, entries: int = 16) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        _register(self, fit_rsqrt(entries))

    @classmethod
    def from_exact(cls, norm: nn.LayerNorm, entries: int = 16) -> TableLayerNorm:
        """The table norm of an exact one, sharing its weight and bias where it has them.

        Raises:
            LutraError: It works over several axes.
        """
        if len(norm.normalized_shape) != 1:
            raise LutraError(
                f"layer norm over the axes {tuple(norm.normalized_shape)}: tables are for norms "
                "over the last axis; keep it"
            )
        new = cls(norm.normalized_shape[0], norm.eps, entries)
        _adopt(new, norm)
        return new

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ops.table_layer_norm(
            x, self.weight, self.bias, self.rsqrt_slope, self.rsqrt_intercept, self.eps
        )
        return y

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, entries={len(self.rsqrt_slope)}"


class TableRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a table for 1 / sqrt(mean square + eps).

    Args:
        size: D, the size of the axis.
        eps: Added to the mean square.
        entries: Of the table: 8, 16 or 32.
    """

    rsqrt_slope: Tensor
    rsqrt_intercept: Tensor

    def __init__(self, size: int, eps: float = 1e-6, entries: int = 16) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        _register(self, fit_rsqrt(entries))

    @classmethod
    def from_exact(cls, norm: nn.Module, eps: float, entries: int = 16) -> TableRMSNorm:
        """The table norm of an exact one, whose weight (D) it shares."""
        weight = norm.weight
        assert isinstance(weight, Tensor)
        new = cls(weight.shape[-1], eps, entries)
        _adopt(new, norm)
        return new

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ops.table_rms_norm(
            x, self.weight, self.rsqrt_slope, self.rsqrt_intercept, self.eps
        )
        return y

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, entries={len(self.rsqrt_slope)}"


def _adopt(new: nn.Module, old: nn.Module) -> None:
    """Takes over parameters, device and mode; what the old norm lacks is a constant."""
    found = next(old.parameters(), None)
    if found is not None:
        new.to(found.device)
    for name, constant in list(new.named_parameters(recurse=False)):
        mine = getattr(old, name, None)
        if mine is None:
            constant.requires_grad_(False)
        else:
            setattr(new, name, mine)
    new.train(old.training)


class TableNorm(nn.Module):
    """`F.layer_norm` or `F.rms_norm` over the last axis, called with weights, by a table.

    Args:
        centred: Whether it is a layer norm.
        entries: Of the table: 8, 16 or 32.
    """

    rsqrt_slope: Tensor
    rsqrt_intercept: Tensor

    def __init__(self, centred: bool, entries: int = 16) -> None:
        super().__init__()
        self.centred = centred
        _register(self, fit_rsqrt(entries))

    def forward(self, x: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
        """x (..., D) with weight (D); of a layer norm bias (D) too; and eps."""
        size, dtype, device = x.shape[-1], x.dtype, x.device
        weight = torch.ones(size, dtype=dtype, device=device) if weight is None else weight
        tables = self.rsqrt_slope, self.rsqrt_intercept
        y: Tensor
        if self.centred:
            bias, eps = rest
            bias = torch.zeros(size, dtype=dtype, device=device) if bias is None else bias
            y = ops.table_layer_norm(x, weight, bias, *tables, float(eps))
        else:
            (eps,) = rest
            eps = torch.finfo(x.dtype).eps if eps is None else float(eps)
            y = ops.table_rms_norm(x, weight, *tables, eps)
        return y

    def extra_repr(self) -> str:
        kind = "layer_norm" if self.centred else "rms_norm"
        return f"{kind}, entries={len(self.rsqrt_slope)}"
