"""Ridge regression whose weight is chosen by rows that are held out, from sums over the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from lutra.train import distributed as collective

#: Weights that are tried, relative to the mean square of a feature over all rows.
WEIGHTS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
_HELD = 4  # one row in so many is held out
_LEAST = 1e-6  # weight that is always there
_WORSE = 2  # so many smaller weights that are worse end the search
_JUDGED = 64  # outputs that the weight is chosen by, of a layer that has more
_FEW: Final = 0.25  # rows for each feature up to which the rows are solved for

#: From moments (P, M) to coefficients (P, M).
Solver = Callable[[Tensor], Tensor]


def held_out(rows: int) -> list[slice]:
    """The rows that are fitted and those that are held out: the last, of other samples."""
    first = rows - rows // _HELD
    return [slice(0, first), slice(first, rows)]


class Ridge:
    """Least squares of many outputs on the same features.

    Args:
        gram: products F'F (P, P) of the features of each part of `held_out`.
        features: F (n, P) of each part. Where there are few rows, and one process, a system of so
            many equations is solved in place of one of P.

    Attributes:
        gram: their sum over all processes, float64.
        weight: that `choose` took.
    """

    def __init__(self, gram: Sequence[Tensor], features: Sequence[Tensor] | None = None) -> None:
        self._parts = [collective.all_reduce(part).double() for part in gram]
        self.gram = self._parts[0] + self._parts[1]
        self._unit = float(self.gram.trace()) / len(self.gram)
        self._solver: Solver | None = None
        self._rows: list[Tensor] | None = None
        few = features is not None and sum(map(len, features)) <= _FEW * len(self.gram)
        if features is not None and few and not collective.active():
            self._rows = [part.double() for part in features]
        self.weight = 0.0

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
        every = -(-len(outputs) // _JUDGED)
        outputs = outputs[::every].double()
        some = [part[:, ::every].clone(memory_format=torch.contiguous_format) for part in moments]
        fitted, held = (collective.all_reduce(part).double() for part in some)
        share = float(self._parts[0].trace()) / max(float(self.gram.trace()), 1e-30)
        best, worse = 0.0, 0  # the error of no change at all
        self.weight = weights[0] * 100.0
        for weight in weights:
            solver = self._fit(weight * share, whole=False)
            if solver is None:
                break
            change = solver(fitted)
            errors = (change * (self._held(change) - 2.0 * held)).sum(0)
            error = float(errors @ outputs)
            if error < best:
                best, self.weight, worse = error, weight, 0
            elif self.weight in weights and (worse := worse + 1) == _WORSE:
                break
        self.take(self.weight)

    def take(self, weight: float) -> None:
        """Takes a weight, or the least power of ten above it that rounding allows."""
        self.weight = weight
        while (solver := self._fit(self.weight, whole=True)) is None:
            self.weight *= 10.0
        self._solver = solver

    def _held(self, change: Tensor) -> Tensor:
        """F'F of the rows that are held out, times coefficients."""
        if self._rows is None:
            return self._parts[1] @ change
        return self._rows[1].t() @ (self._rows[1] @ change)

    def _fit(self, weight: float, *, whole: bool) -> Solver | None:
        """What solves for the fitted rows, or for all; None where the damped matrix is not positive
        definite in numbers."""
        damping = (weight + _LEAST) * self._unit + 1e-30
        if self._rows is None:
            factor = _cholesky(self.gram if whole else self._parts[0], damping)
            return None if factor is None else lambda moments: torch.cholesky_solve(moments, factor)
        # (F'F + d)^-1 = (1 - F' (FF' + d)^-1 F) / d
        rows = torch.cat(self._rows) if whole else self._rows[0]
        inner = _cholesky(rows @ rows.t(), damping)
        if inner is None:
            return None

        def solve(moments: Tensor) -> Tensor:
            return (moments - rows.t() @ torch.cholesky_solve(rows @ moments, inner)) / damping

        return solve

    def solve(self, moments: Sequence[Tensor], start: Tensor | None = None) -> Tensor:
        """The change (P, M) of coefficients that fits the moments of the rest.

        Args:
            moments: F'(y - F start) (P, M) of each part.
            start: coefficients so far, which are drawn to zero as well (P, M).
        """
        assert self._solver is not None
        total = collective.all_reduce(moments[0] + moments[1]).double()
        if start is not None:
            total -= (self.weight + _LEAST) * self._unit * start.double()
        return self._solver(total).float()


def _cholesky(matrix: Tensor, damping: float) -> Tensor | None:
    """The factor of a matrix with something added to its diagonal, if there is one."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if int(failed) else factor
