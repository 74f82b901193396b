"""Operators that read images between their pixels.

``upsample_bicubic`` takes its sizes, scales and steps as ``upsample`` does (``lutra.ops.image``).
Along each axis of ``n`` entries, in float32 with one rounding for each operation and a = -0.75::

    s = (j + 0.5) * step - 0.5; j * step with align_corners         i = floor(s)        t = s - i
    f(t) = ((a + 2) t - (a + 3)) t t + 1                 g(t) = ((a t - 5 a) t + 8 a) t - 4 a
    y[j] = x[i - 1] g(t + 1) + x[i] f(t) + x[i + 1] f(1 - t) + x[i + 2] g(2 - t)

where entries outside of the axis are the first and the last one: columns first, then rows.

``grid_sample`` reads images (N, C, H, W) at the points (x, y) of a grid (N, H', W', 2), of which
-1 and 1 are the borders of the outer pixels, or their centres with ``align_corners``::

    s = ((g + 1) * size - 1) / 2; (g + 1) / 2 * (size - 1) with align_corners

What lies outside is 0 (``zeros``), the nearest pixel (``border``) or a reflection of the image at
its borders. ``bilinear`` weighs the four pixels around a point, ``nearest`` takes the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.formatting import shape_text
from lutra.node import Array, Node, Value
from lutra.ops.image import SCALED, check_scaled, infer_scaled
from lutra.ops.spec import Attr, Cost, OpSpec, inner, need_rank, need_size, node_error


def _cost_bicubic(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    made = math.prod(inner(output))
    return Cost(float_adds=6 * made, float_muls=8 * made)


def _infer_grid(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    x, grid = inputs
    need_rank(node, x, 4, 4)
    need_rank(node, grid, 4, 4)
    if need_size(node, grid, 3) != 2 or grid.shape[0] != x.shape[0]:
        raise node_error(
            node,
            f"reads images {x.name!r} of shape {shape_text(x.shape)} at the points {grid.name!r} "
            f"of shape {shape_text(grid.shape)}",
            "they must be (N, C, H, W) and (N, H', W', 2), with the same number of samples",
        )
    return x.with_shape(node.output, (*x.shape[:2], *grid.shape[1:3]))


def _cost_grid(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    made = math.prod(inner(output))
    return Cost(float_adds=4 * made, float_muls=4 * made)


SPECS: Final = (
    OpSpec(
        "upsample_bicubic",
        attrs=SCALED,
        check=check_scaled,
        infer=infer_scaled,
        cost=_cost_bicubic,
        max_inputs=2,
        since=3,
    ),
    OpSpec(
        "grid_sample",
        attrs={
            "mode": Attr(str, default="bilinear", choices=("bilinear", "nearest")),
            "padding": Attr(str, default="zeros", choices=("zeros", "border", "reflection")),
            "align_corners": Attr(bool, default=False),
        },
        infer=_infer_grid,
        cost=_cost_grid,
        min_inputs=2,
        max_inputs=2,
        since=3,
    ),
)
