"""What is made of a `Deferred` where an operator needs its numbers: a constant or an activation.

Integers reach activations in three ways, beside masks (see `attention`) and embeddings: as a
constant, when they depend on sizes only and are the same for all of them; as a table of one row
for each position, when they depend on a length; and as numbers, when a mask is multiplied with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lutra.train.exporting.lowering.core import Deferred, Lowering, Ref, UnsupportedUse, View
from lutra.train.exporting.lowering.placed import placed
from lutra.train.exporting.lowering.sources import Sources, largest_size, size_at

_DYNAMIC = (
    "it computes with the size of an axis that is known at run time only; use constants, or take "
    "that axis out of dynamic_axes"
)


def computed(ctx: Lowering, x: Deferred) -> Ref | View | Tensor:
    """Return what is deferred as a constant, or as an activation computed in float32.

    Raises:
        UnsupportedUse: It is neither.
    """
    if x.inputs:
        return _activation(ctx, x.node)
    made: Ref | View | None = placed(ctx, x)
    return _constant(ctx, x) if made is None else made


def table(ctx: Lowering, x: Deferred, axis: int) -> Tensor | None:
    """Return what depends on the size of one axis only, for the longest such axis.

    Args:
        ctx: The walk.
        x: Of shape (..., T, D), or (..., T), with the same numbers for all samples.
        axis: T, counted from behind.

    Returns:
        (L, ...) for the largest size L of that axis, of which the first rows are those of every
        smaller size; None where the size of the axis is fixed, or it depends on inputs.

    Raises:
        UnsupportedUse: The numbers of a position depend on the length.
    """
    value = x.node.meta["val"]
    if x.inputs or value.ndim < -axis or isinstance(value.shape[axis], int):
        return None
    symbol = value.shape[axis].node.expr
    if not symbol.is_Symbol or symbol == ctx.batch:
        return None
    low, high = ctx.sources.range_of(symbol)

    def rows(length: int) -> Tensor:
        return _rows(ctx, x, axis, {symbol: length})

    longest = largest_size(rows, low, ctx.longest if high is None else high)
    whole = rows(longest)
    for length in {low, min(low + 1, longest), (low + longest) // 2}:
        part = rows(length)
        if part.shape[0] != length or not torch.equal(part, whole[:length]):
            raise UnsupportedUse(
                "it computes positions that depend on the length of the input; make those of "
                "shorter inputs the first ones of longer inputs"
            )
    return whole


def _rows(ctx: Lowering, x: Deferred, axis: int, given: dict[Any, int]) -> Tensor:
    result = ctx.sources.evaluate(x.node, {**ctx.sources.sizes(), **given}, {})
    result = _one_sample(result, axis)
    return result.float().contiguous()


def _one_sample(values: Tensor, axis: int) -> Tensor:
    """The last axes of values that do not vary over those before."""
    while values.ndim > -axis:
        if not torch.equal(values, values[:1].expand_as(values)):
            raise UnsupportedUse("it adds other numbers to each sample of the batch")
        values = values[0]
    return values


def _constant(ctx: Lowering, x: Deferred) -> Tensor:
    results = []
    for shift, batch in ((0, 2), (1, 3), (4, 1)):
        values = ctx.sources.evaluate(x.node, ctx.sources.sizes(shift=shift, first=batch), {})
        for axis, size in enumerate(x.node.meta["val"].shape):
            if isinstance(size, int) or size.node.expr != ctx.batch:
                continue
            one = values.narrow(axis, 0, 1)
            if not same_numbers(values, one.expand_as(values)):
                raise UnsupportedUse("it computes with the number of a sample in the batch")
            values = one
        results.append(values)
    first = results[0]
    if any(each.shape != first.shape or not same_numbers(each, first) for each in results):
        raise UnsupportedUse(_DYNAMIC)
    return first


def in_parts(ctx: Lowering, x: Deferred, axis: int, count: int) -> list[Tensor]:
    """Values whose axis holds `count` parts of each sample, (samples, ...) with the parts in the
    place of the axis: for one sample, and for two.

    Args:
        ctx: The walk.
        x: It does not depend on inputs.
        axis: That holds batch * count entries.
        count: Parts of a sample.

    Raises:
        UnsupportedUse: It depends on other sizes than the batch's.
    """
    made = []
    for batch in (1, 2):
        values = _apart(ctx, x, axis, count, ctx.sources.sizes(first=batch))
        other = _apart(ctx, x, axis, count, ctx.sources.sizes(shift=4, first=batch))
        if other.shape != values.shape or not same_numbers(other, values):
            raise UnsupportedUse(_DYNAMIC)
        made.append(values)
    return made


def _apart(ctx: Lowering, x: Deferred, axis: int, count: int, sizes: Mapping[Any, int]) -> Tensor:
    values = ctx.sources.evaluate(x.node, sizes, {})
    apart = values.reshape(*values.shape[:axis], -1, count, *values.shape[axis + 1 :])
    return apart.movedim(axis, 0)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether numbers are the same; those of a product vary in rounding with its size."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    finite = b[torch.isfinite(b)]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6 * size, equal_nan=True)


def _activation(ctx: Lowering, node: fx.Node) -> Ref | View | Tensor:
    """Lower a deferred node, and those before it, in float32."""
    source = ctx.integer_input(node)
    if source is not None:
        cast: Ref | View | Tensor = ctx.force(
            node, lambda _: ctx.emit("cast", source, source.shape, suffix=f"{source.name}.cast")
        )
        return cast
    deferred = ctx.sources.deferred(node)
    if deferred is None:
        raise UnsupportedUse("it computes with integers and activations at once")
    if not deferred.inputs:
        return computed(ctx, deferred)
    made: Ref | View | Tensor = ctx.force(node, lambda each: _lowered(ctx, each))
    return made


def _lowered(ctx: Lowering, node: fx.Node) -> Any:
    target = str(node.target)
    first: Any = node.args[0] if node.args else None
    if node.target is operator.getitem:
        return ctx.force(first, lambda each: _lowered(ctx, each))[node.args[1]]
    given = first.meta["val"] if isinstance(first, fx.Node) else None
    dtype = given.dtype if isinstance(given, Tensor) else torch.int64
    own = _OWN.get(target)
    arguments = [_argument(ctx, argument) for argument in node.args]
    value = node.meta["val"]
    if own is not None and not dtype.is_floating_point:
        return own(ctx, arguments, value.dtype)
    if own is _cast:
        return ctx.apply(node, arguments)
    if isinstance(value, Tensor) and value.dtype == torch.bool and target.startswith(_OF_NUMBERS):
        raise UnsupportedUse(f"{target} of masks cannot be computed with activations")
    return ctx.apply(node, arguments)


def _argument(ctx: Lowering, argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        value = argument.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        if ctx.sources.deferred(argument) is not None:
            return _activation(ctx, argument)
        return ctx.constant(argument)
    if isinstance(argument, (tuple, list)):
        return [_argument(ctx, each) for each in argument]
    return argument


def _line(ctx: Lowering, x: Ref, scale: float, bias: float) -> Ref:
    return ctx.emit("affine_scalar", x, x.shape, attrs={"scale": scale, "bias": bias})


def _clamp(ctx: Lowering, x: Ref, low: float, high: float) -> Ref:
    return ctx.emit("clamp", x, x.shape, attrs={"low": low, "high": high})


def _nonzero(ctx: Lowering, x: Ref) -> Ref:
    """1 where a whole number is not 0, and 0 where it is."""
    return _clamp(ctx, ctx.emit("mul", (x, x), x.shape), 0.0, 1.0)


def _cast(ctx: Lowering, arguments: list[Any], dtype: torch.dtype) -> Any:
    x = arguments[0]
    return _nonzero(ctx, ctx.realise(x)) if dtype == torch.bool else x


def _not(ctx: Lowering, arguments: list[Any], dtype: torch.dtype) -> Ref:
    if dtype != torch.bool:
        raise UnsupportedUse("it computes with the bits of integers")
    return _line(ctx, ctx.realise(arguments[0]), -1.0, 1.0)


def _differs(ctx: Lowering, arguments: list[Any], dtype: torch.dtype) -> Any:
    x, other = arguments[:2]
    if not isinstance(other, (int, float)) or other != int(other):
        return ctx.apply(ctx.node, arguments)
    x = ctx.realise(x)
    return _nonzero(ctx, x if other == 0 else _line(ctx, x, 1.0, -float(other)))


def _equals(ctx: Lowering, arguments: list[Any], dtype: torch.dtype) -> Any:
    other = arguments[1]
    if not isinstance(other, (int, float)) or other != int(other):
        return ctx.apply(ctx.node, arguments)
    return _line(ctx, _differs(ctx, arguments, dtype), -1.0, 1.0)


def _greater(ctx: Lowering, arguments: list[Any], dtype: torch.dtype) -> Any:
    x, other = arguments[:2]
    if not isinstance(other, int):
        return ctx.apply(ctx.node, arguments)
    return _clamp(ctx, _line(ctx, ctx.realise(x), 1.0, -float(other)), 0.0, 1.0)


#: What adds up masks as numbers in the graph, where torch says whether one of them holds.
_OF_NUMBERS = ("aten.add.", "aten.sub.", "aten.rsub.", "aten.cumsum.")
_OWN: dict[str, Callable[[Lowering, list[Any], torch.dtype], Any]] = {
    "aten._to_copy.default": _cast,
    "aten.to.dtype": _cast,
    "aten.to.dtype_layout": _cast,
    "aten.ne.Scalar": _differs,
    "aten.eq.Scalar": _equals,
    "aten.gt.Scalar": _greater,
    "aten.logical_not.default": _not,
    "aten.bitwise_not.default": _not,
}


def looks_like(
    sources: Sources, x: Deferred, want: Callable[[Tensor], Tensor], source: fx.Node
) -> bool:
    """Whether what is deferred is a function of one integer input, by trying random masks.

    Args:
        sources: Of the program.
        x: What is deferred.
        want: The function; it may return fewer axes, or sizes of 1, and NaN where any number will
            do.
        source: The input.
    """
    generator = torch.Generator().manual_seed(0)
    for shift, batch in ((0, 2), (1, 3), (4, 1)):
        sizes = sources.sizes(shift=shift, first=batch)
        given = sources.random(sizes, 2, generator)
        got = sources.evaluate(x.node, sizes, given)
        expected = want(given[source])
        shape = [size_at(size, sizes) for size in x.node.meta["val"].shape]
        try:
            expected = expected.expand(shape)
        except RuntimeError:
            return False
        expected = torch.where(expected.isnan(), got.float(), expected.float())
        if not torch.allclose(got.float(), expected, atol=1e-6, equal_nan=True):
            return False
    return True
