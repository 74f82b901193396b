"""`nn.MultiheadAttention` whose projections are linear layers of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.layers.forms import runs_forward_of

#: The linear layers of `Attention`.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def why_no_projections(attention: nn.Module) -> str | None:
    """Why an attention cannot have linear layers of its own; None where it can.

    Args:
        attention: an `nn.MultiheadAttention`, of this class or another.
    """
    name = type(attention).__name__
    if not runs_forward_of(attention, nn.MultiheadAttention):
        return f"{name} has a forward of its own, other than that of MultiheadAttention"
    assert isinstance(attention, nn.MultiheadAttention)
    if attention.bias_k is not None or attention.bias_v is not None:
        return "an attention with add_bias_kv=True has no lookup form"
    if attention.add_zero_attn:
        return "an attention with add_zero_attn=True has no lookup form"
    return None


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keeps the attentions and encoders of torch.nn off PyTorch's fast path: they call their layers
    and compute with the operators that others use."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class Attention(nn.Module):
    """Computes what `nn.MultiheadAttention` does, by calls of `q_proj`, `k_proj`, `v_proj` and
    `out_proj`, so that these can be replaced. It never takes the fast path of PyTorch.

    Args:
        dense: the attention; `out_proj` keeps its parameters, the others copy their part.
    """

    bias_k: None = None
    bias_v: None = None
    add_zero_attn = False

    def __init__(self, dense: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = dense.embed_dim, dense.kdim, dense.vdim
        self.num_heads, self.head_dim = dense.num_heads, dense.head_dim
        self.dropout, self.batch_first = dense.dropout, dense.batch_first
        self._qkv_same_embed_dim = dense._qkv_same_embed_dim
        separate = (dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight)
        weights = dense.in_proj_weight.chunk(3) if dense._qkv_same_embed_dim else separate
        biases = (None,) * 3 if dense.in_proj_bias is None else dense.in_proj_bias.chunk(3)
        projections = [_linear(w, b) for w, b in zip(weights, biases, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = projections
        self.out_proj = _linear(dense.out_proj.weight, dense.out_proj.bias)
        self.out_proj.weight, self.out_proj.bias = dense.out_proj.weight, dense.out_proj.bias
        self.train(dense.training)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The weights of q, k and v (3 E, E) in float; None where their inputs differ in size."""
        return torch.cat(self._weights()) if self._qkv_same_embed_dim else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The biases of q, k and v (3 E)."""
        biases = [layer.bias for layer in (self.q_proj, self.k_proj, self.v_proj)]
        return None if biases[0] is None else torch.cat((biases[0], *biases[1:]))

    def _weights(self) -> list[Tensor]:
        return [layer.weight for layer in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results of `nn.MultiheadAttention`.

        Raises:
            LutraError: nested tensors, or `is_causal` without a mask.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise LutraError("a converted attention takes no nested tensors; give padded ones")
        if is_causal and attn_mask is None:
            raise LutraError("attention: is_causal=True is a hint about attn_mask; give the mask")
        batched = query.dim() == 3
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (self._heads(x if batched else x.unsqueeze(self._batch_axis)) for x in (q, k, v))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        y = (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).flatten(2)
        y = self.out_proj(y if batched else y.squeeze(self._batch_axis))
        if weights is None:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights if batched else weights.squeeze(0)

    @property
    def _batch_axis(self) -> int:
        return 0 if self.batch_first else 1

    def _heads(self, x: Tensor) -> Tensor:
        """(N, heads, L, E / heads)."""
        x = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _mask(
        self, attention: Tensor | None, padding: Tensor | None, query: Tensor
    ) -> Tensor | None:
        """What is added to the scores (N, heads, L, S); axes may be 1."""
        if attention is not None:
            attention = _added(attention, query)
            if attention.dim() == 3:
                attention = attention.reshape(-1, self.num_heads, *attention.shape[1:])
        if padding is None:
            return attention
        padding = _added(padding, query)
        padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        return padding if attention is None else attention + padding

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as a tensor that is added: minus infinity where a mask of bool is true."""
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of a weight and a bias."""
    outputs, features = weight.shape
    made = nn.Linear(features, outputs, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return made
