"""Ridge regression whose weight is chosen by rows that are held out.

`Ridge` has sums over the rows; `RowRidge` the rows themselves, and solves a system of so many
equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lutra.train import distributed as collective

#: Weights that are tried, relative to the mean square of a feature over all rows.
WEIGHTS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
_HELD = 4  # one row in so many is held out
_LEAST = 1e-6  # weight that is always there
_WORSE = 2  # so many smaller weights that are worse end the search
_JUDGED = 64  # outputs that the weight is chosen by, of a layer that has more

#: From moments (P, M), or values (n, M), to coefficients.
_Solver = Callable[[Tensor], Tensor]


def held_out(rows: int) -> list[slice]:
    """The rows that are fitted and those that are held out: the last, of other samples."""
    first = rows - rows // _HELD
    return [slice(0, first), slice(first, rows)]


class _Chosen:
    """What both have: a weight, chosen or taken.

    Attributes:
        weight: of the ridge, relative to the mean square of a feature.
    """

    weight = 0.0
    _solver: _Solver | None = None

    def _fit(self, weight: float, *, whole: bool) -> _Solver | None:
        """What solves for the fitted rows, or for all; None where the damped matrix is not positive
        definite in numbers."""
        raise NotImplementedError

    def _choose(
        self, weights: Sequence[float], share: float, error: Callable[[_Solver], float]
    ) -> None:
        """Takes the weight whose solver has the least error, relative to no change at all.

        Args:
            weights: that are tried, largest first.
            share: of the sum of squares that the fitted rows have.
            error: of the rows that are held out.
        """
        best, worse = 0.0, 0
        self.weight = weights[0] * 100.0
        for weight in weights:
            solver = self._fit(weight * share, whole=False)
            if solver is None:
                break
            found = error(solver)
            if found < best:
                best, self.weight, worse = found, weight, 0
            elif self.weight in weights and (worse := worse + 1) == _WORSE:
                break
        self.take(self.weight)

    def take(self, weight: float) -> None:
        """Takes a weight, or the least power of ten above it that rounding allows."""
        self.weight = weight
        while (solver := self._fit(self.weight, whole=True)) is None:
            self.weight *= 10.0
        self._solver = solver


class Ridge(_Chosen):
    """Least squares of many outputs on the same features, from sums over the rows.

    Args:
        gram: products F'F (P, P) of the features of each part of `held_out`.

    Attributes:
        gram: their sum over all processes, float64.
    """

    def __init__(self, gram: Sequence[Tensor]) -> None:
        self._parts = [collective.all_reduce(part).double() for part in gram]
        self.gram = self._parts[0] + self._parts[1]
        self._trace = float(self.gram.trace())

    def choose(
        self, moments: Sequence[Tensor], outputs: Tensor, weights: Sequence[float] = WEIGHTS
    ) -> None:
        """Takes the weight with the least squared error on the rows that are held out.

        Weights that are smaller than the rounding of the sums are left out: fewer rows than
        features, with one direction far above the others, as behind GELU. Of layers with many
        outputs some are looked at: solving for all of them costs as much as the rest.

        Args:
            moments: F'y (P, M) of each part.
            outputs: what an error of each output counts (M).
            weights: that are tried, largest first.
        """
        every = _every(outputs)
        counts = outputs[every].double()
        some = [part[:, every].clone(memory_format=torch.contiguous_format) for part in moments]
        fitted, held = (collective.all_reduce(part).double() for part in some)

        def error(solver: _Solver) -> float:
            change = solver(fitted)
            return float((change * (self._parts[1] @ change - 2.0 * held)).sum(0) @ counts)

        share = float(self._parts[0].trace()) / max(self._trace, 1e-30)
        self._choose(weights, share, error)

    def solve(self, moments: Sequence[Tensor], start: Tensor | None = None) -> Tensor:
        """The change (P, M) of coefficients that fits the moments of the rest.

        Args:
            moments: F'(y - F start) (P, M) of each part.
            start: coefficients so far, which are drawn to zero as well (P, M).
        """
        assert self._solver is not None
        total = collective.all_reduce(moments[0] + moments[1]).double()
        if start is not None:
            total -= (self.weight + _LEAST) * self._trace / len(self.gram) * start.double()
        return self._solver(total).float()

    def _fit(self, weight: float, *, whole: bool) -> _Solver | None:
        damping = (weight + _LEAST) * self._trace / len(self.gram) + 1e-30
        factor = _cholesky(self.gram if whole else self._parts[0], damping)
        return None if factor is None else lambda moments: torch.cholesky_solve(moments, factor)


class RowRidge(_Chosen):
    """The same regression, with coefficients F'c that are given by c, one value for each row.

    Args:
        features: F (n, P), float64.
    """

    def __init__(self, features: Tensor) -> None:
        self._products = features @ features.t()
        self._depth = features.shape[1]
        self._trace = float(self._products.trace())
        self._fitted, self._held = held_out(len(features))

    def choose(self, rest: Tensor, outputs: Tensor, weights: Sequence[float] = WEIGHTS) -> None:
        """Takes the weight with the least squared error on the rows that are held out.

        Args:
            rest: values (n, M) that are fitted.
            outputs: what an error of each output counts (M).
            weights: that are tried, largest first.
        """
        every = _every(outputs)
        some, counts = rest[:, every].double(), outputs[every].double()
        across = self._products[self._held, self._fitted]

        def error(solver: _Solver) -> float:
            found = across @ solver(some[self._fitted])
            return float((found * (found - 2.0 * some[self._held])).sum(0) @ counts)

        part = self._products.diagonal()[self._fitted]
        self._choose(weights, float(part.sum()) / max(self._trace, 1e-30), error)

    def solve(self, rest: Tensor, start: Tensor | None = None) -> Tensor:
        """The change (n, M) of c, float64, for the values (n, M) that c = `start` leaves."""
        assert self._solver is not None
        rest = rest.double()
        if start is not None:
            rest = rest - (self.weight + _LEAST) * self._trace / self._depth * start
        return self._solver(rest)

    def _fit(self, weight: float, *, whole: bool) -> _Solver | None:
        # (F'F + d)^-1 F' = F' (FF' + d)^-1
        damping = (weight + _LEAST) * self._trace / self._depth + 1e-30
        part = slice(None) if whole else self._fitted
        factor = _cholesky(self._products[part, part], damping)
        return None if factor is None else lambda rest: torch.cholesky_solve(rest, factor)


def _every(outputs: Tensor) -> slice:
    """The outputs that a weight is chosen by."""
    return slice(None, None, max(1, -(-len(outputs) // _JUDGED)))


def _cholesky(matrix: Tensor, damping: float) -> Tensor | None:
    """The factor of a matrix with something added to its diagonal, if there is one."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if int(failed) else factor
