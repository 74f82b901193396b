"""Function tables in a small language model: perplexity, also far from the calibrated range.

    python -m benchmarks.function_lm stories260K.bin [--samples 32] [--length 192]

The model is one of llama2.c (RMS norm, SiLU, rotary attention) of 260 thousand parameters. It
writes stories, and every variant is measured on the same ones: exact functions, tables of this
library, and NN-LUT's networks as published, which go on along their last line outside of the range
that they were trained on. "logits" is how far the logits are from those with exact functions, as a
share of their length; "gates x 10" the same of a model whose gates (the inputs of SiLU) are ten
times as large, with the tables and networks that were fitted before.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.functions import Piecewise
from lutra.train import Function, TableFunction, convert, fit_relu_net
from lutra.train.functions.calls import swap_class


class Block(nn.Module):
    """A layer of Llama 2."""

    def __init__(self, dim: int, hidden: int, heads: int, kv: int) -> None:
        super().__init__()
        self.heads, self.kv, self.width = heads, kv, dim // heads
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))
        self.q, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(dim, kv * self.width, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor) -> Tensor:
        """x (N, T, dim); turn (T, width / 2), complex; mask (T, T), added to scores."""
        n, t, dim = x.shape
        h = F.rms_norm(x, (dim,), self.norm1, 1e-5)
        q = rotated(self.q(h).view(n, t, self.heads, self.width), turn)
        k = rotated(self.k(h).view(n, t, self.kv, self.width), turn)
        v = self.v(h).view(n, t, self.kv, self.width)
        k, v = (y.repeat_interleave(self.heads // self.kv, 2).transpose(1, 2) for y in (k, v))
        scores = q.transpose(1, 2) @ k.transpose(-1, -2) / self.width**0.5 + mask
        share = torch.softmax(scores, -1)
        x = x + self.o((share @ v).transpose(1, 2).reshape(n, t, dim))
        h = F.rms_norm(x, (dim,), self.norm2, 1e-5)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Pairs of x (N, T, H, width) turned by their position."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


class Llama(nn.Module):
    """The language model of a llama2.c file: tokens (N, T) to logits (N, T, words)."""

    turn: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        data = path.read_bytes()
        dim, hidden, layers, heads, kv, words, length = np.frombuffer(data, "<i4", 7).tolist()
        rest = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())

        def take(*shape: int) -> Tensor:
            nonlocal rest
            count = int(np.prod(shape))
            part, rest = rest[:count].view(shape), rest[count:]
            return part

        words, width = abs(words), dim // heads
        self.embedding = nn.Parameter(take(words, dim))
        self.blocks = nn.ModuleList(Block(dim, hidden, heads, kv) for _ in range(layers))
        shapes: list[tuple[str, tuple[int, ...]]] = [
            ("norm1", (dim,)), ("q.weight", (dim, dim)), ("k.weight", (kv * width, dim)),
            ("v.weight", (kv * width, dim)), ("o.weight", (dim, dim)), ("norm2", (dim,)),
            ("gate.weight", (hidden, dim)), ("down.weight", (dim, hidden)),
            ("up.weight", (hidden, dim)),
        ]  # fmt: skip
        states: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        for name, shape in shapes:
            stacked = take(layers, *shape)
            for state, tensor in zip(states, stacked, strict=True):
                state[name] = tensor
        for block, state in zip(self.blocks, states, strict=True):
            block.load_state_dict(state)
        self.norm = nn.Parameter(take(dim))
        angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles))

    def forward(self, tokens: Tensor) -> Tensor:
        t = tokens.shape[1]
        mask = torch.full((t, t), -torch.inf).triu(1)
        x = self.embedding[tokens]
        for block in self.blocks:
            x = block(x, self.turn[:t], mask)
        return F.rms_norm(x, (x.shape[-1],), self.norm, 1e-5) @ self.embedding.t()


@torch.no_grad()
def stories(model: Llama, samples: int, length: int, seed: int) -> Tensor:
    """Tokens (samples, length) that the model writes at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.ones((samples, 1), dtype=torch.long)  # 1 begins a story
    while tokens.shape[1] < length:
        odds = model(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(odds, 1, generator=generator)], 1)
    return tokens


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """exp of the mean loss of the next token."""
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    return float(loss.exp())


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the model makes of tokens."""
    result: Tensor = model(tokens)
    return result


@torch.no_grad()
def wide(model: nn.Module) -> nn.Module:
    """A copy of the model whose gates are ten times as large."""
    copied = copy.deepcopy(model)
    for block in copied.blocks:  # type: ignore[union-attr]
        block.gate.weight *= 10
    return copied


class Bare(nn.Module):
    """Softmax and RMS norm as NN-LUT makes them: networks, and no range reduction."""

    def __init__(self, kind: str, entries: int) -> None:
        super().__init__()
        self.kind = kind
        names = ("exp", "reciprocal") if kind == "softmax" else ("rsqrt",)
        self.parts = nn.ModuleList(TableFunction(network(name, entries)) for name in names)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        if self.kind == "softmax":
            powers = self.parts[0]((x - x.amax(-1, keepdim=True)).clamp_min(-256.0))
            return powers * self.parts[1](powers.sum(-1, keepdim=True))
        weight, eps = rest
        return x * self.parts[0](x.square().mean(-1, keepdim=True) + eps) * weight


_networks: dict[tuple[str, int], Piecewise] = {}


def network(name: str, entries: int) -> Piecewise:
    """NN-LUT's network of a function, trained on NN-LUT's range (SiLU on -5..5, as GELU)."""
    if (name, entries) not in _networks:
        low, high = (-5.0, 5.0) if name == "silu" else (None, None)
        _networks[name, entries] = fit_relu_net(name, low, high, entries, asymptotes=False)
    return _networks[name, entries]


def bare(model: Llama, entries: int, functions: tuple[str, ...]) -> nn.Module:
    """A copy of the model with NN-LUT's networks."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, (Block, Llama)):
            made = {
                name: TableFunction(network("silu", entries)) if name == "silu"
                else Bare(name, entries)
                for name in functions
            }  # fmt: skip
            swap_class(module, made)
    return copied


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=192)
    args = parser.parse_args()
    model = Llama(args.weights).eval()
    data = [stories(model, args.samples, args.length, seed) for seed in (0, 1)]
    variants: dict[str, nn.Module] = {"exact": model}
    for entries in (8, 16, 32):
        for calibrate in (False, True):
            name = f"tables of {entries}" + ", calibrated" * calibrate
            recipe = {"*": Function(entries=entries, calibrate=calibrate)}
            variants[name] = convert(model, recipe, [data[0]])[0]
    variants["tables of 16 by dp, calibrated"] = convert(
        model, {"*": Function(method="dp")}, [data[0]]
    )[0]
    for entries in (16, 32):
        variants[f"networks of {entries}, SiLU only"] = bare(model, entries, ("silu",))
        variants[f"networks of {entries}, all"] = bare(
            model, entries, ("silu", "softmax", "rms_norm")
        )
    print("| functions | perplexity | logits | logits, gates x 10 |\n|---|---|---|---|")
    wanted = logits(model, data[1]), logits(wide(model), data[1])
    for name, variant in variants.items():
        made = logits(variant, data[1]), logits(wide(variant), data[1])
        apart = [float((a - b).norm() / b.norm()) for a, b in zip(made, wanted, strict=True)]
        cells = (f"{perplexity(variant, data[1]):.3f}", *(f"{share:.4f}" for share in apart))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
