"""Transposes and reshapes that make no nodes until something needs their values in order.

See `values.View`. Everything here is about axes; what computes stays in the other files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lutra.ops.shape import REST
from lutra.train.exporting.lowering.core import Lowering
from lutra.train.exporting.lowering.values import (
    REPEATED,
    Atom,
    Ref,
    Sizes,
    UnsupportedUse,
    View,
    is_dynamic,
)

Axes = tuple[tuple[Atom, ...], ...]


def view_of(ctx: Lowering, x: Ref | View) -> View:
    """A graph value as a view of itself; a view stays what it is."""
    if isinstance(x, View):
        return x
    sizes = [ctx.batch if size is None else size for size in x.shape]
    axes = tuple(() if size == 1 else (Atom(i, 1, size),) for i, size in enumerate(sizes))
    return View(x, axes, ctx.node)


def sizes_of(ctx: Lowering, x: Ref | View) -> Sizes:
    """The sizes of a view's axes; that of the batch is torch's expression for it."""
    return tuple(_product(atom.size for atom in axis) for axis in view_of(ctx, x).axes)


def simplest(ctx: Lowering, view: View) -> Ref | View:
    """The base of a view that is no different from it; the view otherwise."""
    return view.base if view.axes == view_of(ctx, view.base).axes else view


def permuted(ctx: Lowering, x: Ref | View, order: Sequence[int]) -> Ref | View:
    """The axes of a view in another order."""
    view = view_of(ctx, x)
    return simplest(ctx, View(view.base, tuple(view.axes[i] for i in order), ctx.node))


def reshaped(ctx: Lowering, x: Ref | View, sizes: Sizes) -> Ref | View | None:
    """A view in another shape, or None where its axes cannot be cut up that way.

    Args:
        ctx: The walk.
        x: What is reshaped.
        sizes: As those of `sizes_of`.
    """
    view = view_of(ctx, x)
    rest = [atom for axis in view.axes for atom in axis][::-1]  # a stack, the first on top
    axes: list[tuple[Atom, ...]] = []
    for size in sizes:
        axis: list[Atom] = []
        while size != 1:
            if not rest:
                return None
            atom = rest.pop()
            ratio = _ratio(size, atom.size)
            if ratio is None:  # the atom is larger than what is wanted
                inner = _ratio(atom.size, size)
                if not isinstance(inner, int):
                    return None
                rest.append(Atom(atom.axis, atom.inner, inner))
                atom, ratio = Atom(atom.axis, atom.inner * inner, size), 1
            axis.append(atom)
            size = ratio
        axes.append(joined(axis))
    return None if rest else simplest(ctx, View(view.base, tuple(axes), ctx.node))


def expanded(ctx: Lowering, x: Ref | View, sizes: Sizes) -> Ref | View:
    """A view that repeats the values of another along axes of size 1, and along new ones in front.

    Args:
        ctx: The walk.
        x: What is repeated.
        sizes: Of the result.
    """
    view = view_of(ctx, x)
    old = sizes_of(ctx, view)
    new = len(sizes) - len(old)
    axes = [
        view.axes[i - new] if i >= new and old[i - new] == size else (Atom(REPEATED, 1, size),)
        for i, size in enumerate(sizes)
    ]
    return simplest(ctx, View(view.base, tuple(axes), ctx.node))


def unrepeated(ctx: Lowering, x: Ref | View) -> Ref | View:
    """A view with a size of 1 in place of each axis that repeats one value."""
    if isinstance(x, Ref):
        return x
    axes = tuple(() if _repeats(axis) and not _mixes(axis) else axis for axis in x.axes)
    return simplest(ctx, View(x.base, axes, x.node))


def is_sample(ctx: Lowering, x: Ref | View) -> bool:
    """Whether axis 0 of a view is the batch and nothing else, as it is for graph values."""
    if isinstance(x, Ref):
        return True
    first = x.axes[0] if x.axes else ()
    return len(first) == 1 and first[0].axis == 0


def batch_first(ctx: Lowering, x: Ref | View) -> list[int]:
    """The order of the axes of a view that has the batch in front."""
    batch = next((i for i, size in enumerate(sizes_of(ctx, x)) if size == ctx.batch), 0)
    return [batch, *(i for i in range(x.rank) if i != batch)]


def put_back(ctx: Lowering, x: Ref | View, order: Sequence[int]) -> Ref | View:
    """A view with its axes as they were before `permuted` by `order`."""
    return permuted(ctx, x, [order.index(i) for i in range(len(order))])


def realise(ctx: Lowering, view: View) -> Ref:
    """Make the nodes that give a view's values.

    Raises:
        UnsupportedUse: No graph value has such a shape.
    """
    shape = ctx.shape_of_sizes(sizes_of(ctx, view))
    if any(_mixes(axis) for axis in view.axes):
        return _realise_mixed(ctx, view, shape)
    plain = unrepeated(ctx, view)
    x = plain if isinstance(plain, Ref) else _in_order(ctx, plain)
    if x.shape == shape:
        return x
    changed = [size if _repeats(axis) else 0 for size, axis in zip(shape, view.axes, strict=True)]
    return ctx.emit("expand", x, shape, attrs={"shape": changed[1:]})


def _realise_mixed(ctx: Lowering, view: View, shape: Sizes) -> Ref:
    """Axes that hold repeated and other values, such as heads that share their keys."""
    apart = tuple((atom,) for axis in view.axes for atom in axis)
    return emit_reshape(ctx, realise(ctx, View(view.base, apart, view.node)), shape)


def _in_order(ctx: Lowering, view: View) -> Ref:
    """Emit reshape, transpose and reshape, as far as each of them does something."""
    base = view.base
    shape = ctx.shape_of_sizes(sizes_of(ctx, view))
    wanted = [atom for axis in view.axes for atom in axis]
    stored = sorted(wanted, key=lambda atom: (atom.axis, -atom.inner))
    if wanted == stored:
        return emit_reshape(ctx, base, shape)
    cut = ctx.shape_of_sizes(tuple(atom.size for atom in stored))
    x = base if base.shape == cut else emit_reshape(ctx, base, cut, "split")
    order = tuple(stored.index(atom) for atom in wanted)
    moved = tuple(cut[i] for i in order)
    x = ctx.emit("transpose", x, moved, attrs={"axes": order}, suffix="transpose")
    return x if moved == shape else emit_reshape(ctx, x, shape, "merge")


def emit_reshape(ctx: Lowering, x: Ref, shape: Sizes, suffix: str = "") -> Ref:
    """Emit what gives a graph value another shape, which holds as many elements."""
    if shape == x.shape:
        return x
    axis = len(shape) - 1
    if 1 <= axis < x.rank and shape[:-1] == x.shape[:axis]:
        return ctx.emit("flatten", x, shape, attrs={"start_axis": axis}, suffix=suffix)
    if sum(is_dynamic(size) for size in shape) > 1:
        dropped = _dropped(x.shape, shape)
        if dropped:  # a mean of one number is that number
            return ctx.emit(
                "mean", x, shape, attrs={"axes": dropped, "keepdims": False}, suffix=suffix
            )
        kept = _regrouped(x.shape, shape)
        if kept is not None:
            return ctx.emit("regroup", x, shape, attrs={"sizes": kept}, suffix=suffix)
        raise UnsupportedUse(
            f"it changes {_text(x.shape)} into several axes whose sizes are known at run time "
            "only; take all but one out of dynamic_axes"
        )
    sizes = [REST if is_dynamic(size) else size for size in shape[1:]]
    return ctx.emit("reshape", x, shape, attrs={"shape": sizes}, suffix=suffix)


def _dropped(old: Sizes, new: Sizes) -> tuple[int, ...]:
    """The axes of size 1 that are left out, if nothing else changes."""
    rest = list(new)
    dropped = []
    for axis, size in enumerate(old):
        if rest and rest[0] == size:
            rest.pop(0)
        elif axis > 0 and size == 1:
            dropped.append(axis)
        else:
            return ()
    return () if rest else tuple(dropped)


def _regrouped(old: Sizes, new: Sizes) -> tuple[int, ...] | None:
    """Sizes of a ``regroup``, where every size that is known at run time only stays whole."""
    left = {axis: size for axis, size in enumerate(old) if is_dynamic(size)}
    sizes: list[int] = []
    for size in new[1:]:
        if is_dynamic(size):
            axis = next((axis for axis, given in left.items() if given == size), None)
            if axis is None:
                return None
            del left[axis]
            sizes.append(-axis)
        else:
            sizes.append(size)
    before, after = (
        math.prod(size for size in shape[1:] if isinstance(size, int)) for shape in (old, new)
    )
    return tuple(sizes) if not left and before == after else None


def on_each(ctx: Lowering, xs: Sequence[Ref | View], make: Callable[..., Ref]) -> Ref | View:
    """Apply an operator that works on every element alike.

    Args:
        ctx: The walk.
        xs: Its operands, of one shape.
        make: Called with graph values of one shape; its result has that shape too.

    Raises:
        UnsupportedUse: Two views whose elements lie in another order, and no graph value has their
            shape.
    """
    if all(is_sample(ctx, x) for x in xs):
        return make(*(x if isinstance(x, Ref) else ctx.realise(x) for x in xs))
    views = [view_of(ctx, x) for x in xs]
    if any(view.axes != views[0].axes for view in views) or _repeats_any(views[0]):
        views = [_canonical(ctx, view) for view in views]
    if any(view.axes != views[0].axes for view in views):
        raise UnsupportedUse(
            "its operands hold their samples in different orders; keep the batch in axis 0"
        )
    made = make(*(view.base for view in views))
    return simplest(ctx, View(made, views[0].axes, ctx.node))


def on_last(ctx: Lowering, x: Ref | View, make: Callable[[Ref], Ref]) -> Ref | View:
    """Apply an operator that works along the last axis, wherever the batch is.

    Args:
        ctx: The walk.
        x: Its operand.
        make: Called with a graph value; the last axis of its result may have another size.
    """
    if is_sample(ctx, x):
        return make(x if isinstance(x, Ref) else ctx.realise(x))
    view = _canonical(ctx, view_of(ctx, x))
    made = make(view.base)
    axis = made.rank - 1
    last = () if made.shape[-1] == 1 else (Atom(axis, 1, made.shape[-1]),)
    return simplest(ctx, View(made, (*view.axes[:-1], last), ctx.node))


def _canonical(ctx: Lowering, view: View) -> View:
    """The same view of a base that has the batch in front and the last axis whole behind."""
    if any(_repeats(axis) for axis in view.axes) or not view.axes or not view.axes[-1]:
        raise UnsupportedUse("it works on repeated values, with the batch not in axis 0")
    last = view.axes[-1]
    before = [atom for axis in view.axes[:-1] for atom in axis]
    front = [atom for atom in before if atom.axis == 0]
    if not front:
        raise UnsupportedUse("the batch is in its last axis; keep it in axis 0")
    order = front + sorted(
        (atom for atom in before if atom.axis != 0), key=lambda atom: (atom.axis, -atom.inner)
    )
    # whole axes of the base stay whole, though a view may cut them
    groups = [*_grouped(order), last]
    base = simplest(ctx, View(view.base, tuple(map(joined, groups)), view.node))
    made = base if isinstance(base, Ref) else ctx.realise(base)
    places = {}
    for index, group in enumerate(groups):
        inner = math.prod(atom.size for atom in group[1:]) if len(group) > 1 else 1
        for position, atom in enumerate(group):
            places[atom] = Atom(index, inner, atom.size)
            if position + 1 < len(group):
                inner //= group[position + 1].size
    axes = tuple(joined([places[atom] for atom in axis]) for axis in view.axes)
    return View(made, axes, view.node)


def _grouped(atoms: Sequence[Atom]) -> list[tuple[Atom, ...]]:
    """Neighbours on an axis of the base together."""
    groups: list[tuple[Atom, ...]] = []
    for atom in atoms:
        previous = groups[-1][-1] if groups else None
        if (
            previous is not None
            and previous.axis == atom.axis
            and isinstance(atom.size, int)
            and previous.inner == atom.inner * atom.size
        ):
            groups[-1] = (*groups[-1], atom)
        else:
            groups.append((atom,))
    return groups


def joined(axis: Sequence[Atom]) -> tuple[Atom, ...]:
    """An axis with neighbours on one axis of the base made one."""
    result: list[Atom] = []
    for atom in axis:
        last = result[-1] if result else None
        if (
            last is not None
            and last.axis == atom.axis != REPEATED
            and isinstance(atom.size, int)
            and last.inner == atom.inner * atom.size
        ):
            result[-1] = Atom(atom.axis, atom.inner, last.size * atom.size)
        else:
            result.append(atom)
    return tuple(result)


def _repeats(axis: Sequence[Atom]) -> bool:
    return any(atom.axis == REPEATED for atom in axis)


def _repeats_any(view: View) -> bool:
    return any(_repeats(axis) for axis in view.axes)


def _mixes(axis: Sequence[Atom]) -> bool:
    return _repeats(axis) and len(axis) > 1


def _product(sizes: Any) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def _ratio(size: Any, part: Any) -> Any:
    """size / part where that is a whole number, or an expression that is one; None otherwise."""
    if isinstance(size, int) and isinstance(part, int):
        return size // part if size % part == 0 else None
    if isinstance(size, int):
        return None
    ratio = size / part
    _, below = ratio.as_numer_denom()
    if below != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio


def _text(shape: Sizes) -> str:
    from lutra.formatting import shape_text

    return shape_text([size if isinstance(size, int) else None for size in shape])
