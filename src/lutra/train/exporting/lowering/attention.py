"""Attention, whatever the order of axes its operands are brought into, and its masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.core import (
    Deferred,
    Lowering,
    Ref,
    UnsupportedUse,
    View,
    lowers,
)
from lutra.train.exporting.lowering.operands import (
    base_of,
    constant,
    first_activation,
    is_activation,
    operand,
)
from lutra.train.exporting.lowering.sources import Sources, size_at
from lutra.train.exporting.lowering.values import REPEATED, Atom, Sizes
from lutra.train.operators.scores import MASKED

#: Shift of the sizes, batch and numbers below which the integer inputs lie, of each trial.
_TRIALS = ((0, 2, 2), (1, 3, 2), (4, 1, 2), (2, 4, 2))
_TRIAL_OF_IDS = (1, 3, 7)
#: Of numbers that may be lengths: some below the number of keys and some above.
_TRIALS_OF_LENGTHS = ((3, 4, 7), (1, 5, 12), (5, 3, 20), (2, 6, 5))

#: The longest text whose whole mask is computed, to find windows: its square is the memory taken.
_LONGEST_MASK = 8192

_MASK_ADVICE = (
    "give it a mask of keys, which is an input of int64 or bool of shape (N, S) that is not 0 "
    "where a key may be attended to, a causal mask, or both"
)


@lowers(
    "aten.scaled_dot_product_attention.default",
    takes=("query", "key", "value", "attn_mask"),
)
def _attention(
    ctx: Lowering,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Ref | View:
    if dropout_p:
        raise UnsupportedUse("its dropout is on in eval mode too; pass 0 unless self.training")
    if enable_gqa:
        heads = _query_heads(ctx, query)
        key, value = (_shared(ctx, x, heads) for x in (key, value))
    else:
        heads = _heads_of(ctx, query)
        key, value = (
            _shared(ctx, x, heads) if heads not in (None, 1) and _heads_of(ctx, x) == 1 else x
            for x in (key, value)
        )
    return _attend(ctx, query, key, value, attn_mask, is_causal, scale, None)


def _query_heads(ctx: Lowering, query: Any) -> Any:
    """The heads of queries (N, H, T, D)."""
    x = operand(ctx, query)
    if not is_activation(x) or x.rank != 4:
        raise UnsupportedUse("its heads share keys; give it queries of shape (N, heads, T, D)")
    return views.sizes_of(ctx, x)[1]


def _heads_of(ctx: Lowering, x: Any) -> Any:
    """The heads of (N, H, T, D); None where there are other axes."""
    made = operand(ctx, x)
    sizes = views.sizes_of(ctx, made) if is_activation(made) else made.shape
    return sizes[1] if len(sizes) == 4 else None


def _shared(ctx: Lowering, x: Any, heads: Any) -> Any:
    """Keys or values (N, H, S, D) with each head as often as queries have it."""
    made = operand(ctx, x)
    if not is_activation(made):
        return made.repeat_interleave(heads // made.shape[1], 1)
    view = views.view_of(ctx, made)
    times = heads // views.sizes_of(ctx, view)[1]
    if times == 1:
        return made
    shared = (*view.axes[1], Atom(REPEATED, 1, times))
    return View(view.base, (view.axes[0], shared, *view.axes[2:]), ctx.node)


@lowers("lutra.table_attention.default", takes=("query", "key", "value", "attn_mask"))
def _table_attention(
    ctx: Lowering,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    exp_slope: Tensor,
    exp_intercept: Tensor,
    reciprocal_slope: Tensor,
    reciprocal_intercept: Tensor,
    is_causal: bool,
    scale: float,
) -> Ref | View:
    tables = {
        "exp_slope": exp_slope,
        "exp_intercept": exp_intercept,
        "reciprocal_slope": reciprocal_slope,
        "reciprocal_intercept": reciprocal_intercept,
    }
    return _attend(ctx, query, key, value, attn_mask, is_causal, scale, tables)


@lowers("lutra.masked_attention.default", takes=("query", "key", "value"))
def _masked_attention(
    ctx: Lowering, query: Any, key: Any, value: Any, keep: Ref, causal: bool, scale: float
) -> Ref | View:
    return _attend(ctx, query, key, value, None, causal, scale, None, keep)


def _attend(
    ctx: Lowering,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    is_causal: bool,
    scale: float | None,
    tables: Mapping[str, Tensor] | None,
    keep: Ref | None = None,
) -> Ref | View:
    """Emit one node for attention; its tables, if any, take the place of exp and 1/x. `keep` is a
    mask of keys that is computed (N, S)."""
    given = [operand(ctx, x) for x in (query, key, value)]
    first = next((x for x in given if is_activation(x)), None) or first_activation(ctx)
    if first is None:
        raise UnsupportedUse("it works on what is the same for every input; make that a buffer")
    # queries that are learnt, say
    q, k, v = (
        views.view_of(ctx, x if is_activation(x) else constant(ctx, x, base_of(first), x.ndim))
        for x in given
    )
    sizes = [views.sizes_of(ctx, x) for x in (q, k, v)]
    width, heads = sizes[0][-1], _heads(q)
    if not all(
        _heads(x) == heads and size[-1] == width for x, size in zip((q, k, v), sizes, strict=True)
    ):
        raise UnsupportedUse(
            "its queries, keys and values have different numbers of heads or widths; repeat them "
            "to the same"
        )
    if not isinstance(width, int) or not isinstance(heads, int):
        raise UnsupportedUse("its heads or their width are known at run time only")
    mask, causal = None, is_causal
    if attn_mask is not None:
        found = find_mask(ctx.sources, attn_mask, sizes[0], sizes[1][-2], heads)
        mask, causal = found.keys, found.causal or is_causal
    if causal and sizes[0][-2] != sizes[1][-2]:
        raise UnsupportedUse("it is causal, with other positions of queries than of keys")
    inputs = [_tokens(ctx, x) for x in (q, k, v)]
    if mask is not None:
        keys = ctx.integer_input(mask)
        assert keys is not None
        inputs.append(keys)
    if keep is not None:
        inputs.append(keep)
    made = ctx.emit(
        "attention" if keep is None else "masked_attention",
        inputs,
        inputs[0].shape,
        attrs={
            "heads": heads,
            "scale": 1 / math.sqrt(width) if scale is None else float(scale),
            "causal": bool(causal),
        },
        tensors=tables,
    )
    apart = views.reshaped(ctx, made, (ctx.batch, sizes[0][-2], heads, width))
    assert apart is not None
    ordered = views.permuted(ctx, apart, (0, 2, 1, 3))
    result = views.reshaped(ctx, ordered, ctx.result_sizes)
    if result is None:
        raise UnsupportedUse("its result has heads and positions in an order that lutra has not")
    return result


def _heads(x: View) -> Any:
    result: Any = 1
    for atom in _leading(x)[1:]:
        result = result * atom.size
    return result


def _leading(x: View) -> list[Any]:
    """The atoms before positions and features: the batch, then those of the heads."""
    atoms = [atom for axis in x.axes[:-2] for atom in axis]
    if not atoms or atoms[0].axis != 0:
        raise UnsupportedUse("its operands must be (N, T, D), or (N, heads, T, D)")
    return atoms


def _tokens(ctx: Lowering, x: View) -> Ref:
    """(N, T, heads * width) of an operand."""
    batch, *heads = _leading(x)
    features = views.joined([*heads, *x.axes[-1]])
    return ctx.realise(views.simplest(ctx, View(x.base, ((batch,), x.axes[-2], features), x.node)))


@dataclass(frozen=True)
class Mask:
    """What an attention mask comes to.

    Attributes:
        keys: The integer input that is not 0 for keys that may be attended to; None where all may.
        causal: Whether later positions are masked too.
    """

    keys: fx.Node | None
    causal: bool


def find_mask(sources: Sources, mask: Any, query: Sizes, keys: Any, heads: int) -> Mask:
    """Find out what a mask does, by computing it for random inputs.

    Args:
        sources: Of the program.
        mask: A constant, or what is deferred: of bool, true for keys that may be attended to, or
            numbers that are added to the scores.
        query: Sizes of the queries (..., T, D).
        keys: The number S of keys.
        heads: Their heads.

    Raises:
        UnsupportedUse: It is more than a mask of keys and of later positions.
    """
    if not isinstance(mask, (Deferred, Tensor)):
        raise UnsupportedUse(f"its mask is computed from activations; {_MASK_ADVICE}")
    inputs = sorted(mask.inputs, key=str) if isinstance(mask, Deferred) else []
    trials = [_Trial(sources, mask, query, keys, heads, *trial) for trial in _TRIALS]
    if any("embedding" in str(user.target) for node in inputs for user in node.users):
        trials.append(_Trial(sources, mask, query, keys, heads, *_TRIAL_OF_IDS))
    for causal in (False, True):
        for source in (None, *inputs):
            if all(trial.fits(source, causal) for trial in trials):
                return Mask(source, causal)
    raise UnsupportedUse(f"its mask follows no rule that lutra knows; {_MASK_ADVICE}")


def find_keys(sources: Sources, mask: Any, query: Sizes, keys: Any, heads: int) -> fx.Node | None:
    """Find the integer input whose keys a mask drops, beside what it does at every input.

    Args:
        sources: Of the program.
        mask: As for `find_mask`.
        query: Sizes of the queries (..., T, D).
        keys: The number S of keys.
        heads: Their heads.

    Returns:
        The input; None where the mask depends on sizes only.

    Raises:
        UnsupportedUse: It is more than a mask of positions and one of keys.
    """
    inputs = sorted(mask.inputs, key=str) if isinstance(mask, Deferred) else []
    trials = [_Trial(sources, mask, query, keys, heads, *trial) for trial in _TRIALS]
    for source in (None, *inputs):
        if all(trial.fits_positions(source) for trial in trials):
            return source
    raise UnsupportedUse(f"its mask follows no rule that lutra knows; {_MASK_ADVICE}")


def keys_of_mask(
    sources: Sources, mask: fx.Node, query: Sizes, keys: Any
) -> Literal["keys", "causal"] | None:
    """Whether a mask is the same for all heads and queries, perhaps beside one of later positions.

    Args:
        sources: Of the program.
        mask: Of four axes; see `find_mask`.
        query: Sizes of the queries (N, heads, T, D).
        keys: The number S of keys.
    """
    deferred, heads = sources.deferred(mask), query[1]
    if deferred is None or not isinstance(heads, int):
        return None
    every = (*_TRIALS, *_TRIALS_OF_LENGTHS)
    trials = [_Trial(sources, deferred, query, keys, heads, *trial) for trial in every]
    for causal in (False, True):
        if all(trial.drops_keys(causal) for trial in trials):
            return "causal" if causal else "keys"
    return None


def allowed_at(sources: Sources, mask: Any, sizes: Mapping[Any, int]) -> Tensor:
    """What a mask keeps at some sizes where every input is 1, in its own shape."""
    if isinstance(mask, Tensor):
        return _allowed(mask)
    given = sources.random(sizes, 2, torch.Generator().manual_seed(0))
    ones = {node: torch.ones_like(value) for node, value in given.items()}
    return _allowed(sources.evaluate(mask.node, sizes, ones))


def window_of(sources: Sources, mask: Any, query: Sizes, length: int) -> int | None:
    """How many tokens the last query of a long text sees, where a causal mask has a window.

    Texts of a few tokens, on which masks are tried, are shorter than most windows.

    Args:
        sources: Of the program.
        mask: As for `find_mask`.
        query: Sizes of the queries (..., T, D).
        length: T, the longest that counts; no more than `_LONGEST_MASK` are looked at.

    Returns:
        The window; None where there is none, or the mask is none of positions alone.
    """
    symbol = query[-2]
    if not isinstance(mask, Deferred) or not getattr(symbol, "is_Symbol", False):
        return None
    _, high = sources.range_of(symbol)
    length = min(length, _LONGEST_MASK, length if high is None else high)
    try:
        allowed = allowed_at(sources, mask, {**sources.sizes(first=1), symbol: length})
    except UnsupportedUse:  # what reads the mask says what is wrong with it
        return None
    if allowed.shape[-2:] != (length, length) or allowed.numel() != length**2:
        return None
    rows = allowed.reshape(length, length)
    seen = int(rows[-1].sum())
    if seen == length or not seen:
        return None
    places = torch.arange(length)
    distance = places[:, None] - places
    return seen if torch.equal(rows, (distance >= 0) & (distance < seen)) else None


class _Trial:
    """A mask for one set of random inputs: whether (N, heads, T, S) may be attended to."""

    def __init__(
        self,
        sources: Sources,
        mask: Deferred | Tensor,
        query: Sizes,
        keys: Any,
        heads: int,
        shift: int,
        batch: int,
        high: int,
    ) -> None:
        sizes = sources.sizes(shift=shift, first=batch)
        if isinstance(mask, Deferred):
            sizes |= _sizes_of_keys(mask, sizes, batch, keys)
        generator = torch.Generator().manual_seed(shift)
        self._inputs = sources.random(sizes, high, generator)
        *leading, positions, _ = (size_at(size, sizes) for size in query)
        count = size_at(keys, sizes)
        self._shape = (math.prod(leading) // heads, heads, positions, count)
        self._leading = leading
        self._at = (sources, mask, sizes)
        given = (
            mask if isinstance(mask, Tensor) else sources.evaluate(mask.node, sizes, self._inputs)
        )
        try:
            self._allowed = (
                _allowed(given).expand((*leading, positions, count)).reshape(self._shape)
            )
        except RuntimeError as error:
            raise UnsupportedUse(
                f"its mask of shape {tuple(given.shape)} does not fit scores of shape "
                f"{(*leading, positions, count)}; {_MASK_ADVICE}"
            ) from error

    def fits_positions(self, source: fx.Node | None) -> bool:
        """Whether it is what it is at every input, without the keys of one input."""
        _, _, positions, keys = self._shape
        want = allowed_at(*self._at).expand((*self._leading, positions, keys)).reshape(self._shape)
        if not want.any(-1).all():  # a query without a key says nothing of what its mask is
            return False
        return self._keeps(want, source)

    def drops_keys(self, causal: bool) -> bool:
        """Whether every query keeps what the last one does, if it may see that."""
        _, _, positions, keys = self._shape
        want = self._allowed[:, :1, -1:].expand(self._shape)
        if causal:
            if positions != keys:
                return False
            want = want & torch.ones(positions, keys, dtype=torch.bool).tril()
        return bool((self._allowed == want).all())

    def _keeps(self, want: Tensor, source: fx.Node | None) -> bool:
        """Whether it keeps what `want` keeps, without the keys that an input drops."""
        batch, _, _, keys = self._shape
        if source is not None:
            given = self._inputs[source]
            if given.shape != (batch, keys):
                return False
            want = want & (given != 0)[:, None, None, :]
        open_rows = want.any(-1, keepdim=True)  # some libraries open rows without a key
        return bool(((self._allowed == want) | ~open_rows).all())

    def fits(self, source: fx.Node | None, causal: bool) -> bool:
        _, _, positions, keys = self._shape
        want = torch.ones(self._shape, dtype=torch.bool)
        if causal:
            want = want & torch.ones(positions, keys, dtype=torch.bool).tril()
        return self._keeps(want, source)


def _sizes_of_keys(
    mask: Deferred, sizes: Mapping[Any, int], batch: int, keys: Any
) -> dict[Any, int]:
    """Sizes with which the inputs of a mask are (batch, keys).

    A program that picks keys out of its input by position allows an input that is longer; the
    attention takes one number for each key.
    """
    made = {}
    for node in mask.inputs:
        shape = node.meta["val"].shape
        if len(shape) == 2:
            for size, wanted in zip(shape, (batch, size_at(keys, sizes)), strict=True):
                if not isinstance(size, int) and size.node.expr.is_Symbol:
                    made[size.node.expr] = wanted
    return made


def _allowed(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    masked = mask <= MASKED
    if not (masked | (mask == 0)).all():
        raise UnsupportedUse(
            "its mask adds other numbers to the scores than 0 and large negative ones, such as "
            f"biases of relative positions; {_MASK_ADVICE}"
        )
    return ~masked


def is_mask(values: Tensor) -> bool:
    """Whether a constant added to scores is nothing but a mask."""
    try:
        _allowed(values)
    except UnsupportedUse:
        return False
    return True
