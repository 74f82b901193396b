"""The products X'X of the inputs of a layer: as a matrix, or as the rows where these are few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import Tensor

from lutra.train import distributed

_FEW: Final = 0.25  # rows for each input up to which the rows are kept


def are_few(rows: int, depth: int) -> bool:
    """Whether to compute with rows in place of their products: a system of so many equations is
    solved in place of one of the inputs. Rows of other processes are not here."""
    return rows <= _FEW * depth and not distributed.active()


@dataclass(frozen=True)
class Products:
    """X'X, of one of two forms.

    Attributes:
        matrix: (D, D) float64.
        rows: X (n, D) float64.
    """

    matrix: Tensor | None = None
    rows: Tensor | None = None

    def diagonal(self) -> Tensor:
        """The sums of squares (D) float64."""
        if self.rows is not None:
            return self.rows.square().sum(0)
        assert self.matrix is not None
        return self.matrix.diagonal()
