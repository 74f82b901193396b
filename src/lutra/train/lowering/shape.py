"""Reshapes, pads, slices and concatenation."""

from __future__ import annotations

from typing import Any

from lutra.ops.shape import REST, TO_THE_END
from lutra.train.lowering.arguments import Number, text
from lutra.train.lowering.core import Lowering, Ref, UnsupportedUse, is_dynamic, lowers

_OPEN_END = 2**31  # torch writes the open end of a slice as the largest int64


@lowers(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.unsqueeze.default",
)
def _reshape(ctx: Lowering, self: Ref) -> Ref:
    # The shape that torch worked out says it all, whatever mixture of -1 and x.size(0) asked for
    # it; that its axis 0 is the batch was checked before.
    shape = ctx.result_shape
    if shape == self.shape:
        return self
    axis = len(shape) - 1
    if 1 <= axis < self.rank and shape[:-1] == self.shape[:axis]:
        return ctx.emit("flatten", self, attrs={"start_axis": axis})
    if sum(is_dynamic(size) for size in shape) > 1:
        raise UnsupportedUse(
            f"it changes {text(self)} into several axes whose sizes are known at run time only; "
            "take all but one out of dynamic_axes"
        )
    sizes = [REST if is_dynamic(size) else size for size in shape[1:]]
    return ctx.emit("reshape", self, attrs={"shape": sizes})


@lowers("aten.pad.default")
def _pad(ctx: Lowering, self: Ref, pad: list[int], mode: str, value: Number | None) -> Ref:
    if mode != "constant":
        raise UnsupportedUse(f"it pads with mode {mode!r}; lutra pads with a constant only")
    return _constant_pad(ctx, self, pad, value or 0)


@lowers("aten.constant_pad_nd.default")
def _constant_pad(ctx: Lowering, self: Ref, pad: list[int], value: Number) -> Ref:
    if any(amount < 0 for amount in pad):
        raise UnsupportedUse(f"it crops with negative pads {list(pad)}; use a slice for that")
    if not any(pad):
        return self
    # torch names the last axis first; lutra goes from axis 0 on.
    ends = [(0, 0)] * self.rank
    for position in range(len(pad) // 2):
        ends[self.rank - 1 - position] = (pad[2 * position], pad[2 * position + 1])
    if any(ends[0]):
        raise UnsupportedUse("it pads the batch (axis 0); pad other axes only")
    pads = tuple(amount for pair in ends for amount in pair)
    return ctx.emit("pad", self, attrs={"pads": pads, "value": float(value)})


@lowers("aten.slice.Tensor")
def _slice(
    ctx: Lowering, self: Ref, dim: int, start: int | None, end: int | None, step: int
) -> Ref:
    axis = dim % self.rank
    size = self.shape[axis]
    whole = (start or 0) == 0 and step == 1 and (end is None or end >= _OPEN_END)
    if not isinstance(size, int) and whole:
        return self
    if size is None:
        raise UnsupportedUse("it cuts the batch (axis 0); slice other axes only")
    if is_dynamic(size):
        return _dynamic_slice(ctx, self, axis, start or 0, end, step)
    first, stop, step = slice(start, end, step).indices(size)
    return _cut(ctx, self, axis, first, max(first, stop), step)


def _dynamic_slice(ctx: Lowering, x: Ref, axis: int, start: int, end: int | None, step: int) -> Ref:
    """A slice of an axis whose size is known at run time only."""
    to_the_end = end is None or end >= _OPEN_END
    stop = TO_THE_END if end is None or to_the_end else end
    known = isinstance(ctx.result_shape[axis], int)  # not so where torch would cut less
    if start < 0 or stop < 0 or known == to_the_end:
        raise UnsupportedUse(
            f"it cuts axis {axis} of {text(x)} from {start} to {stop}, counted from an end that is "
            "known at run time only; count from the beginning"
        )
    attrs = {"axis": axis, "start": start, "stop": stop, "step": step}
    return ctx.emit("slice", x, attrs=attrs)


@lowers("aten.select.int")
def _select(ctx: Lowering, self: Ref, dim: int, index: int) -> Ref:
    axis = dim % self.rank
    size = self.shape[axis]
    if size is None:
        raise UnsupportedUse("it picks one sample of the batch; index other axes only")
    if is_dynamic(size):
        if index < 0:
            raise UnsupportedUse(
                f"it counts from the end of axis {axis} of {text(self)}, which is known at run "
                "time only; count from the beginning"
            )
    else:
        index %= size
    row = _cut(ctx, self, axis, index, index + 1, 1, suffix="slice")
    return _reshape(ctx, row)


@lowers("aten.split.Tensor")
def _split(ctx: Lowering, self: Ref, split_size: int, dim: int) -> tuple[Ref, ...]:
    size = self.shape[dim % self.rank]
    if size is None:
        raise UnsupportedUse("it splits the batch (axis 0); split other axes only")
    if is_dynamic(size):
        raise UnsupportedUse(
            f"it splits an axis of {text(self)} whose size is known at run time only; split others"
        )
    sizes = [min(split_size, size - start) for start in range(0, size, split_size)]
    return _split_sizes(ctx, self, sizes, dim)


@lowers("aten.split_with_sizes.default")
def _split_sizes(ctx: Lowering, self: Ref, split_sizes: list[int], dim: int) -> tuple[Ref, ...]:
    axis = dim % self.rank
    if axis == 0:
        raise UnsupportedUse("it splits the batch (axis 0); split other axes only")
    starts = [sum(split_sizes[:i]) for i in range(len(split_sizes))]
    pieces = zip(starts, split_sizes, strict=True)
    return tuple(_cut(ctx, self, axis, start, start + size, 1) for start, size in pieces)


@lowers("aten.cat.default")
def _cat(ctx: Lowering, tensors: list[Any], dim: int) -> Ref:
    if not all(isinstance(tensor, Ref) for tensor in tensors):
        raise UnsupportedUse("it joins an activation with a constant; use a pad for constants")
    axis = dim % tensors[0].rank
    if axis == 0:
        raise UnsupportedUse("it joins along the batch (axis 0); join along another axis")
    return ctx.emit("concat", tensors, attrs={"axis": axis})


def _cut(
    ctx: Lowering, x: Ref, axis: int, start: int, stop: int, step: int, suffix: str = ""
) -> Ref:
    if (start, stop, step) == (0, x.shape[axis], 1):
        return x
    size = len(range(start, stop, step))
    if size == 0:
        raise UnsupportedUse(f"it takes nothing from axis {axis} of {text(x)}; keep one entry")
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    attrs = {"axis": axis, "start": start, "stop": stop, "step": step}
    return ctx.emit("slice", x, shape, attrs=attrs, suffix=suffix)
