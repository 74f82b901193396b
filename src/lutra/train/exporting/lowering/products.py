"""Powers, sums of products, and what einsum writes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lutra.train.exporting.lowering import views
from lutra.train.exporting.lowering.arguments import Number, activation
from lutra.train.exporting.lowering.arithmetic import add, affine, div, mul
from lutra.train.exporting.lowering.arrange import diagonal
from lutra.train.exporting.lowering.core import Lowering, Ref, UnsupportedUse, View, lowers
from lutra.train.exporting.lowering.dense import matmul, product
from lutra.train.exporting.lowering.folded import parts_of
from lutra.train.exporting.lowering.functions import line
from lutra.train.exporting.lowering.operands import (
    base_of,
    constant,
    is_activation,
    operand,
    together,
)
from lutra.train.exporting.lowering.reduce import emit_sum, reduced

_ROOTS = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
_MOST = 64  # the largest power that becomes products


@lowers("aten.square.default", takes=("self",))
def _square(ctx: Lowering, self: Any) -> Ref | View:
    return _pow(ctx, self, 2)


@lowers("aten.pow.Tensor_Scalar", takes=("self",))
def _pow(ctx: Lowering, self: Any, exponent: Number) -> Ref | View:
    x = activation(ctx, self)
    number = float(exponent)
    if number in _ROOTS:
        return views.on_each(ctx, (x,), lambda ref: ctx.emit(_ROOTS[number], ref, ref.shape))
    if number == 0:
        raise UnsupportedUse("it raises to the power of 0, which is 1; leave it out")
    if number.is_integer() and abs(number) <= _MOST:
        made = _whole_power(ctx, x, abs(int(number)))
        if number > 0:
            return made
        return views.on_each(ctx, (made,), lambda ref: ctx.emit("reciprocal", ref, ref.shape))
    return views.on_each(ctx, (x,), lambda ref: _emit_power(ctx, ref, number))


def _whole_power(ctx: Lowering, x: Ref | View, power: int) -> Ref | View:
    made: Ref | View | None = None
    square = x
    while power:
        if power % 2:
            made = square if made is None else together(ctx, "mul", (made, square))
        power //= 2
        if power:
            square = together(ctx, "mul", (square, square))
    assert made is not None
    return made


def _emit_power(ctx: Lowering, x: Ref, number: float) -> Ref:
    """exp(log(x) * number), for what is not below 0."""
    return ctx.emit("exp", line(ctx, ctx.emit("log", x, x.shape), number, 0.0), x.shape)


@lowers("aten.pow.Scalar", takes=("exponent",))
def _pow_of_number(ctx: Lowering, self: Number, exponent: Any) -> Ref | View:
    if self <= 0:
        raise UnsupportedUse(f"it raises {self} to activations; use a number above 0")
    x = activation(ctx, exponent)
    return views.on_each(
        ctx, (x,), lambda ref: ctx.emit("exp", line(ctx, ref, math.log(self), 0.0), ref.shape)
    )


@lowers("aten.pow.Tensor_Tensor", takes=("self", "exponent"))
def _pow_of_two(ctx: Lowering, self: Any, exponent: Any) -> Ref | View:
    x, power = operand(ctx, self), operand(ctx, exponent)
    if isinstance(power, Tensor) and power.numel() == 1:
        return _pow(ctx, x, float(power))
    if is_activation(x):
        base: Any = views.on_each(ctx, (x,), lambda ref: ctx.emit("log", ref, ref.shape))
    else:
        base = torch.log(x)
    made = mul(ctx, base, power)
    return views.on_each(ctx, (made,), lambda ref: ctx.emit("exp", ref, ref.shape))


@lowers("aten.hypot.default", takes=("self", "other"))
def _hypot(ctx: Lowering, self: Any, other: Any) -> Ref | View:
    total = add(ctx, _pow(ctx, self, 2), _pow(ctx, other, 2), 1)
    return views.on_each(ctx, (total,), lambda ref: ctx.emit("sqrt", ref, ref.shape))


# ---- sums of products ---------------------------------------------------------------------------


@lowers("aten.addcmul.default", takes=("self", "tensor1", "tensor2"))
def _addcmul(ctx: Lowering, self: Any, tensor1: Any, tensor2: Any, value: Number) -> Ref | View:
    first, second = operand(ctx, tensor1), operand(ctx, tensor2)
    if not is_activation(first) and not is_activation(second):
        return add(ctx, self, first * second, value)
    return add(ctx, self, mul(ctx, first, second), value)


@lowers("aten.addcdiv.default", takes=("self", "tensor1", "tensor2"))
def _addcdiv(ctx: Lowering, self: Any, tensor1: Any, tensor2: Any, value: Number) -> Ref | View:
    first, second = operand(ctx, tensor1), operand(ctx, tensor2)
    if not is_activation(first) and not is_activation(second):
        return add(ctx, self, first / second, value)
    return add(ctx, self, div(ctx, first, second), value)


@lowers("aten.lerp.Scalar", "aten.lerp.Tensor", takes=("self", "end", "weight"))
def _lerp(ctx: Lowering, self: Any, end: Any, weight: Any) -> Ref | View:
    first, last, share = (operand(ctx, x) for x in (self, end, weight))
    rest: Any = (
        affine(ctx, share, -1.0, 1.0) if is_activation(share) else 1.0 - torch.as_tensor(share)
    )
    parts = [
        mul(ctx, x, by) if is_activation(x) or is_activation(by) else x * by
        for x, by in ((first, rest), (last, share))
    ]
    return add(ctx, parts[0], parts[1], 1)


# ---- einsum -------------------------------------------------------------------------------------


def _diagonal(ctx: Lowering, x: Any, letters: str) -> tuple[Any, str]:
    """An operand with the diagonal of two axes of one letter in their place, last of all."""
    letter = next(each for each in letters if letters.count(each) > 1)
    first = letters.index(letter)
    second = letters.index(letter, first + 1)
    rest = "".join(each for i, each in enumerate(letters) if i not in (first, second))
    if not is_activation(x):
        return torch.diagonal(x, 0, first, second), rest + letter
    return diagonal(ctx, x, 0, first, second), rest + letter


@lowers("aten.einsum.default", takes=("tensors",))
def _einsum(ctx: Lowering, equation: str, tensors: list[Any]) -> Ref | View:
    given = [operand(ctx, x) for x in tensors]
    ranks = [x.rank if is_activation(x) else x.ndim for x in given]
    inputs, output = _letters(equation, ranks)
    if len(set(output)) < len(output):
        raise UnsupportedUse(f"einsum {equation!r} makes a diagonal; use torch.diag_embed")
    for index in range(len(inputs)):
        while len(set(inputs[index])) < len(inputs[index]):
            given[index], inputs[index] = _diagonal(ctx, given[index], inputs[index])
    while len(given) > 2:  # two at a time, from the left
        later = {*output, *"".join(inputs[2:])}
        kept = "".join(x for x in dict.fromkeys(inputs[0] + inputs[1]) if x in later)
        if not any(map(is_activation, given[:2])):
            made: Any = torch.einsum(f"{inputs[0]},{inputs[1]}->{kept}", *given[:2])
        else:
            made = _of_letters(ctx, equation, given[:2], inputs[:2], kept)
        given, inputs = [made, *given[2:]], [kept, *inputs[2:]]
    apart = _parts_apart(ctx, given, inputs, output)
    if apart is not None:
        joined = _of_letters(ctx, equation, *apart)
        whole = views.reshaped(ctx, joined, ctx.result_sizes)
        assert whole is not None  # axes that are put together always fit
        return whole
    return _of_letters(ctx, equation, given, inputs, output)


def _parts_apart(
    ctx: Lowering, given: list[Any], inputs: list[str], output: str
) -> tuple[list[Any], list[str], str] | None:
    """Operands and letters with parts of samples, that lie in one axis with the batch, in an axis
    of their own; None where there are none."""
    for x, letters in zip(given, inputs, strict=True):
        count = parts_of(ctx, x)
        if count is None or not isinstance(count, int):
            continue
        letter, taken = letters[0], {*"".join(inputs), *output}
        new = next(chr(code) for code in range(ord("A"), 0x10000) if chr(code) not in taken)
        operands = []
        for each, its in zip(given, inputs, strict=True):
            if letter in its and is_activation(each):
                sizes = list(views.sizes_of(ctx, each))
                place = its.index(letter)
                sizes[place : place + 1] = [ctx.batch, count]
                made = views.reshaped(ctx, each, tuple(sizes))
                if made is None:
                    return None
                operands.append(made)
            elif letter in its:
                return None
            else:
                operands.append(each)
        every = [its.replace(letter, letter + new) for its in (*inputs, output)]
        return operands, every[:-1], every[-1]
    return None


def _of_letters(
    ctx: Lowering, equation: str, given: list[Any], inputs: list[str], output: str
) -> Ref | View:
    if len(given) == 1:
        return _summed(ctx, given[0], inputs[0], output)
    if not is_activation(given[0]):
        given, inputs = given[::-1], inputs[::-1]
    a, b = given
    first, second = inputs
    # what only one of them has, and the result has not
    extra = [x for x in first if x not in second and x not in output]
    if extra:
        kept = "".join(x for x in first if x not in extra)
        a, first = _summed(ctx, a, first, kept), kept
    if any(x not in first and x not in output for x in second):
        raise UnsupportedUse(
            f"einsum {equation!r} adds up an axis of one operand alone; add it up before"
        )
    return _einsum_of_two(ctx, equation, a, first, b, second, output)


def _einsum_of_two(
    ctx: Lowering, equation: str, a: Any, first: str, b: Any, second: str, output: str
) -> Ref | View:
    x = activation(ctx, a)
    sizes = dict(zip(first, views.sizes_of(ctx, x), strict=True))
    batch = next((letter for letter, size in sizes.items() if size == ctx.batch), None)
    if batch is None or batch not in output:
        raise UnsupportedUse(f"einsum {equation!r} adds up the batch; keep samples apart")
    if is_activation(b):
        sizes |= dict(zip(second, views.sizes_of(ctx, b), strict=True))
        if batch not in second:
            raise UnsupportedUse(
                f"einsum {equation!r} multiplies every sample with every other; keep samples apart"
            )
    else:
        if batch in second and b.shape[second.index(batch)] == 1:  # the same for every sample
            b, second = b.squeeze(second.index(batch)), second.replace(batch, "")
        sizes |= dict(zip(second, b.shape, strict=True))
        if batch in second:
            raise UnsupportedUse(
                f"einsum {equation!r} gives the batch of a constant; give it a size of 1 there"
            )
    shared = [x for x in first if x in second and x in output]
    summed = [x for x in first if x in second and x not in output]
    rows = [x for x in first if x not in second]
    columns = [x for x in second if x not in first]
    if not is_activation(b):
        weight = b.float().permute([second.index(x) for x in (*shared, *summed, *columns)])
        count = len(shared)
        if not shared:  # a layer
            weight = weight.reshape(math.prod(sizes[x] for x in summed), -1)
            moved = _merged(ctx, x, first, [[r] for r in rows] + [summed], sizes)
            made = matmul(ctx, moved, weight, (*(sizes[r] for r in rows), weight.shape[1]))
            return _ordered(ctx, made, [*rows, *columns], output, sizes)
        like = base_of(x)
        shape = weight.shape
        weight = weight.reshape(
            1, *shape[:count], math.prod(shape[count : count + len(summed)]), -1
        )
        right: Ref | View = constant(ctx, weight, like, weight.ndim)
        rows, shared = _but(rows, batch), [batch, *shared]
        left = _merged(ctx, x, first, [*([s] for s in shared), rows, summed], sizes)
    else:
        shared = [batch, *_but(shared, batch)]
        left = _merged(ctx, x, first, [*([s] for s in shared), rows, summed], sizes)
        right = _merged(ctx, b, second, [*([s] for s in shared), summed, columns], sizes)
    total = (*(sizes[s] for s in shared), _size(sizes, rows), _size(sizes, columns))
    made = product(ctx, views.view_of(ctx, left), views.view_of(ctx, right), total)
    return _ordered(ctx, made, [*shared, *rows, *columns], output, sizes)


def _but(letters: list[str], letter: str) -> list[str]:
    return [each for each in letters if each != letter]


def _size(sizes: dict[str, Any], letters: list[str]) -> Any:
    result: Any = 1
    for letter in letters:
        result = result * sizes[letter]
    return result


def _merged(
    ctx: Lowering, x: Ref | View, letters: str, groups: list[list[str]], sizes: dict[str, Any]
) -> Ref | View:
    """An operand with its axes in groups, each of which becomes one axis."""
    order = [letters.index(letter) for group in groups for letter in group]
    turned = views.permuted(ctx, x, order)
    made = views.reshaped(ctx, turned, tuple(_size(sizes, group) for group in groups))
    assert made is not None  # axes that are put together always fit
    return made


def _ordered(
    ctx: Lowering, x: Ref | View, letters: list[str], output: str, sizes: dict[str, Any]
) -> Ref | View:
    """A result with each of its axes for itself, in the order that is wanted."""
    apart = views.reshaped(ctx, x, tuple(sizes[letter] for letter in letters))
    if apart is None:
        raise UnsupportedUse("it cuts up axes whose sizes are known at run time only")
    return views.permuted(ctx, apart, [letters.index(letter) for letter in output])


def _summed(ctx: Lowering, x: Any, letters: str, output: str) -> Ref | View:
    """One operand with some axes added up, and the others in another order."""
    made = activation(ctx, x)
    dims = [axis for axis, letter in enumerate(letters) if letter not in output]
    if dims:
        made = reduced(
            ctx, made, dims, False, "it adds up", lambda ref, a, k: emit_sum(ctx, ref, a, k)
        )
    kept = [letter for letter in letters if letter in output]
    return views.permuted(ctx, made, [kept.index(letter) for letter in output])


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The letters of the operands and of the result, with those that dots stand for."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    unused = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in equation]
    most = max(
        (rank - len(each) + 3 for each, rank in zip(inputs, ranks, strict=True) if "..." in each),
        default=0,
    )
    dots = "".join(unused[:most])

    def without_dots(letters: str, rank: int) -> str:
        count = rank - len(letters) + 3
        return letters.replace("...", dots[len(dots) - count :] if count else "")

    inputs = [without_dots(each, rank) for each, rank in zip(inputs, ranks, strict=True)]
    if not arrow:
        every = "".join(inputs)
        once = sorted(x for x in set(every) if every.count(x) == 1 and x not in dots)
        output = dots + "".join(once)
    return inputs, output.replace("...", dots)
