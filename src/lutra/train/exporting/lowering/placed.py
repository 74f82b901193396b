"""Numbers that depend on positions only, where their count is known at run time only.

Along one axis they become a table with a row for each position, along two a table of distances.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lutra.ops.shape import REST
from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.core import (
    LONGEST,
    Deferred,
    Lowering,
    Ref,
    Sizes,
    UnsupportedUse,
    View,
    is_dynamic,
)
from lutra.train.exporting.lowering.emitter import expressions
from lutra.train.exporting.lowering.sources import largest_size, size_at
from lutra.train.operators.scores import LOWEST


def placed(ctx: Lowering, x: Deferred) -> Ref | View | None:
    """What depends on positions only as an activation, the same for every sample.

    Args:
        ctx: The walk.
        x: What is deferred.

    Returns:
        An activation; None where every size of x is fixed, or its numbers depend on inputs, on the
        length itself, or on more than the distance of two positions.
    """
    sizes = expressions(x.node.meta["val"].shape)
    free = [
        axis for axis, size in enumerate(sizes) if is_dynamic(size) and not _of_batch(ctx, size)
    ]
    if x.inputs or not free:
        return None
    ways = [partial(_row_each, ctx, x, sizes, axis) for axis in free]
    if len(free) == 2:
        ways.append(partial(_pairs, ctx, x, sizes, free))
    ways.append(partial(_grid, ctx, x, sizes, free))
    for way in ways:
        try:
            made: Ref | View | None = way()
        except UnsupportedUse:
            continue
        if made is not None:
            return made
    return None


def _of_batch(ctx: Lowering, size: Any) -> bool:
    """Whether a size is the batch, or as many parts of each sample."""
    return is_dynamic(size) and size.free_symbols == {ctx.batch}


def _row_each(ctx: Lowering, x: Deferred, sizes: Sizes, axis: int) -> Ref | View | None:
    """A row of a table for each position along one axis; along others of free sizes the same."""
    length = sizes[axis]
    symbols = length.free_symbols
    if len(symbols) != 1 or ctx.batch in symbols:
        return None
    (symbol,) = symbols

    def rows(size: int, shift: int = 0) -> Tensor:
        return _rows(ctx, x, sizes, axis, {symbol: size}, shift)

    largest = _largest(ctx, symbol, length, rows)
    whole = rows(largest)
    if not bool(torch.isfinite(whole).all()):
        return None
    low, _ = ctx.sources.range_of(symbol)
    for size in {low, min(low + 1, largest), (low + largest) // 2}:
        part = rows(size)
        if part.shape[1:] != whole.shape[1:] or not torch.equal(part, whole[: len(part)]):
            return None
    zero = _zeros(ctx, length)
    if zero is None or not torch.equal(rows(largest, shift=1), whole):
        return None
    width = whole[0].numel()
    shape = (None, length, width)
    spread = zero if width == 1 else ctx.emit("expand", zero, shape, attrs={"shape": (0, width)})
    tensors = {"weight": whole.reshape(-1, width)}
    made = ctx.emit("position_embedding", spread, shape, tensors=tensors)
    # the axes of a row as they are in x, parts of samples among them
    others = tuple(whole.shape[1:])
    apart = views.reshaped(ctx, made, (ctx.batch, length, *others))
    assert apart is not None  # the features of a value
    order = [0, *range(2, 2 + axis), 1, *range(2 + axis, len(sizes) + 1)]
    turned = views.permuted(ctx, apart, order)
    small = [
        1 if i != axis and is_dynamic(size) and not _of_batch(ctx, size) else size
        for i, size in enumerate(sizes)
    ]
    shaped = _shaped(ctx, turned, tuple(small))
    return shaped if shaped is None or small == list(sizes) else _widened(ctx, shaped, sizes)


def _widened(ctx: Lowering, x: Ref | View, sizes: Sizes) -> Ref | None:
    """An activation with values repeated along axes of free size, as an activation has them; None
    where there is none like it."""
    small = ctx.realise(x)
    shape = (None, *sizes[-small.rank + 1 :]) if len(sizes) >= small.rank else (None, *sizes)
    free = [axis for axis, size in enumerate(shape) if is_dynamic(size)]
    like = ctx.find(
        lambda ref: ref.rank == len(shape) and all(ref.shape[i] == shape[i] for i in free)
    )
    if like is None or ctx.is_integers(like):
        return None
    for axis, size in enumerate(like.shape[1:], 1):
        if axis not in free and size != 1:
            one = (*like.shape[:axis], 1, *like.shape[axis + 1 :])
            attrs: dict[str, Any] = {"axis": axis, "start": 0, "stop": 1, "step": 1}
            like = ctx.emit("slice", like, one, attrs=attrs, suffix="slice")
    attrs = {"low": 0.0, "high": 0.0}  # of NaN too
    zero = ctx.emit("clamp", like, like.shape, attrs=attrs, suffix="zeros")
    return ctx.emit("add", (zero, small), shape, suffix="repeated")


def _shaped(ctx: Lowering, x: Ref | View, sizes: Sizes) -> Ref | View | None:
    """An activation (N, ...) with the batch where the sizes have it, or in front of them."""
    places = [axis for axis, size in enumerate(sizes) if _of_batch(ctx, size)]
    if len(places) > 1:
        return None
    if not places:
        shape = _with_batch(ctx, sizes)
        return None if shape is None else views.reshaped(ctx, x, shape)
    (place,) = places
    order = [*range(1, place + 1), 0, *range(place + 1, len(sizes) + 1)]
    return views.reshaped(ctx, views.permuted(ctx, x, order), sizes)


def _zeros(ctx: Lowering, length: Any) -> Ref | None:
    """Zeros (N, T, 1) for a size T that an activation or an input has."""
    like = ctx.find(lambda ref: ref.rank > 1 and length in ref.shape[1:])
    if like is None:
        return None
    if ctx.is_integers(like):
        like = ctx.emit("cast", like, like.shape, suffix="cast")
    axis = like.shape.index(length)
    others = tuple(i for i in range(1, like.rank) if i != axis)
    x = like
    if others:
        attrs = {"axes": others, "keepdims": False}
        x = ctx.emit("mean", like, (None, length), attrs=attrs, suffix="mean")
    attrs = {"low": 0.0, "high": 0.0}  # of NaN too
    x = ctx.emit("clamp", x, x.shape, attrs=attrs, suffix="zeros")
    return ctx.emit("reshape", x, (None, length, 1), attrs={"shape": (REST, 1)}, suffix="column")


def _largest(ctx: Lowering, symbol: Any, length: Any, rows: Callable[[int], Tensor]) -> int:
    """The largest size of an input for which there are rows, and not more than are kept."""
    low, high = ctx.sources.range_of(symbol)
    if high is None:
        high = max(low, 2)
        while size_at(length, {symbol: high}) < ctx.longest and high < 2**24:
            high *= 2

    def kept(size: int) -> None:
        if size_at(length, {symbol: size}) > ctx.longest:
            raise UnsupportedUse("it computes more positions than are kept")
        rows(size)

    return largest_size(kept, low, high)


def _rows(
    ctx: Lowering, x: Deferred, sizes: Sizes, axis: int, given: dict[Any, int], shift: int
) -> Tensor:
    """(T, ...) of the numbers of one sample at one size: the axis of positions in front of the
    others, where the batch and axes along which they repeat have a size of 1."""
    batch = 2 + shift
    chosen = {**ctx.sources.sizes(shift=4 * shift, first=batch), **given}
    values = ctx.sources.evaluate(x.node, chosen, {})
    for place, size in enumerate(sizes):
        if place == axis or not is_dynamic(size):
            continue
        if _of_batch(ctx, size):
            parts = values.reshape(*values.shape[:place], batch, -1, *values.shape[place + 1 :])
            values = _once(parts, place).squeeze(place)
        else:
            values = _once(values, place)
    return values.movedim(axis, 0).float().contiguous()


def _once(values: Tensor, axis: int) -> Tensor:
    """Numbers with a size of 1 in place of an axis along which they repeat.

    Raises:
        UnsupportedUse: They differ.
    """
    first = values.narrow(axis, 0, 1)
    if not torch.equal(values, first.expand_as(values)):
        raise UnsupportedUse("its numbers differ along more than one axis of free size")
    return first


# ---- grids ---------------------------------------------------------------------------------------


def _grid(ctx: Lowering, x: Deferred, sizes: Sizes, free: list[int]) -> Ref | View | None:
    """Numbers of the places of an image, such as their coordinates: a sum of one that depends on
    the row and one that depends on the column. Rows and columns may be one axis."""
    sides = _sides(ctx, sizes, free)
    if sides is None:
        return None
    lengths, symbols = sides
    if any(_of_batch(ctx, size) and size != ctx.batch for size in sizes):
        return None
    others = [i for i in range(len(sizes)) if i not in free]
    kept = [1 if sizes[i] == ctx.batch else sizes[i] for i in others]

    def at(high: int, wide: int, shift: int = 0) -> Tensor:
        """(rows, columns, ...) of one sample."""
        chosen = {**ctx.sources.sizes(first=2 + shift), symbols[0]: high, symbols[1]: wide}
        values = ctx.sources.evaluate(x.node, chosen, {})
        for place, size in enumerate(sizes):
            if _of_batch(ctx, size):
                values = _once(values, place)
        values = values.permute([*free, *others]).float()
        count = [size_at(n, chosen) for n in lengths]
        return values.reshape(*count, *values.shape[len(free) :])

    small = [max(3, ctx.sources.range_of(symbol)[0]) for symbol in symbols]
    longest = [_most(ctx, symbol, n) for symbol, n in zip(symbols, lengths, strict=True)]
    rows = at(longest[0], small[1])[:, 0]
    columns = at(small[0], longest[1])
    columns = columns[0] - columns[0, :1]
    for shift, more in enumerate(((0, 0), (3, 1), (1, 4))):
        values = at(small[0] + more[0], small[1] + more[1], shift)
        high, wide = values.shape[:2]
        whole = rows[:high, None] + columns[None, :wide]
        if values.shape != whole.shape or not torch.allclose(values, whole, rtol=1e-6, atol=1e-6):
            return None
    made = []
    for table, length, axis in ((rows, lengths[0], 1), (columns, lengths[1], 2)):
        zero = _zeros(ctx, length)
        if zero is None or not bool(torch.isfinite(table).all()):
            return None
        width = table[0].numel()
        shape = (None, length, width)
        wide_zero = (
            zero if width == 1 else ctx.emit("expand", zero, shape, attrs={"shape": (0, width)})
        )
        tensors = {"weight": table.reshape(-1, width).contiguous()}
        one = ctx.emit("position_embedding", wide_zero, shape, tensors=tensors)
        apart = (None, length, 1, width) if axis == 1 else (None, 1, length, width)
        made.append(views.emit_reshape(ctx, one, apart, "side"))
    width = made[0].shape[-1]
    both = ctx.emit("add", made, (None, *lengths, width), suffix="grid")
    parts = views.reshaped(ctx, both, (ctx.batch, *lengths, *kept))
    assert parts is not None  # the features of a value
    if len(free) == 1:
        joined = (ctx.batch, lengths[0] * lengths[1], *kept)
        merged = views.reshaped(ctx, parts, joined)
        assert merged is not None  # axes that are put together always fit
        parts = merged
    places = [*free, *others]
    order = [0, *(1 + places.index(i) for i in sorted(places))]
    return _shaped(ctx, views.permuted(ctx, parts, order), sizes)


def _sides(ctx: Lowering, sizes: Sizes, free: list[int]) -> tuple[list[Any], list[Any]] | None:
    """The two sizes of an image, and the sizes of inputs that they depend on; None where there are
    not two."""
    if len(free) == 2:
        lengths = [sizes[axis] for axis in free]
    elif len(free) == 1:
        found: dict[Any, None] = {}
        ctx.find(lambda ref: bool(found.update(dict.fromkeys(filter(is_dynamic, ref.shape)))))
        single = [size for size in found if len(size.free_symbols) == 1]
        whole = sizes[free[0]]
        pairs_of = (
            [a, b]
            for i, a in enumerate(single)
            for b in single[i + 1 :]
            if (a.free_symbols | b.free_symbols) == whole.free_symbols
            and (a * b - whole).expand() == 0
        )
        lengths = next(pairs_of, [])
        if lengths and not _rows_first(ctx, lengths):
            lengths = lengths[::-1]
    else:
        return None
    symbols = [next(iter(size.free_symbols)) for size in lengths if len(size.free_symbols) == 1]
    if len(symbols) != 2 or symbols[0] == symbols[1] or ctx.batch in symbols:
        return None
    return lengths, symbols


def _rows_first(ctx: Lowering, lengths: list[Any]) -> bool:
    """Whether some activation has the two sizes in this order; either where there is none."""
    turned = ctx.find(lambda ref: ref.shape[-2:] == tuple(lengths[::-1]))
    return turned is None or ctx.find(lambda ref: ref.shape[-2:] == tuple(lengths)) is not None


def _most(ctx: Lowering, symbol: Any, length: Any) -> int:
    """The largest size of an input that gives no more positions than are kept."""
    low, high = ctx.sources.range_of(symbol)
    high = 2**20 if high is None else high
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if size_at(length, {symbol: middle}) <= ctx.longest else (low, middle)
        )
    return low


# ---- distances ----------------------------------------------------------------------------------


def _pairs(ctx: Lowering, x: Deferred, sizes: Sizes, free: list[int]) -> Ref | View | None:
    """A number for each distance of two positions, in the last two axes."""
    rank = len(sizes)
    if free != [rank - 2, rank - 1]:
        return None
    leading = [size for size in sizes[:-2] if size != 1 and size != ctx.batch]
    if any(is_dynamic(size) for size in leading) or len(leading) > 1:
        return None
    heads = leading[0] if leading else None
    like = ctx.find(
        lambda ref: (
            ref.rank == 4
            and isinstance(ref.shape[1], int)
            and (heads is None or ref.shape[1] == heads)
            and ref.shape[2:] == sizes[-2:]
        )
    )
    if like is None and heads is None:
        like = ctx.find(lambda ref: ref.rank == 3 and ref.shape[1:] == sizes[-2:])
        like = like and views.emit_reshape(ctx, like, (None, 1, *sizes[-2:]), "one")
    if like is None:
        return None
    symbols = list(sizes[-2:])
    if not all(symbol.is_Symbol for symbol in symbols):
        return None
    made = _of_distance(ctx, like, symbols, lambda length: numbers_at(ctx, x, symbols, length))
    if heads is None and like.shape[1] != 1:
        attrs = {"axis": 1, "start": 0, "stop": 1, "step": 1}
        made = ctx.emit("slice", made, (None, 1, *sizes[-2:]), attrs=attrs, suffix="slice")
    shape = _with_batch(ctx, sizes) if ctx.batch not in sizes else sizes
    return None if shape is None else views.reshaped(ctx, made, shape)


def _with_batch(ctx: Lowering, sizes: Sizes) -> Sizes | None:
    """Sizes without the batch, with it in front of them as in the result of the operator; None
    where they leave no place for it."""
    missing = len(ctx.result_sizes) - len(sizes)
    if missing > 0:
        return (ctx.batch, *(1,) * (missing - 1), *sizes)
    return (ctx.batch, *sizes[1:]) if sizes[0] == 1 else None


def by_distance(
    ctx: Lowering, symbols: list[Any], at: Callable[[int], Tensor], what: str
) -> Tensor:
    """(H or 1, 2 L - 1) of what is added to scores, for every distance within the longest length L.

    L is `core.LONGEST` at most, whatever the walk says: L x L numbers are looked at.

    Args:
        ctx: The walk.
        symbols: The lengths of queries and keys.
        at: What is added at one length, (H or 1, length, length).
        what: Begins the refusal.

    Raises:
        UnsupportedUse: It depends on more than the distance of two positions.
    """
    longest = min([LONGEST, *(ctx.sources.range_of(s)[1] or LONGEST for s in symbols)])
    longest = largest_size(at, 1, longest)
    weight = _distances(at(longest))
    for length in {2, 3, longest // 2}:
        part, first = at(length), longest - length
        if part.shape[-1] > longest or not torch.equal(
            _distances(part), weight[:, first : first + 2 * length - 1]
        ):
            raise UnsupportedUse(
                f"{what} on more than the distance of two positions; fix the length of the input"
            )
    return weight


def pairs(ctx: Lowering, x: Deferred, heads: int) -> Ref | None:
    """What depends on the distance of two positions, whose numbers are known at run time only.

    Args:
        ctx: The walk.
        x: (N heads, T, S), the same for all samples and heads; it depends on no input.
        heads: Parts of a sample.

    Returns:
        (N, heads, T, S) like scores that were computed before; None where there are none, or its
        sizes are fixed.

    Raises:
        UnsupportedUse: It depends on more than the distance.
    """
    sizes = expressions(x.node.meta["val"].shape)
    symbols = [size for size in sizes[-2:] if not isinstance(size, int)]
    if x.inputs or len(symbols) < 2 or ctx.batch in symbols:
        return None
    like = ctx.find(lambda ref: ref.shape[1:] == (heads, *sizes[-2:]))
    if like is None:
        return None

    def at(length: int) -> Tensor:
        values = numbers_at(ctx, x, symbols, length)
        if not torch.equal(values, values[:1].expand_as(values)):
            raise UnsupportedUse("it computes with the number of a sample or a head")
        return values[:1]

    return _of_distance(ctx, like, symbols, at)


def _of_distance(ctx: Lowering, like: Ref, symbols: list[Any], at: Callable[[int], Tensor]) -> Ref:
    """(N, H, T, S) of what `at` gives for a length, (H or 1, length, length)."""
    weight = by_distance(ctx, symbols, at, "it computes numbers that depend")
    zero = ctx.emit("clamp", like, like.shape, attrs={"low": 0.0, "high": 0.0}, suffix="filled")
    tensors = {"weight": weight.clamp(min=LOWEST).expand(like.shape[1], -1).contiguous()}
    return ctx.emit("relative_bias", zero, like.shape, tensors=tensors, suffix="distances")


def numbers_at(ctx: Lowering, bias: Deferred, symbols: list[Any], length: int) -> Tensor:
    """(H or 1, length, length): the bias of sequences of one length."""
    sizes = {**ctx.sources.sizes(), **dict.fromkeys(symbols, length)}
    values = ctx.sources.evaluate(bias.node, sizes, {}).float()
    while values.ndim > 3:
        if not torch.equal(values, values[:1].expand_as(values)):
            raise UnsupportedUse("it adds other numbers to each sample of the batch")
        values = values[0]
    values = values[None] if values.ndim == 2 else values
    if any(size not in (1, length) for size in values.shape[-2:]):
        raise UnsupportedUse(f"its numbers for {length} positions are {tuple(values.shape)}")
    return values.expand(-1, length, length)


def _distances(bias: Tensor) -> Tensor:
    """(H, 2 L - 1) of a bias (H, L, L): its number for every distance, j - i rising.

    Raises:
        UnsupportedUse: There are several for one distance.
    """
    length = bias.shape[-1]
    made = torch.cat([bias[:, 1:, 0].flip(1), bias[:, 0]], 1)
    place = torch.arange(length) - torch.arange(length)[:, None] + length - 1
    if not torch.equal(made[:, place], bias):
        raise UnsupportedUse(
            "it adds numbers to its scores that depend on more than the distance of two positions; "
            "fix the length of the input"
        )
    return made
