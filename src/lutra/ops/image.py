"""Operators that give images another size.

``upsample`` computes as PyTorch does, in float32 with one rounding for each operation, along each
of the two axes of ``n`` entries that become ``m``::

    step = 1 / scale, rounded once, where the operator has scales, else n / m
           (n - 1) / (m - 1), or 0 where m is 1, with align_corners
    nearest:        i = min(floor(j * step), n - 1); j where m = n; floor(j / 2) where m = 2 n
    nearest-exact:  i = min(floor((j + 0.5) * step), n - 1)
    bilinear:       s = max((j + 0.5) * step - 0.5, 0); j * step with align_corners; j where m = n
                    i = min(floor(s), n - 1)    w' = min(s - i, 1)
                    i' = min(i + 1, n - 1)      w  = 1 - w'

    y[j, l] = (x[i, k] * w_k + x[i, k'] * w_k') * w_i + (x[i', k] * w_k + x[i', k'] * w_k') * w_i'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.node import Array, Node, Value
from lutra.ops.limits import MAX_EXTENT, MAX_FACTOR
from lutra.ops.spec import (
    Attr,
    Cost,
    OpSpec,
    flag,
    image_sizes,
    inner,
    integer,
    ints,
    need_rank,
    node_error,
    number,
    text,
)

#: How ``upsample`` finds values between those that it has.
MODES: Final = ("nearest", "nearest-exact", "bilinear")

#: The attributes of an operator that gives images a size, scales of theirs, or the size of others.
SCALED: Final = {
    "size": Attr(tuple, default=(), low=1, high=MAX_EXTENT),
    "scale_h": Attr(float, default=0.0, low=0, high=MAX_FACTOR),
    "scale_w": Attr(float, default=0.0, low=0, high=MAX_FACTOR),
    "align_corners": Attr(bool, default=False),
}


def _infer_pixel_shuffle(
    node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]
) -> Value:
    (x,) = inputs
    factor = integer(node, "factor")
    channels, *plane = image_sizes(node, x)
    if channels % factor**2:
        raise node_error(
            node,
            f"has factor={factor} for the input {x.name!r} of shape {x.shape}",
            f"its {channels} channels must be a multiple of {factor**2}",
        )
    sizes = (None if size is None else size * factor for size in plane)
    return x.with_shape(node.output, (x.shape[0], channels // factor**2, *sizes))


def check_scaled(node: Node, tensors: Mapping[str, Array]) -> None:
    """Raises GraphError unless a node says in one way how large its result is, see ``SCALED``."""
    scales = (number(node, "scale_h"), number(node, "scale_w"))
    size = ints(node, "size")
    given = [bool(size), any(scales), len(node.inputs) == 2]
    if sum(given) != 1 or len(size) not in (0, 2) or (any(scales) and not all(scales)):
        raise node_error(
            node,
            f"has size={size}, scale_h={scales[0]}, scale_w={scales[1]} and {len(node.inputs)} "
            "inputs",
            "give one of these: a size (height, width), two scales above 0, or a second input",
        )


def _check_upsample(node: Node, tensors: Mapping[str, Array]) -> None:
    check_scaled(node, tensors)
    if flag(node, "align_corners") and text(node, "mode") != "bilinear":
        raise node_error(node, "has align_corners=True", "that goes with mode 'bilinear' only")


def upsampled_size(size: int, scale: float) -> int:
    """How long an axis becomes."""
    return math.floor(size * scale)


def infer_scaled(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    """The output of an operator with the attributes ``SCALED``."""
    x, *like = inputs
    need_rank(node, x, 4, 4)
    sizes: list[int | None] = list(ints(node, "size"))
    if like:
        need_rank(node, like[0], 4, 4)
        sizes = list(like[0].shape[2:])
    elif not sizes:
        scales = (number(node, "scale_h"), number(node, "scale_w"))
        sizes = [
            None if size is None else upsampled_size(size, scale)
            for size, scale in zip(x.shape[2:], scales, strict=True)
        ]
    if 0 in sizes:
        raise node_error(
            node,
            f"leaves nothing of its input {x.name!r} of shape {x.shape}",
            "use a larger input or scale",
        )
    return x.with_shape(node.output, (*x.shape[:2], *sizes))


def _cost_upsample(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    made = math.prod(inner(output)) if text(node, "mode") == "bilinear" else 0
    return Cost(float_adds=3 * made, float_muls=6 * made)


SPECS: Final = (
    OpSpec(
        "pixel_shuffle",
        attrs={"factor": Attr(int, low=1, high=MAX_FACTOR)},
        infer=_infer_pixel_shuffle,
    ),
    OpSpec(
        "upsample",
        attrs={
            "mode": Attr(str, choices=MODES),
            **SCALED,
        },
        check=_check_upsample,
        infer=infer_scaled,
        cost=_cost_upsample,
        max_inputs=2,
    ),
)
