"""What a recipe will lose and cost: a sum over its layers, corrected by what was measured.

Layer by layer errors mislead when they are added up, and layers are faster or slower in their
network than alone. So the terms of the sum are unknowns with a prior, and every recipe that was
measured as a whole is an observation of a sum of some of them: Bayesian linear regression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lutra.node import Array

#: A layer and the key of what it becomes.
Term = tuple[str, str]


@dataclass(frozen=True)
class Belief:
    """What is known of a number: a mean, and how far it may be off."""

    mean: float
    deviation: float


class SumModel:
    """A value of a recipe as a constant and a term for each layer.

    Args:
        prior: of every term; layers whose term is not here add nothing.
        constant: prior of the constant.
    """

    def __init__(self, prior: Mapping[Term, Belief], constant: Belief) -> None:
        self._place = {term: i + 1 for i, term in enumerate(prior)}
        beliefs = [constant, *prior.values()]
        self._mean = np.array([belief.mean for belief in beliefs], np.float64)
        self._covariance = np.diag([max(b.deviation, 1e-12) ** 2 for b in beliefs])

    def observe(self, choices: Sequence[Mapping[str, str]], values: Sequence[Belief]) -> None:
        """Learns from recipes that were measured.

        Args:
            choices: the key of each layer, for each recipe.
            values: what was measured, and how exactly.
        """
        if not choices:
            return
        rows = np.stack([self._row(choice) for choice in choices])
        noise = np.diag([max(value.deviation, 1e-12) ** 2 for value in values])
        measured = np.array([value.mean for value in values], np.float64)
        shared = self._covariance @ rows.T
        gain = np.linalg.solve(rows @ shared + noise, shared.T).T
        self._mean = self._mean + gain @ (measured - rows @ self._mean)
        covariance = self._covariance - gain @ shared.T
        self._covariance = (covariance + covariance.T) / 2

    def predict(self, choice: Mapping[str, str]) -> Belief:
        """The value of a recipe."""
        row = self._row(choice)
        variance = max(0.0, float(row @ self._covariance @ row))
        return Belief(float(row @ self._mean), variance**0.5)

    @property
    def constant(self) -> float:
        """The part of the value that no layer has."""
        return float(self._mean[0])

    def terms(self, rng: np.random.Generator | None = None) -> dict[Term, float]:
        """The mean of every term, or with random numbers one draw from what is believed."""
        values = self._mean
        if rng is not None:
            values = rng.multivariate_normal(self._mean, self._covariance, method="eigh")
        return {term: float(values[i]) for term, i in self._place.items()}

    def _row(self, choice: Mapping[str, str]) -> Array:
        row = np.zeros(len(self._mean))
        row[0] = 1.0
        for term in choice.items():
            place = self._place.get(term)
            if place is not None:
                row[place] = 1.0
        return row
