"""Operators that give images another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from lutra.ops.registry import Array, Attr, OpSpec, image_sizes, integer, node_error

if TYPE_CHECKING:
    from lutra.graph import Node, Value

_MAX_FACTOR: Final = 64


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


SPECS: Final = (
    OpSpec(
        "pixel_shuffle",
        attrs={"factor": Attr(int, low=1, high=_MAX_FACTOR)},
        infer=_infer_pixel_shuffle,
    ),
)
