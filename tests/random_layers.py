"""Random layers of every family on the values of a graph that grows."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from graphs import (
    Array,
    Builder,
    int8_tensors,
    lookup_tensors,
    lowbit_tensors,
    pq_tensors,
    tree_tensors,
)

from lutra.ops.limits import LOWBIT_LEVELS
from lutra.ops.lookup import bits_for
from lutra.reference import run_node

Grid = dict[str, Any]


@dataclass
class _Geometry:
    """The window of a convolution."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


@dataclass
class LayerGrower:
    """A graph that grows by layers.

    Attributes:
        b: The graph.
        random: Decides its structure; ``b.rng`` makes its numbers.
        arrays: The array of every value, by name.
        open: The values that new nodes may read. A value that is not among them has the readers
            that it was made for, so that the plan may fuse it with them.
    """

    b: Builder
    random: random.Random
    arrays: dict[str, Array] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    _grids: dict[str, list[Grid]] = field(default_factory=dict)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def normal(self, *shape: int) -> Array:
        return self.b.rng.normal(size=shape).astype(np.float32)

    def add(
        self,
        op: str,
        *inputs: str,
        hidden: bool = False,
        tensors: dict[str, Array] | None = None,
        **attrs: Any,
    ) -> str:
        """Appends a node and computes its value; a hidden one is not for everybody to read."""
        name = self.b.add(op, *inputs, tensors=tensors, **attrs)
        self.arrays[name] = run_node(
            self.b.nodes[-1], [self.arrays[x] for x in inputs], tensors or {}
        )
        if not hidden:
            self.open.append(name)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one sample."""
        return self.arrays[name].shape[1:]

    def grid(self, x: str, *, lookup: bool = False) -> Grid:
        """A grid for a value: one that it has already, one that differs in a detail, or another."""
        known = self._grids.setdefault(x, [])
        fit = [g for g in known if not lookup or _fits_lookup(g)]
        if fit and self.chance(0.4):
            return self.random.choice(fit)
        if fit and not lookup and self.chance(0.4):
            grid = dict(self.random.choice(fit))
            detail = self.random.choice(["act_scale", "act_zero", "act_bits"])
            if detail == "act_scale":
                grid[detail] = float(np.float32(grid[detail] * self.random.choice([0.5, 1.25])))
            elif detail == "act_zero":
                grid[detail] = (grid[detail] + 1) % 2 ** grid["act_bits"]
            else:
                grid[detail] = min(7, grid[detail] + 1)
        else:
            bits = self.random.randint(2, 6) if lookup else self.random.choice([3, 5, 6, 7, 7, 7])
            zero = self.random.choice([0, 2 ** (bits - 1)])
            if not lookup and self.chance(0.3):
                zero = self.random.randint(0, 2**bits - 1)
            top = float(np.abs(self.arrays[x]).max()) or 1.0
            reach = max(zero, 2**bits - 1 - zero)
            scale = top * self.random.uniform(0.4, 1.2) / reach
            grid = {"act_scale": float(np.float32(scale)), "act_zero": zero, "act_bits": bits}
        known.append(grid)
        return grid

    def geometry(self, x: str, *, keep: bool) -> _Geometry:
        """The window of a convolution over x; with ``keep``, images keep their size."""
        r = self.random
        same = [
            _Geometry(),
            _Geometry((3, 3), padding=(1, 1)),
            _Geometry((1, 3), padding=(0, 1)),
            _Geometry((3, 3), padding=(2, 2), dilation=(2, 2)),
        ]
        g = r.choice(same)
        if keep:
            return g
        height, width = self.shape(x)[1:]
        kernel = (r.randint(1, min(3, height)), r.randint(1, min(3, width)))
        return r.choice([g, _Geometry(kernel, (r.randint(1, 2), r.randint(1, 2)))])

    def layer(
        self, x: str, outputs: int | None = None, *, keep: bool = False, integers: bool = False
    ) -> str:
        """A layer of any family; its value is hidden."""
        families = ["pq", "tree", "lookup", "int8", "int8"] + ["float"] * (not integers)
        families += ["lowbit"] * (len(self.shape(x)) != 3 and not integers)
        family = self.random.choice(families)
        wide = outputs or self.random.choice([1, 3, 4, 5, 8, 8, 12])
        if family in ("pq", "tree"):
            return self.pq(x, *self.encoder(x, family, keep=keep), wide)
        if len(self.shape(x)) != 3:
            return self._rows(x, family, wide)
        g = self.geometry(x, keep=keep)
        channels, attrs = self.shape(x)[0], vars(g).copy()
        kernel = attrs.pop("kernel")
        if family == "lookup":
            attrs.update(self.grid(x, lookup=True))
            weights = self.random.choice([3, 15, 33])
            length = channels * kernel[0] * kernel[1]
            tensors = self._table(length, wide, weights, attrs)
            attrs.update(kernel=kernel, in_channels=channels, weight_bits=bits_for(weights))
            return self.add("lookup_conv2d", x, hidden=True, tensors=tensors, **attrs)
        shared = [n for n in range(1, channels + 1) if channels % n == 0 and wide % n == 0]
        groups = self.random.choice([1, 1, *shared[-1:], *shared])
        shape = (wide, channels // groups, *kernel)
        if family == "int8":
            attrs.update(self.grid(x))
            tensors = int8_tensors(self.b.rng, shape)
        else:
            tensors = self._floats(shape)
        op = "int8_conv2d" if family == "int8" else "conv2d"
        return self.add(op, x, hidden=True, tensors=tensors, groups=groups, **attrs)

    def _rows(self, x: str, family: str, outputs: int) -> str:
        features = self.shape(x)[-1]
        if family == "lookup":
            grid, weights = self.grid(x, lookup=True), self.random.choice([3, 15, 33])
            tensors = self._table(features, outputs, weights, grid)
            attrs = {**grid, "in_features": features, "weight_bits": bits_for(weights)}
            return self.add("lookup_linear", x, hidden=True, tensors=tensors, **attrs)
        if family == "int8":
            tensors = int8_tensors(self.b.rng, (outputs, features))
            return self.add("int8_linear", x, hidden=True, tensors=tensors, **self.grid(x))
        if family == "lowbit":
            levels = self.random.choice(LOWBIT_LEVELS)
            group = self.random.choice([n for n in range(1, features + 1) if features % n == 0])
            tensors = lowbit_tensors(self.b.rng, outputs, features, levels, group)
            attrs = {"in_features": features, "levels": levels, "group": group}
            return self.add("lowbit_linear", x, hidden=True, tensors=tensors, **attrs)
        return self.add("linear", x, hidden=True, tensors=self._floats((outputs, features)))

    def _floats(self, shape: tuple[int, ...]) -> dict[str, Array]:
        weight = self.normal(*shape) / np.float32(np.sqrt(np.prod(shape[1:])))
        return {"weight": weight, "bias": self.normal(shape[0])}

    def _table(self, length: int, outputs: int, weights: int, grid: Grid) -> dict[str, Array]:
        bits, zero = grid["act_bits"], grid["act_zero"]
        return lookup_tensors(self.b.rng, length, outputs, bits=bits, weights=weights, zero=zero)

    def encoder(
        self, x: str, family: str | None = None, *, keep: bool = False
    ) -> tuple[Grid, dict[str, Array]]:
        """Attributes and tensors of product-quantised layers that read x; tables are for one."""
        r, shape = self.random, self.shape(x)
        attrs: Grid = dict(self.grid(x))
        length, parts = shape[-1], 1
        if len(shape) == 3:
            attrs.update(vars(self.geometry(x, keep=keep)), in_channels=shape[0])
            rows, columns = attrs["kernel"]
            attrs["group"] = r.choice(["patch", "patch", "row", "pixel"])
            parts = {"patch": 1, "row": rows, "pixel": rows * columns}[attrs["group"]]
            length = shape[0] * rows * columns // parts
        else:
            attrs["in_features"] = length
        bits, count = attrs["act_bits"], r.choice([8, 16, 16, 32])
        family = family or r.choice(["pq", "tree"])
        attrs["encoder"] = "tree" if family == "tree" else "nearest"
        if family == "tree":
            codebooks = r.randint(1, 4)
            tensors = tree_tensors(
                self.b.rng, length, 1, codebooks=codebooks, count=count, bits=bits
            )
        else:
            width = r.choice([2, 3, 4, 9])
            tensors = pq_tensors(self.b.rng, length, 1, count=count, width=width, bits=bits)
        return attrs, {**tensors, "tables": tensors["tables"].repeat(parts, axis=0)}

    def pq(self, x: str, attrs: Grid, encoder: dict[str, Array], outputs: int) -> str:
        """A layer of that encoder with tables of its own; its value is hidden."""
        rng, (codebooks, count, _) = self.b.rng, encoder["tables"].shape
        tensors = {
            **encoder,
            "tables": rng.integers(-128, 128, (codebooks, count, outputs)).astype(np.int8),
            "scale": rng.uniform(0.001, 0.01, outputs).astype(np.float32),
            "bias": self.normal(outputs),
        }
        op = "pq_conv2d" if len(self.shape(x)) == 3 else "pq_linear"
        return self.add(op, x, hidden=True, tensors=tensors, **attrs)

    def near(self, attrs: Grid, encoder: dict[str, Array]) -> tuple[Grid, dict[str, Array]]:
        """What makes other codes than these, by one detail."""
        attrs, encoder = dict(attrs), dict(encoder)
        kinds = ["act_scale", "act_zero", "codebooks", *["padding", "stride"] * ("kernel" in attrs)]
        kind = self.random.choice(kinds)
        if kind == "act_scale":
            attrs[kind] = float(np.float32(attrs[kind] * 0.75))
        elif kind == "act_zero":
            attrs[kind] = (attrs[kind] + 1) % 2 ** attrs["act_bits"]
        elif kind == "codebooks":
            role = "thresholds" if "thresholds" in encoder else "centroids"
            encoder[role] = encoder[role].copy()
            encoder[role].flat[0] = encoder[role].flat[0] == 0
        else:
            attrs[kind] = tuple(size + 1 for size in attrs[kind])
        return attrs, encoder


def _fits_lookup(grid: Grid) -> bool:
    bits, zero = grid["act_bits"], grid["act_zero"]
    return bits <= 6 and zero in (0, 2 ** (bits - 1))
