"""Embeddings whose rows are int8, with a scale for each row."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lutra.ops.limits import INT8_MAX
from lutra.train.layers.dropin import adopt_attributes
from lutra.train.recipe import Int8

_DEFAULT = Int8()
_TINY = torch.finfo(torch.float32).tiny


@torch.library.custom_op("lutra::int8_embedding", mutates_args=())
def int8_embedding(ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows weight[id] * scale[id], (..., D) float32, of ids (...) int64 or int32: weight (R, D)
    int8, scale (R) float32."""
    return weight[ids].float() * scale[ids][..., None]


@int8_embedding.register_fake
def _(ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((*ids.shape, weight.shape[1]))


class Int8Embedding(nn.Module):
    """An embedding in a quarter of the bytes. It does not train; its rows are rounded once.

    State: `int8_weight` (R, D) and `scale` (R) of its rows.
    """

    int8_weight: Tensor
    scale: Tensor
    method = _DEFAULT

    def __init__(self, int8_weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("int8_weight", int8_weight)
        self.register_buffer("scale", scale)

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: nn.Embedding, method: Int8 = _DEFAULT) -> Int8Embedding:
        """Rounds the rows; one scale per row."""
        rows = layer.weight.float()
        scale = (rows.abs().amax(1) / INT8_MAX).clamp_min(_TINY)
        steps = (rows / scale[:, None]).round().clamp(-INT8_MAX, INT8_MAX)
        new = cls(steps.to(torch.int8), scale)
        new.method = method
        adopt_attributes(new, layer)
        return new

    @property
    def weight(self) -> Tensor:
        """All rows (R, D) in float32, made anew at each read."""
        return self.int8_weight.float() * self.scale[:, None]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if prefix + "weight" in state_dict:  # the name in lutra 0.1
            state_dict[prefix + "int8_weight"] = state_dict.pop(prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def settle(self) -> dict[str, Any]:
        """Fields of the report."""
        size = self.int8_weight.numel()
        return {
            "label": "int8",
            "int8_bytes": size,
            "stored": (("int8 weights", size),),
            "error": self.error,
        }

    @property
    def error(self) -> float:
        """Mean squared rounding error relative to the variance of the entries, expected."""
        variance = self.weight.var().clamp_min(1e-30)
        return float((self.scale.square().mean() / 12.0) / variance)

    def forward(self, ids: Tensor) -> Tensor:
        """(..., D) of ids (...)."""
        return cast(Tensor, int8_embedding(ids, self.int8_weight, self.scale))

    def extra_repr(self) -> str:
        return f"{self.int8_weight.shape[0]}, {self.int8_weight.shape[1]}"
