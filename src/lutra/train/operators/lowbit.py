"""Linear layers of low-bit weights: the engine's kernels on the CPU, products of PyTorch elsewhere.

Both add up the same integers, and round the same floats in the same order: see
`lutra.ops.lowbit` for the equations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lutra.lowbit import LowBitMatrix
from lutra.ops.lowbit import bits_of, load_rows
from lutra.ops.lowbit_storage import stored_shape
from lutra.reference.lowbit import lowbit_levels
from lutra.train.operators import native
from lutra.train.operators.frozen import FrozenNode, frozen_kernel
from lutra.train.operators.portable import exact_products

_TINY = 2.0**-120  # rows whose largest magnitude is smaller are zeros
_MOST = 127


@frozen_kernel("lowbit_linear")
def frozen_lowbit(x: Tensor, node: FrozenNode, tensors: Mapping[str, Tensor]) -> Tensor:
    """Products of low-bit weights and activations in int8.

    Tensors: weight (M, bytes) uint8, scale (M, K / group) float32, zero (M, K / group) int8 or
    none, bias (M) float32.
    """
    rows, every = x.flatten(1), tuple(tensors.values())
    if x.device.type == "cpu":
        matrix = native.cached(every, node, lambda: _matrix(node, tensors))
        y = torch.from_numpy(matrix.multiply(rows.contiguous().numpy(), pool=native.pool()))
    else:
        levels = native.cached(every, node, lambda: _levels(node, tensors))
        q, step = quantize_rows(rows)
        y = lowbit_products(q, step, levels, tensors["scale"])
    return (y + tensors["bias"])[:, :, None, None]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, K) as integers -127..127 in float32, and what a step of each is (n, 1)."""
    most = x.abs().amax(1, keepdim=True)
    fine, finite = most >= _TINY, torch.isfinite(most)
    inverse = torch.where(fine & finite, _MOST / most, 0.0)
    q = torch.where(finite, x, 0.0).mul(inverse).round_()
    step = torch.where(fine, most / _MOST, 0.0)
    return q, torch.where(finite, step, torch.nan)


def lowbit_products(q: Tensor, step: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Outputs (n, M), without the bias.

    Args:
        q, step: from `quantize_rows`.
        levels: levels less the zero of their group (M, K / group, group), float32.
        scale: of a level (M, K / group).
    """
    groups = levels.shape[1]
    largest = _MOST * max(1, int(levels.abs().max()))
    columns = q.t().reshape(groups, -1, len(q))
    y = None
    for g in range(groups):
        sums = exact_products(levels[None, :, g], columns[g : g + 1], largest)[0]
        part = sums * scale[:, g, None]
        y = part if y is None else y + part
    assert y is not None
    return (y * step.t()).t().contiguous()


def _matrix(node: FrozenNode, tensors: Mapping[str, Tensor]) -> LowBitMatrix:
    """The tensors of a layer as the matrix that multiplies on the CPU."""
    depth, levels, group = _sizes(node)
    weight, scale = tensors["weight"].numpy(), tensors["scale"].numpy()
    bits, zeros = bits_of(levels), None
    if levels != 3:
        zero = tensors.get("zero")
        middle = torch.zeros(scale.shape) if zero is None else zero.float()
        zeros, scale = ((middle + (levels - 1)) / 2).numpy(), scale * 2
    return LowBitMatrix(
        weight.reshape(stored_shape(bits, len(weight), depth)),
        bits,
        depth,
        scale,
        zeros,
        group=None if group == depth else group,
    )


def _levels(node: FrozenNode, tensors: Mapping[str, Tensor]) -> Tensor:
    """The levels of a layer as `lowbit_products` takes them."""
    depth, count, group = _sizes(node)
    weight = tensors["weight"]
    codes = load_rows(weight.cpu().numpy(), count, depth)
    levels = torch.from_numpy(lowbit_levels(codes, count)).to(weight.device, torch.float32)
    levels = levels.view(len(weight), -1, group)
    zero = tensors.get("zero")
    return levels if zero is None else levels - zero[:, :, None]


def _sizes(node: FrozenNode) -> tuple[int, int, int]:
    """Inputs, values of a code, and weights that share a scale."""
    attrs: Any = node.attrs
    return attrs["in_features"], attrs["levels"], attrs["group"]
