"""Pooling, mean and maximum, with the rules of PyTorch for padding and rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from lutra.node import Array, Node, Value
from lutra.ops.limits import MAX_EXTENT
from lutra.ops.spec import (
    Attr,
    Cost,
    OpSpec,
    flag,
    inner,
    integer,
    ints,
    need_axis,
    need_rank,
    node_error,
    pair,
)


def pooled_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """Number of pooling windows along one axis; less than 1 where none fits.

    With ``ceil_mode`` the last window may run over the end of the padded axis, but it must begin
    inside the axis or the padding before it.
    """
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def _dilation(node: Node) -> tuple[int, int]:
    return pair(node, "dilation") if "dilation" in node.attrs else (1, 1)


def _check_pool(node: Node, tensors: Mapping[str, Array]) -> None:
    padding = pair(node, "padding")
    for axis, (kernel, dilation) in enumerate(
        zip(pair(node, "kernel"), _dilation(node), strict=True)
    ):
        span = dilation * (kernel - 1) + 1
        if 2 * padding[axis] > span:
            raise node_error(
                node,
                f"has padding={padding} for a kernel that spans {span} on axis {axis + 2}",
                "the padding must be at most half of the span",
            )


def _infer_pool(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_rank(node, x, 4, 4)
    sizes = [
        None if axis[0] is None else pooled_size(axis[0], *axis[1:], flag(node, "ceil_mode"))
        for axis in zip(
            x.shape[2:],
            pair(node, "kernel"),
            pair(node, "stride"),
            pair(node, "padding"),
            _dilation(node),
            strict=True,
        )
    ]
    if any(size is not None and size < 1 for size in sizes):
        raise node_error(
            node,
            f"has kernel={node.attrs['kernel']} and padding={node.attrs['padding']} for the input "
            f"{x.name!r} of shape {x.shape}, where no window fits",
            "use a larger input or a smaller kernel",
        )
    return x.with_shape(node.output, (*x.shape[:2], *sizes))


def _infer_adaptive(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_rank(node, x, 4, 4)
    return x.with_shape(node.output, (*x.shape[:2], *pair(node, "output_size")))


def infer_reduced(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    """The output of an operator that leaves one value of the axes that it names."""
    (x,) = inputs
    axes = ints(node, "axes")
    rank = len(x.shape)
    if not axes or sorted(set(axes)) != list(axes) or axes[-1] >= rank:
        raise node_error(
            node,
            f"has axes={axes} for the input {x.name!r} of shape {x.shape}",
            f"name axes in 1..{rank - 1}, rising, each once",
        )
    if flag(node, "keepdims"):
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    else:
        shape = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)
    return x.with_shape(node.output, shape)


def _cost_windows(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    made = math.prod(inner(output))
    return Cost(float_adds=made * math.prod(pair(node, "kernel")), float_muls=made)


def _cost_mean(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    return Cost(float_adds=math.prod(inner(inputs[0])), float_muls=math.prod(inner(output)))


def _infer_cumsum(node: Node, inputs: Sequence[Value], tensors: Mapping[str, Array]) -> Value:
    (x,) = inputs
    need_axis(node, x, "axis", integer(node, "axis"))
    return x.with_shape(node.output, x.shape)


def _cost_cumsum(
    node: Node, inputs: Sequence[Value], output: Value, tensors: Mapping[str, Array]
) -> Cost:
    return Cost(float_adds=math.prod(inner(output)))


_WINDOW: Final = {
    "kernel": Attr(tuple, low=1, high=MAX_EXTENT, length=2),
    "stride": Attr(tuple, low=1, high=MAX_EXTENT, length=2),
    "padding": Attr(tuple, default=(0, 0), low=0, high=MAX_EXTENT, length=2),
    "ceil_mode": Attr(bool, default=False),
}
_OUTPUT_SIZE: Final = {"output_size": Attr(tuple, low=1, high=MAX_EXTENT, length=2)}
#: The attributes of an operator that leaves one value of some axes.
REDUCED: Final = {
    "axes": Attr(tuple, low=1, high=7),
    "keepdims": Attr(bool, default=False),
}

SPECS: Final = (
    OpSpec(
        "max_pool2d",
        attrs={
            **_WINDOW,
            "dilation": Attr(tuple, default=(1, 1), low=1, high=MAX_EXTENT, length=2),
        },
        check=_check_pool,
        infer=_infer_pool,
        takes_pad="border",
    ),
    OpSpec(
        "avg_pool2d",
        attrs={**_WINDOW, "count_include_pad": Attr(bool, default=True)},
        check=_check_pool,
        infer=_infer_pool,
        takes_pad="border",
        cost=_cost_windows,
    ),
    OpSpec("adaptive_avg_pool2d", attrs=_OUTPUT_SIZE, infer=_infer_adaptive, cost=_cost_mean),
    OpSpec("adaptive_max_pool2d", attrs=_OUTPUT_SIZE, infer=_infer_adaptive),
    OpSpec("mean", attrs=REDUCED, infer=infer_reduced, cost=_cost_mean),
    OpSpec("max", attrs=REDUCED, infer=infer_reduced),
    OpSpec(
        "cumsum",
        attrs={"axis": Attr(int, low=1, high=7)},
        infer=_infer_cumsum,
        cost=_cost_cumsum,
        exact_floats=True,
        since=3,
    ),
)
