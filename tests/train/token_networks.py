"""Networks of tokens in the form of well-known packages, small: of patches, of windows, of text.

Each is written from the description in its paper, as compactly as its kind of block allows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from convnets import Apply
from torch import Tensor, nn


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 12), nn.GELU(), nn.Linear(12, tokens))
        self.over_width = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        made: Tensor = x + self.over_width(self.second(x))
        return made


def _tokens(width: int = 16) -> list[nn.Module]:
    """An image of 32 as 16 tokens."""
    return [nn.Conv2d(3, width, 8, 8), Apply(lambda x: x.flatten(2).transpose(1, 2))]


def _of_tokens(*blocks: nn.Module) -> nn.Sequential:
    """A classifier of an image of 32 as 16 tokens, by their mean."""
    return nn.Sequential(*_tokens(), *blocks, Apply(lambda x: x.mean(1)), nn.Linear(16, 5))


def mixer() -> nn.Module:
    return _of_tokens(MixerBlock(16, 16), MixerBlock(16, 16), nn.LayerNorm(16))


class GatedBlock(nn.Module):
    """gMLP: tokens meet in a gate."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm, self.gate_norm = nn.LayerNorm(width), nn.LayerNorm(16)
        self.wide, self.narrow = nn.Linear(width, 32), nn.Linear(16, width)
        self.over_tokens = nn.Conv1d(tokens, tokens, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = F.gelu(self.wide(self.norm(x))).chunk(2, dim=-1)
        made: Tensor = x + self.narrow(kept * self.over_tokens(self.gate_norm(gate)))
        return made


def gmlp() -> nn.Module:
    return _of_tokens(GatedBlock(16, 16), GatedBlock(16, 16))


class ResMlpBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, 1, width) + 0.5)
        self.shift = nn.Parameter(torch.rand(1, 1, width))
        self.gamma = nn.Parameter(torch.rand(width))
        self.tokens = nn.Linear(tokens, tokens)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addcmul(self.shift, self.scale, x)
        x = x + self.gamma * self.tokens(y.transpose(1, 2)).transpose(1, 2)
        made: Tensor = x + self.gamma * self.mlp(torch.addcmul(self.shift, self.scale, x))
        return made


def resmlp() -> nn.Module:
    return _of_tokens(ResMlpBlock(16, 16), ResMlpBlock(16, 16))


class Encoder(nn.Module):
    """nn.TransformerEncoder of tokens, with the padding left out."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.position = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(ids.size(1), device=ids.device)
        x = self.embed(ids) + self.position(places)
        x = self.encoder(x, src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).float()
        made: Tensor = self.out((x * weights).sum(1) / weights.sum(1).clamp(min=1e-9))
        return made


class Captioner(nn.Module):
    """nn.TransformerDecoder: text that looks at an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(*_tokens())
        self.embed = nn.Embedding(60, 16)
        layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.decoder = nn.TransformerDecoder(layer, 1)
        self.out = nn.Linear(16, 60)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        y = self.decoder(self.embed(ids), self.patches(image), tgt_mask=causal)
        made: Tensor = self.out(y)
        return made


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.qkv(self.norm1(x))
        y = y.reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = y.unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        made: Tensor = x + self.mlp(self.norm2(x))
        return made


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.Sequential(ViTBlock(16, 2), ViTBlock(16, 2))
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        made: Tensor = self.out(self.norm(self.blocks(x))[:, 0])
        return made


class WindowBlock(nn.Module):
    """A block of Swin in the form of timm and torchvision: shifted windows with masks."""

    def __init__(self, width: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", apart[:, :, 0] * (2 * window - 1) + apart[:, :, 1])
        regions = torch.zeros(1, side, side, 1)
        cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        if shift:
            for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
                regions[:, rows, columns] = number
        parts = self.cut(regions).squeeze(-1)
        apart = parts[:, None, :] - parts[:, :, None]
        self.register_buffer("mask", torch.where(apart == 0, 0.0, -100.0) if shift else None)

    def cut(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        w = self.window
        x = x.view(batch, height // w, w, width // w, w, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        w = self.window
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, shifts=(-self.shift, -self.shift), dims=(1, 2))
        y = self.cut(y)
        qkv = self.qkv(y).reshape(y.shape[0], w * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * (channels // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(w * w, w * w, -1).permute(2, 0, 1)
        scores = scores + bias.contiguous().unsqueeze(0)
        if self.mask is not None:
            windows = self.mask.shape[0]
            scores = scores.view(batch, windows, self.heads, w * w, w * w)
            scores = scores + self.mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, w * w, w * w)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(y.shape[0], w * w, channels)
        y = self.proj(y).view(-1, height // w, width // w, w, w, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        if self.shift:
            y = torch.roll(y, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + y
        made: Tensor = x + self.mlp(self.norm2(x))
        return made


class Merge(nn.Module):
    """Four neighbours become one token, as between the stages of Swin."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2, :] for j in (0, 1) for i in (0, 1)]
        made: Tensor = self.reduce(self.norm(torch.cat(parts, -1)))
        return made


def swin() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4),
        Apply(lambda x: x.permute(0, 2, 3, 1)),
        WindowBlock(16, 2, 8, 4, 0),
        WindowBlock(16, 2, 8, 4, 2),
        Merge(16),
        Apply(lambda x: x.mean((1, 2))),
        nn.Linear(32, 5),
    )
