"""Random steps beside the layers, on the values of a graph that grows: norms of groups, transposed
convolutions, recurrent layers, resampling, choices by value, paddings and chains of functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from graphs import Array
from random_layers import LayerGrower
from recurrences import grids, int8_weights, weights

from lutra.ops.elementwise import NO_LIMIT

#: What a padding is filled with: the padding of a layer, what is rounded to it, and other numbers.
FILLS = (0.0, 0.0, 0.0, -0.0, 1e-6, 0.5, -0.75)
MAX_SIDE = 12


class StepGrower(LayerGrower):
    """A graph that grows by steps too."""

    def affine(self, x: str, *, hidden: bool = False) -> str:
        scale = self.random.uniform(-2, 2)
        if self.chance(0.3):
            return self.add("affine_scalar", x, scale=scale, bias=0.25, hidden=hidden)
        axis = self.random.randint(1, len(self.shape(x))) if self.chance(0.2) else 1
        size = self.shape(x)[axis - 1]
        tensors = {"scale": self.normal(size), "bias": self.normal(size)}
        return self.add("affine", x, tensors=tensors, axis=axis, hidden=hidden)

    def bend(self, x: str, *, hidden: bool) -> str:
        """A function that is exact, or one that is computed."""
        op = self.random.choice(
            ["hardswish", "hardswish", "leaky_relu", "abs", "elu", "mish", "softplus", "floor"]
        )
        attrs = {"slope": self.random.choice([0.01, 0.3, -0.5])} if op == "leaky_relu" else {}
        return self.add(op, x, hidden=hidden, **attrs)

    def functions(self, x: str) -> str:
        """Scales, shifts, limits and functions one behind the other, which one step can do."""
        for _ in range(self.random.randint(1, 5)):
            kind = self.random.choice(["affine", "affine", "clamp", "bend", "exact"])
            if kind == "affine":
                x = self.affine(x, hidden=True)
            elif kind == "clamp":
                x = self.add(self.random.choice(["relu", "relu6"]), x, hidden=True)
            elif kind == "bend":
                x = self.bend(x, hidden=True)
            else:
                x = self.add(self.random.choice(["gelu", "sigmoid", "tanh"]), x, hidden=True)
            if self.chance(0.1):
                self.open.append(x)
        return x

    def padded(self, x: str, *fills: float) -> str:
        """Images with other borders on every side, for the layer or pooling that alone reads them:
        sometimes by two paddings, or of points that become images of one line."""
        if len(self.shape(x)) == 2 and self.chance(0.5):
            channels, length = self.shape(x)
            pads = (0, 0, 0, 0, self.random.randint(0, 2), self.random.randint(0, 2))
            y = self.add("pad", x, hidden=True, pads=pads, value=self.random.choice(fills or FILLS))
            length += pads[4] + pads[5]
            shape = self.random.choice([(channels, 1, length), (channels, length, 1)])
            return self.add("reshape", y, hidden=True, shape=shape)
        if len(self.shape(x)) != 3 or max(self.shape(x)[1:]) >= MAX_SIDE:
            return x
        fill = self.random.choice(fills or FILLS)
        for _ in range(self.random.choice([1, 1, 1, 2])):
            sides = (self.random.randint(0, 2) for _ in range(4))
            x = self.add("pad", x, hidden=True, pads=(0, 0, 0, 0, *sides), value=fill)
            if self.chance(0.1) and fill > -NO_LIMIT:  # which overflows in other readers
                self.open.append(x)
        return x

    def conv_transpose(self, x: str) -> str:
        r, channels, wide = self.random, self.shape(x)[0], self.random.choice([1, 3, 4, 6])
        groups = r.choice([n for n in range(1, channels + 1) if channels % n == wide % n == 0])
        kernel = (r.randint(1, 3), r.randint(1, 3))
        stride = (r.randint(1, 2), r.randint(1, 2))
        weight = self.normal(wide, channels // groups, *kernel) / np.float32(2)
        return self.add(
            "conv_transpose2d",
            x,
            hidden=True,
            tensors={"weight": weight, "bias": self.normal(wide)},
            groups=groups,
            stride=stride,
            padding=tuple(r.randint(0, (k - 1) // 2) for k in kernel),
            output_padding=tuple(r.randint(0, s - 1) for s in stride),
        )

    def group_norm(self, x: str) -> str:
        channels = self.shape(x)[0]
        groups = self.random.choice([n for n in range(1, channels + 1) if channels % n == 0])
        tensors = {"weight": self.normal(channels), "bias": self.normal(channels)}
        return self.add("group_norm", x, hidden=True, tensors=tensors, groups=groups, eps=1e-5)

    def recurrent(self, x: str) -> str:
        op, hidden = self.random.choice(["gru", "lstm"]), self.random.randint(1, 6)
        attrs: dict[str, Any] = {"cells": self.chance(0.3)} if op == "lstm" else {}
        make = weights
        if self.chance(0.5):
            op, make = f"int8_{op}", int8_weights
            attrs |= grids(self.b.rng)
        tensors = make(op, self.shape(x)[-1], hidden, seed=self.random.randint(0, 99))
        return self.add(op, x, hidden=True, tensors=tensors, reverse=self.chance(0.4), **attrs)

    def resample(self, x: str) -> str:
        if self.chance(0.5):
            aligned = self.chance(0.5)
            return self.add("upsample_bicubic", x, hidden=True, size=(5, 4), align_corners=aligned)
        # two numbers of every line of every channel are a point
        points = self.add("slice", x, hidden=True, axis=3, start=0, stop=2, step=1)
        return self.add(
            "grid_sample",
            x,
            self.add("tanh", points, hidden=True),
            hidden=True,
            mode=self.random.choice(["bilinear", "nearest"]),
            padding=self.random.choice(["zeros", "border", "reflection"]),
            align_corners=self.chance(0.5),
        )

    def select(self, x: str) -> str:
        axis = self.random.randint(1, len(self.shape(x)))
        k = self.random.randint(1, self.shape(x)[axis - 1])
        attrs = {"k": k, "axis": axis, "largest": self.chance(0.5)}
        if self.chance(0.5):
            return self.add("topk", x, hidden=True, **attrs)
        places = self.add("topk", x, hidden=True, indices=True, **attrs)
        return self.add("take_along", x, places, hidden=True, axis=axis)

    def newer(self, x: str) -> str:
        """One of these steps, whichever fits."""
        kinds = [self.select]
        if len(self.shape(x)) > 1:
            kinds.append(self.group_norm)
        if len(self.shape(x)) == 2:
            kinds.append(self.recurrent)
        if len(self.shape(x)) == 3 and max(self.shape(x)[1:]) < MAX_SIDE:
            kinds.append(self.conv_transpose)
            if self.shape(x)[2] >= 2:
                kinds.append(self.resample)
        return self.random.choice(kinds)(x)

    def mirrored(self, x: str, hidden: bool) -> str:
        """A padding of another mode, which is a choice by index."""
        axis = self.random.randint(1, len(self.shape(x)))
        size = self.shape(x)[axis - 1]
        mode = self.random.choice(["reflect", "symmetric", "edge", "wrap"])
        index: Array = np.pad(np.arange(size), 1, mode=mode if size > 1 else "edge")  # type: ignore[call-overload]
        tensors = {"index": index.astype(np.int32)}
        return self.add("gather", x, hidden=hidden, tensors=tensors, axis=axis)
