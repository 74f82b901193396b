"""Functions of one number that no operator of the graph is, written in those that are.

Each has the error of float32 sums, about 1e-6 of its largest term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

_aten = torch.ops.aten
#: Numbers below are moved up by as much, to where the series of lgamma and its derivatives holds.
_SHIFT: Final = 8
#: Giles, "Approximating the erfinv function" (2010): erfinv(x) / x in w - 2.5 for
#: w = -log(1 - x^2) below 5, and in sqrt(w) - 3 above.
_ERFINV_MIDDLE: Final = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
_ERFINV_ENDS: Final = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip
#: Press et al., "Numerical Recipes", 6.2.2: log(erfc(z) / t) + z^2 in t = 1 / (1 + z / 2).
_ERFC: Final = (
    0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418,
    0.37409196, 1.00002368, -1.26551223,
)  # fmt: skip
#: Abramowitz and Stegun, "Handbook of Mathematical Functions", 9.8.1 to 9.8.4: I0(x) and I1(x) / x
#: in (x / 3.75)^2 below 3.75, and sqrt(x) e^-x of them in 3.75 / x above.
_I0_SMALL: Final = (0.0045813, 0.0360768, 0.2659732, 1.2067492, 3.0899424, 3.5156229, 1.0)
_I0_LARGE: Final = (
    0.00392377, -0.01647633, 0.02635537, -0.02057706, 0.00916281, -0.00157565, 0.00225319,
    0.01328592, 0.39894228,
)  # fmt: skip
_I1_SMALL: Final = (0.00032411, 0.00301532, 0.02658733, 0.15084934, 0.51498869, 0.87890594, 0.5)
_I1_LARGE: Final = (
    -0.00420059, 0.01787654, -0.02895312, 0.02282967, -0.01031555, 0.00163801, -0.00362018,
    -0.03988024, 0.39894228,
)  # fmt: skip


def _powers(x: Tensor, factors: Sequence[float]) -> Tensor:
    """A polynomial, its highest power first."""
    total = x * factors[0] + factors[1]
    for factor in factors[2:]:
        total = total * x + factor
    return total


def _moved_up(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers above 0 moved to 8 and more, and whether they were."""
    small = x < float(_SHIFT)
    return torch.where(small, x + float(_SHIFT), x), small


