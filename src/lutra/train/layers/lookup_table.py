"""The response table of a lookup layer: what a product of activation and weight becomes.

The table T (N_f, N_w) is made of monotone pieces (Deep Lookup Network, arXiv 2509.13662):
cumulative sums of softmaxes, zero at the indices that stand for zero. At the start all of it is
linear, so that T is the exact product table. Index `zero` of the activations and the middle one of
the weights stand for zero; the largest of both for 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lutra.ops.limits import INT8_MAX
from lutra.train.recipe import Lookup

_SPREAD = 0.5  # how far the components of a table of higher rank are apart at the start

#: Range that the entries of one weight may span, by activation bits: the kernels add up
#: floor(255 / range) of them in a byte (of pairs, at two bits).
_RANGES = {2: 15, 3: 63}
_RANGE = 127


class Levels(NamedTuple):
    """A table and what stands for it in the gradients of its operands.

    `table` (N_f, N_w); `activation` (N_f) and `weight` (N_w), the values that an index stands for,
    such that table ~ activation x weight, exactly so for rank 1.
    """

    table: Tensor
    activation: Tensor
    weight: Tensor


def activation_steps(levels: int, zero: int, device: torch.device | None = None) -> Tensor:
    """The linear activation levels (N_f): index `levels - 1` is 1, index `zero` is 0."""
    steps = torch.arange(levels, dtype=torch.float32, device=device) - zero
    return steps / (levels - 1 - zero)


def weight_steps(weights: int, device: torch.device | None = None) -> Tensor:
    """The linear weight levels (N_w), from -1 to 1."""
    half = weights // 2
    return (torch.arange(weights, dtype=torch.float32, device=device) - half) / half


def default_entries(method: Lookup, zero: int) -> int:
    """The integer that the largest entry becomes; see `Lookup.entries`."""
    top = method.levels - 1 - zero
    product = top * (method.weights // 2)
    reach = (method.levels - 1) / top  # of the levels, from the lowest to the highest
    most = _RANGES.get(method.act_bits, _RANGE) / reach
    return min(int(most // product) * product or product, int(INT8_MAX * top / max(zero, top)))


class Response(nn.Module):
    """The table of one layer, with its parameters."""

    temperature: Tensor

    def __init__(self, method: Lookup, device: torch.device | None = None) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("temperature", torch.tensor(method.temperature[0], device=device))
        half = method.weights // 2
        if method.table == "free":
            shape = (method.levels, method.weights)
            #: what the table has beyond the products
            self.residual = nn.Parameter(torch.zeros(shape, device=device))
        elif method.table == "learned":
            steps = torch.zeros(method.rank, method.levels - 1, device=device)
            self.activation_logits = nn.Parameter(steps)
            self.weight_logits = nn.Parameter(torch.zeros(method.rank, 2, half, device=device))
        self.start(0)

    @torch.no_grad()
    def start(self, zero: int) -> None:
        """Makes the table the products of linear levels, for activations with this zero."""
        if self.method.table == "free":
            self.residual.zero_()
        elif self.method.table == "learned":
            self.weight_logits.zero_()
            for steps in (self.activation_logits[:, :zero], self.activation_logits[:, zero:]):
                steps.copy_(_apart(*steps.shape))

    def anneal(self, progress: float) -> None:
        """Sets the temperature for a point of the training, 0..1."""
        start, end = self.method.temperature
        self.temperature.fill_(start * (end / start) ** min(max(progress, 0.0), 1.0))

    def forward(self, zero: int, device: torch.device | None = None) -> Levels:
        """The table for activations whose zero has this index."""
        method = self.method
        if method.table == "learned":
            activation, weight = self._activation_levels(zero), self._weight_levels()
            table = torch.einsum("rf,rw->fw", activation, weight) / method.rank
            if method.rank == 1:
                return Levels(table, activation[0], weight[0])
        else:
            activation = activation_steps(method.levels, zero, device)
            weight = weight_steps(method.weights, device)
            table = torch.outer(activation, weight)
            if method.table == "linear":
                return Levels(table, activation, weight)
            table = table + self.residual
            table = torch.cat([table[:zero], torch.zeros_like(table[:1]), table[zero + 1 :]])
            reach = max(1.0, zero / (method.levels - 1 - zero))
            table = table.clamp(-reach, reach)
        return Levels(table, *self._slopes(table.detach(), zero))

    def _activation_levels(self, zero: int) -> Tensor:
        """(R, N_f), ascending."""
        logits = self.activation_logits.float() / self.temperature
        up = logits[:, zero:].softmax(1).cumsum(1)
        parts = [torch.zeros_like(up[:, :1]), up]
        if zero:
            down = logits[:, :zero].flip(1).softmax(1).cumsum(1).flip(1)
            parts.insert(0, -down * (zero / (self.method.levels - 1 - zero)))
        return torch.cat(parts, 1)

    def _weight_levels(self) -> Tensor:
        """(R, N_w), ascending."""
        halves = (self.weight_logits.float() / self.temperature).softmax(2).cumsum(2)
        down, up = halves[:, 0].flip(1), halves[:, 1]
        return torch.cat([-down, torch.zeros_like(up[:, :1]), up], 1)

    def _slopes(self, table: Tensor, zero: int) -> tuple[Tensor, Tensor]:
        """Least-squares slopes of a table's columns and rows through zero."""
        f = activation_steps(self.method.levels, zero, table.device)
        w = weight_steps(self.method.weights, table.device)
        return table @ w / w.square().sum(), f @ table / f.square().sum()


def _apart(rank: int, steps: int) -> Tensor:
    """Logits (R, steps) of components that differ, but whose mean is linear."""
    logits = torch.zeros(rank, steps)
    position = (torch.arange(steps) + 0.5) / max(steps, 1)
    for pair in range(rank // 2):
        wave = _SPREAD * torch.cos(math.pi * (pair + 1) * position)
        wave = wave - wave.mean()
        logits[2 * pair] = torch.log1p(wave)
        logits[2 * pair + 1] = torch.log1p(-wave)
    return logits


def quantize_table(table: Tensor, entries: int) -> Tensor:
    """The int8 table (N_f, N_w) of one in units where the largest activation and weight give 1."""
    return (table * entries).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
