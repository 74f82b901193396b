"""The ordinary PyTorch module of a sentence encoder: what a user has before any other runtime."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks_text import Encoder, encoder_graph

_EPS = 1e-12


class _Block(nn.Module):
    """Attention, then the feed-forward layer; each adds to what it reads."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        size, inner = encoder.hidden, encoder.inner
        self.heads = encoder.heads
        self.attention = nn.ModuleDict(
            {name: nn.Linear(size, size) for name in ("query", "key", "value", "output")}
            | {"norm": nn.LayerNorm(size, _EPS)}
        )
        self.inner, self.output = nn.Linear(size, inner), nn.Linear(inner, size)
        self.norm = nn.LayerNorm(size, _EPS)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        """(N, T, D) and which keys count, bool (N, 1, 1, T)."""
        parts = (self.attention[name](x) for name in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, keys).transpose(1, 2).flatten(2)
        x = self.attention["norm"](self.attention["output"](mixed) + x)
        return self.norm(self.output(F.gelu(self.inner(x))) + x)


class DenseEncoder(nn.Module):
    """The encoder with the tensors of the lutra graph whose linear layers are multiplied."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.words = nn.Embedding(encoder.vocabulary, encoder.hidden)
        self.positions = nn.Embedding(encoder.positions, encoder.hidden)
        self.embeddings = nn.ModuleDict({"norm": nn.LayerNorm(encoder.hidden, _EPS)})
        self.layer = nn.ModuleList(_Block(encoder) for _ in range(encoder.layers))
        tensors = encoder_graph(encoder).tensors
        self.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 (N, T) each to float32 (N, D) of length 1."""
        x = self.embeddings["norm"](self.words(ids) + self.positions.weight[: ids.shape[1]])
        keys = mask.bool()[:, None, None]
        for block in self.layer:
            x = block(x, keys)
        kept = mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1, eps=1e-12)
