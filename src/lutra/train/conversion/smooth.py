"""Factors for the inputs of linear layers whose features differ much in size.

All features of an input share one activation grid. In transformers a few features are ten times as
large as the others, which are left with few steps. What a layer reads is then divided by a factor
for each feature, and the weights that meet the feature are multiplied by it (SmoothQuant, Xiao and
others, arXiv 2211.10438). Layers that read one tensor share their factors, so that the division is
one step of the network.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Final, cast

import torch
from torch import Tensor, nn

from lutra.train import distributed
from lutra.train.conversion.equalize import NEEDED_ROWS, grid_error
from lutra.train.layers.forms import form_of
from lutra.train.layers.recurrent import Recurrent
from lutra.train.recipe import Int8, Lookup, Method

#: How much of the difference is moved into the weights: each is tried.
POWERS = (0.5, 0.65, 0.75, 0.85)
#: Largest error that pays for the division, relative to the error without factors.
_MOST_ERROR: Final[Mapping[type[Method], float]] = {Int8: 0.5, Lookup: 0.9}
_LEAST_FEATURES = 16
_LEAST = 1e-5  # of the largest: smaller features and weights are taken for as large


def smoothing_factors(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    methods: Mapping[str, Method],
    rows: Mapping[str, Tensor],
    sources: Mapping[str, Hashable],
) -> dict[str, Tensor]:
    """Factors (D) for the inputs of layers, where they lower the error well.

    Args:
        model: that holds the layers.
        layers: dense linear layers, by path; others are left out.
        methods: what they become.
        rows: samples (n, D) of their inputs.
        sources: which tensors they read: equal for layers that read the same.
    """
    groups: dict[Hashable, list[str]] = {}  # steps of a recurrent layer read its matrices alone
    for name, layer in layers.items():
        method, form = methods[name], form_of(layer)
        if not isinstance(method, Int8 | Lookup) or method.smooth is False:
            continue
        if form is None or form.dense is not nn.Linear or rows[name].shape[1] < _LEAST_FEATURES:
            continue
        count = torch.tensor(float(len(rows[name])))
        if -float(distributed.all_reduce(-count, "max")) < NEEDED_ROWS:  # in any process
            continue
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), Recurrent):
            groups.setdefault((sources[name], type(method), method.act_bits), []).append(name)
    found: dict[str, Tensor] = {}
    for names in groups.values():
        factors = _best(
            [_weight(layers[name]) for name in names],
            [rows[name] for name in names],
            methods[names[0]],
        )
        if factors is not None:
            found.update(dict.fromkeys(names, factors))
    return found


def _weight(layer: nn.Module) -> Tensor:
    """The weight (M, D) of a linear layer."""
    form = form_of(layer)
    assert form is not None
    return form.kernel(cast(Tensor, layer.weight)).detach().float().cpu()


def _best(weights: list[Tensor], rows: list[Tensor], method: Method) -> Tensor | None:
    """The factors with the least error of some layers that read one tensor; None for no factors.

    Args:
        weights: of the layers (M, D).
        rows: samples (n, D) of their inputs.
        method: what all of them become.
    """
    reach = _largest(weights)
    parts = [(x[::2].cpu().float(), x[1::2].cpu().float()) for x in rows]
    seen = distributed.all_reduce(_largest([seen for seen, _ in parts]), "max")
    every = torch.maximum(seen, distributed.all_reduce(_largest([x for _, x in parts]), "max"))
    if not (float(seen.max()) > 0.0 and float(reach.max()) > 0.0):
        return None

    def error(factors: Tensor) -> float:
        """Of samples that the factors are not made of."""
        held = (grid_error(w, method, x, factors) for w, (_, x) in zip(weights, parts, strict=True))
        return distributed.mean(sum(held))

    start = error(torch.ones_like(seen))
    least, power = min((error(_factors(seen, reach, power)), power) for power in POWERS)
    return _factors(every, reach, power) if least < _MOST_ERROR[type(method)] * start else None


def _largest(rows: list[Tensor]) -> Tensor:
    """The largest magnitude of each feature (D) in some (n, D)."""
    return torch.stack([x.abs().amax(0) for x in rows]).amax(0)


def _factors(size: Tensor, reach: Tensor, power: float) -> Tensor:
    """Factors of features of a size that meet weights of a reach, with a geometric mean of 1."""
    size, reach = (part.clamp_min(_LEAST * float(part.max())) for part in (size, reach))
    factors = size**power / reach ** (1.0 - power)
    return factors / factors.log().mean().exp()
