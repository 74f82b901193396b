"""Layers over rows of points (N, C, L), which run as layers over images of one line (N, C, 1, L).

Each such layer reshapes before and after itself; ``without_detours`` then takes out of a graph what
two of them do in vain, so that a chain of them keeps its images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lutra.node import Node
from lutra.ops.elementwise import CLAMPS
from lutra.ops.shape import REST
from lutra.train.exporting.lowering.core import Lowering, Ref, Sizes, is_dynamic

_ELEMENTWISE = (*CLAMPS, "affine", "add", "mul")
_REDUCTIONS = ("mean", "max")
_RESHAPES = ("reshape", "flatten")


def as_image(
    ctx: Lowering,
    x: Ref,
    op: str,
    *,
    attrs: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> Ref:
    """Emit an operator on images for an activation (N, C, L).

    Args:
        ctx: The walk.
        x: (N, C, L)
        op: The operator; it takes (N, C, 1, L) and makes (N, M, 1, L').
        attrs: Its attributes.
        tensors: Its constants.

    Returns:
        (N, M, L'), which is the result of the torch operator.
    """
    channels, length = ctx.result_shape[1:]
    image = _reshape(ctx, x, (*x.shape[:2], 1, x.shape[2]), "image")
    made = ctx.emit(op, image, (None, channels, 1, length), attrs=attrs, tensors=tensors)
    return _reshape(ctx, made, (None, channels, length), "points")


def _reshape(ctx: Lowering, x: Ref, shape: Sizes, suffix: str) -> Ref:
    sizes = [REST if is_dynamic(size) else size for size in shape[1:]]
    return ctx.emit("reshape", x, shape, attrs={"shape": sizes}, suffix=suffix)


def without_detours(
    nodes: Sequence[Node],
    shapes: dict[str, Sizes],
    keep: set[str],
    new_name: Callable[[str], str],
) -> list[Node]:
    """Move reshapes of images (N, C, 1, L) or (N, C, L, 1) into points (N, C, L) behind what does
    not care for them, and take out those that are undone.

    Args:
        nodes: In the order in which they run.
        shapes: Of every value; those of new values are added.
        keep: Values that must stay, such as outputs.
        new_name: Makes the name of a new value or node.

    Returns:
        Nodes that compute the same for the values that are kept.
    """
    images: dict[str, str] = {}  # points -> the image that they are a reshape of
    alias: dict[str, str] = {}  # a value that is gone -> the same value
    result: list[Node] = []
    for given in nodes:
        node = replace(given, inputs=tuple(alias.get(name, name) for name in given.inputs))
        sources = [images.get(name) for name in node.inputs]
        image, shape = sources[0], shapes[node.output]
        if node.op in _RESHAPES and image is not None and shapes[image] == shape:
            if node.output not in keep:
                alias[node.output] = image
                continue
        elif node.op in _RESHAPES and _is_points_of(shape, shapes[node.inputs[0]]):
            images[node.output] = node.inputs[0]
        elif node.op in _ELEMENTWISE and image is not None:
            if all(source is not None and shapes[source] == shapes[image] for source in sources):
                made = new_name(f"{node.output}.image")
                shapes[made] = shapes[image]
                inputs = tuple(source for source in sources if source is not None)
                result.append(replace(node, inputs=inputs, output=made))
                images[node.output] = made
                sizes = tuple(REST if is_dynamic(size) else size for size in shape[1:])
                name = new_name(f"{node.name}.points")
                node = Node("reshape", name, (made,), node.output, {"shape": sizes})
        elif node.op in _REDUCTIONS and image is not None and _over_points(node):
            node = replace(node, inputs=(image,), attrs={**node.attrs, "axes": (2, 3)})
        result.append(node)
    return _alive(result, keep)


def _is_points_of(points: Sizes, image: Sizes) -> bool:
    return (
        len(points) == 3
        and len(image) == 4
        and points[:2] == image[:2]
        and (image[2:] == (1, points[2]) or image[2:] == (points[2], 1))
    )


def _over_points(node: Node) -> bool:
    return node.attrs["axes"] == (2,) and not node.attrs["keepdims"]


def _alive(nodes: Sequence[Node], keep: set[str]) -> list[Node]:
    """The nodes without reshapes that nobody reads."""
    read = set(keep)
    result = []
    for node in reversed(nodes):
        if node.op in _RESHAPES and node.output not in read:
            continue
        read.update(node.inputs)
        result.append(node)
    return result[::-1]
