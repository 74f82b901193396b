"""Operators that are written in others that have lowerings: of choices, counts, bits and sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

_aten = torch.ops.aten


def _one_hot(self: Tensor, num_classes: int = -1) -> Any:
    if num_classes < 0:
        return NotImplemented
    numbers = torch.arange(num_classes, device=self.device)
    return (self.unsqueeze(-1) == numbers).to(torch.int64)


def _isin(
    elements: Tensor, test_elements: Tensor, assume_unique: bool = False, invert: bool = False
) -> Tensor:
    found = (elements.unsqueeze(-1) == test_elements.reshape(-1)).any(-1)
    return found.logical_not() if invert else found


def _mode(self: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The value that most others equal, the smallest of several, and the last place it has."""
    x = self.movedim(dim, -1)
    counts = (x.unsqueeze(-1) == x.unsqueeze(-2)).to(torch.float32).sum(-1)
    most = counts == counts.amax(-1, keepdim=True)
    values = torch.where(most, x, x.amax(-1, keepdim=True)).amin(-1, keepdim=True)
    numbers = torch.arange(x.shape[-1], device=x.device)
    places = torch.where(x == values, numbers, -1).amax(-1, keepdim=True)
    if keepdim:
        return values.movedim(-1, dim), places.movedim(-1, dim)
    return values.squeeze(-1), places.squeeze(-1)


def _logcumsumexp(self: Tensor, dim: int) -> Any:
    size = self.shape[dim]
    if not isinstance(size, int):
        return NotImplemented
    made, step = self, 1
    while step < size:  # of the last 2, of the last 4, and so on
        whole = made.narrow(dim, step, size - step)
        before = made.narrow(dim, 0, size - step)
        more = torch.logaddexp(whole, before)
        made = torch.cat([made.narrow(dim, 0, step), more], dim)
        step *= 2
    return made


# ---- bits of integers ---------------------------------------------------------------------------


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _shifted_right(self: Tensor, other: Any) -> Any:
    if not isinstance(other, Tensor) and not _is_whole(other):
        return NotImplemented
    power = 2**other if _is_whole(other) else torch.exp2(other.to(torch.float32)).round()
    return torch.div(self, power, rounding_mode="floor").to(self.dtype)


def _shifted_left(self: Tensor, other: Any) -> Any:
    if not isinstance(other, Tensor) and not _is_whole(other):
        return NotImplemented
    power = 2**other if _is_whole(other) else torch.exp2(other.to(torch.float32)).round()
    return (self * power).to(self.dtype)


def _bits_of_both(self: Tensor, other: Any) -> Any:
    """The bits of integers that a number has too."""
    if self.dtype == torch.bool or not _is_whole(other):
        return NotImplemented
    if (other + 1) & other == 0:  # all low bits
        return self.remainder(other + 1)
    total = torch.zeros_like(self)
    for bit in range(other.bit_length()):
        if other >> bit & 1:
            one = torch.div(self, 1 << bit, rounding_mode="floor").remainder(2)
            total = total + one * (1 << bit)
    return total


def _bits_of_any(self: Tensor, other: Any) -> Any:
    both = _bits_of_both(self, other)
    return both if both is NotImplemented else self + other - both


def _bits_of_one(self: Tensor, other: Any) -> Any:
    both = _bits_of_both(self, other)
    return both if both is NotImplemented else self + other - 2 * both


#: Written for activations and for what is computed from integer inputs.
OF_INTEGERS: Final[dict[Any, Callable[..., Any]]] = {
    _aten.one_hot.default: _one_hot,
    _aten.isin.Tensor_Tensor: _isin,
    _aten.mode.default: _mode,
    _aten.__rshift__.Scalar: _shifted_right,
    _aten.__rshift__.Tensor: _shifted_right,
    _aten.bitwise_right_shift.Tensor_Scalar: _shifted_right,
    _aten.bitwise_right_shift.Tensor: _shifted_right,
    _aten.__lshift__.Scalar: _shifted_left,
    _aten.__lshift__.Tensor: _shifted_left,
    _aten.bitwise_left_shift.Tensor_Scalar: _shifted_left,
    _aten.bitwise_left_shift.Tensor: _shifted_left,
    _aten.__and__.Scalar: _bits_of_both,
    _aten.bitwise_and.Scalar: _bits_of_both,
    _aten.__or__.Scalar: _bits_of_any,
    _aten.bitwise_or.Scalar: _bits_of_any,
    _aten.__xor__.Scalar: _bits_of_one,
    _aten.bitwise_xor.Scalar: _bits_of_one,
}
#: What is written for each operator; NotImplemented leaves it as it is.
WRITTEN: Final[dict[Any, Callable[..., Any]]] = {
    **OF_INTEGERS,
    _aten.logcumsumexp.default: _logcumsumexp,
}