def _turned(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers turned over at 1/2, which were below it, and how far each is from a whole one."""
    low = x < 0.5
    return torch.where(low, 1.0 - x, x), low, x - x.round()


def _lgamma(self: Tensor) -> Tensor:
    """Stirling's series; below 1/2 by lgamma(x) = log(pi / |sin(pi x)|) - lgamma(1 - x)."""
    x, low, part = _turned(self)
    z, small = _moved_up(x)
    inverse = z.reciprocal()
    series = inverse * _powers(inverse * inverse, (1 / 1260, -1 / 360, 1 / 12))
    made = (z - 0.5) * z.log() - z + 0.5 * math.log(2 * math.pi) + series
    near = torch.where(small, x, torch.ones_like(x))
    product = near
    for step in range(1, _SHIFT):
        product = product * (near + float(step))
    made = torch.where(small, made - product.log(), made)
    other = math.log(math.pi) - (part * math.pi).sin().abs().log() - made
    return torch.where(low, other, made)


def _digamma(self: Tensor) -> Tensor:
    """The series; below 1/2 by digamma(x) = digamma(1 - x) - pi / tan(pi x)."""
    x, low, part = _turned(self)
    z, small = _moved_up(x)
    inverse = z.reciprocal()
    square = inverse * inverse
    series = square * _powers(square, (-1 / 252, 1 / 120, -1 / 12))
    made = z.log() - 0.5 * inverse + series
    near = torch.where(small, x, torch.ones_like(x))
    total = near.reciprocal()
    for step in range(1, _SHIFT):
        total = total + (near + float(step)).reciprocal()
    made = torch.where(small, made - total, made)
    angle = part * math.pi
    return torch.where(low, made - angle.cos() / angle.sin() * math.pi, made)


def _polygamma(n: int, self: Tensor) -> Any:
    """Of 0 and 1, the latter by trigamma(1 - x) + trigamma(x) = (pi / sin(pi x))^2."""
    if n == 0:
        return _digamma(self)
    if n != 1:
        return NotImplemented
    x, low, part = _turned(self)
    z, small = _moved_up(x)
    inverse = z.reciprocal()
    square = inverse * inverse
    made = inverse + 0.5 * square + inverse * square * _powers(square, (1 / 42, -1 / 30, 1 / 6))
    near = torch.where(small, x, torch.ones_like(x))
    total = torch.zeros_like(near)
    for step in range(_SHIFT):
        one = (near + float(step)).reciprocal()
        total = total + one * one
    made = torch.where(small, made + total, made)
    ratio = math.pi / (part * math.pi).sin()
    return torch.where(low, ratio * ratio - made, made)


def _mvlgamma(self: Tensor, p: int) -> Tensor:
    total = _lgamma(self)
    for step in range(1, p):
        total = total + _lgamma(self - step / 2)
    return total + p * (p - 1) / 4 * math.log(math.pi)


def _erfinv_of(x: Tensor, w: Tensor) -> Tensor:
    """By x and -log(1 - x^2)."""
    middle = _powers(w.clamp(max=5.0) - 2.5, _ERFINV_MIDDLE)
    ends = _powers(w.clamp(min=5.0).sqrt() - 3.0, _ERFINV_ENDS)
    return torch.where(w < 5.0, middle, ends) * x


def _erfinv(self: Tensor) -> Tensor:
    made = _erfinv_of(self, -((1.0 - self) * (1.0 + self)).log())
    end = torch.where(self > 0.0, math.inf, -math.inf)
    return torch.where(self.abs() == 1.0, end, made)


def _ndtri(self: Tensor) -> Tensor:
    x = 2.0 * self - 1.0
    made = math.sqrt(2) * _erfinv_of(x, -(4.0 * self * (1.0 - self)).log())
    # two of Newton's steps on log(ndtr) where 2 p - 1 has lost p
    log = self.log()
    far = (-2.0 * log.clamp(max=-1.0)).sqrt()
    z = (far.log() + 0.5 * math.log(2 * math.pi)) / far - far
    for _ in range(2):
        at = _log_ndtr(z)
        slope = (-0.5 * z * z - 0.5 * math.log(2 * math.pi) - at).exp()
        z = z - (at - log) / slope
    made = torch.where(self < 1e-6, z, made)
    end = torch.where(x > 0.0, math.inf, -math.inf)
    return torch.where((self == 0.0) | (self == 1.0), end, made)


def _log_ndtr(self: Tensor) -> Tensor:
    """log(erfc(z) / 2) with z = -x / sqrt(2), in a form without large or small numbers."""
    z = self.abs() * math.sqrt(0.5)
    t = (1.0 + 0.5 * z).reciprocal()
    below = t.log() - z * z + _powers(t, _ERFC) - math.log(2)
    return torch.where(self < 0.0, below, (1.0 - below.exp()).log())


def _bessel(x: Tensor, small: Sequence[float], large: Sequence[float], scaled: bool) -> Tensor:
    size = x.abs()
    near = size.clamp(max=3.75)
    inner = _powers((near / 3.75).square(), small)
    if scaled:
        inner = inner * (-near).exp()
    far = size.clamp(min=3.75)
    outer = _powers(3.75 / far, large) / far.sqrt()
    return torch.where(size < 3.75, inner, outer if scaled else outer * far.exp())


def _i0(self: Tensor) -> Tensor:
    return _bessel(self, _I0_SMALL, _I0_LARGE, scaled=False)


def _i0e(self: Tensor) -> Tensor:
    return _bessel(self, _I0_SMALL, _I0_LARGE, scaled=True)


def _i1_of(x: Tensor, scaled: bool) -> Tensor:
    # below 3.75 it is the function over x, above it the function of |x|
    made = _bessel(x, _I1_SMALL, _I1_LARGE, scaled)
    return made * torch.where(x.abs() < 3.75, x, x.sign())


def _i1(self: Tensor) -> Tensor:
    return _i1_of(self, scaled=False)


def _i1e(self: Tensor) -> Tensor:
    return _i1_of(self, scaled=True)


def _ldexp(self: Tensor, other: Tensor) -> Tensor:
    return self * torch.exp2(other.to(self.dtype))


#: What is written for each operator; NotImplemented leaves it as it is.
WRITTEN: Final[dict[Any, Callable[..., Any]]] = {
    _aten.lgamma.default: _lgamma,
    _aten.special_gammaln.default: _lgamma,
    _aten.digamma.default: _digamma,
    _aten.special_digamma.default: _digamma,
    _aten.special_psi.default: _digamma,
    _aten.polygamma.default: _polygamma,
    _aten.mvlgamma.default: _mvlgamma,
    _aten.special_multigammaln.default: _mvlgamma,
    _aten.erfinv.default: _erfinv,
    _aten.special_erfinv.default: _erfinv,
    _aten.special_ndtri.default: _ndtri,
    _aten.special_log_ndtr.default: _log_ndtr,
    _aten.i0.default: _i0,
    _aten.special_i0.default: _i0,
    _aten.special_i0e.default: _i0e,
    _aten.special_i1.default: _i1,
    _aten.special_i1e.default: _i1e,
    _aten.ldexp.Tensor: _ldexp,
}
