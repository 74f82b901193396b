"""Random graphs for the property tests of the engine's plan: a seed gives a graph and its inputs.

The plan decides which values are floats, which are integers on grids and who makes them, which
steps take over the steps behind them, and which layers share their codes. The graphs are small and
full of what these decisions depend on: values with many readers on different grids, branches that
end in sums, layers with equal encoders, outputs that are also read inside. Every value is computed
while the graph grows, so that the grids fit the values.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from graphs import Array, Builder
from random_layers import Grid
from random_steps import MAX_SIDE, StepGrower

from lutra.graph import Graph
from lutra.ops.elementwise import NO_LIMIT
from lutra.ops.pool import pooled_size

MAX_CHANNELS = 14
IDS = 7


def random_graph(seed: int) -> tuple[Graph, dict[str, Array]]:
    """A graph of some 4 to 30 nodes, with random weights, and an array for each of its inputs."""
    structure = random.Random(seed)
    b, feeds = _inputs(seed, structure)
    return _Grower(b, structure, dict(feeds)).grow(), feeds


@dataclass
class _Grower(StepGrower):
    """A graph that grows; its inputs are there."""

    _hub: str = ""

    def grow(self) -> Graph:
        self._begin()
        ways: list[tuple[Callable[[], None], int]] = [
            (self.block, 6),
            (self.siblings, 3),
            (self.fan, 4),
            (self.chain, 3),
            (self.single, 3),
            (self.pair, 4),
            (self.concat, 2),
            (self.attention, 1),
            (self.newest, 3),
        ]
        grow, weights = zip(*ways, strict=True)
        size = self.random.randint(3, 22)
        while len(self.b.nodes) < size:
            self.random.choices(grow, weights)[0]()
        return self.b.graph(*self._outputs())

    def _begin(self) -> None:
        for name, array in dict(self.arrays).items():
            if array.dtype != np.int32:
                self.open.append(name)
            elif array.ndim == 2 and self.chance(0.7):
                self.embedding(name)
            else:
                self.add("cast", name)

    def embedding(self, ids: str) -> None:
        wide, length = self.random.choice([4, 8, 13]), self.shape(ids)[0]
        tensors = {"weight": self.normal(IDS, wide)}
        y = self.add("embedding", ids, tensors=tensors, hidden=self.hide())
        if self.chance(0.6):
            tensors = {"weight": self.normal(length, wide)}
            y = self.add("position_embedding", y, tensors=tensors, hidden=True)
        self._maybe_open(y, 1.0)
        if self.chance(0.4):
            self.add("masked_mean", y, ids)

    def _outputs(self) -> list[str]:
        """Most ends of the graph, and some values that are read inside too."""
        read = {name for node in self.b.nodes for name in node.inputs}
        made = [node.output for node in self.b.nodes]
        ends = [name for name in made if name not in read]
        outputs = [name for name in ends if self.chance(0.93)] or ends[-1:]
        share = self.random.choice([0.0, 0.05, 0.15, 0.4])
        outputs += [name for name in made if name in read and self.chance(share)]
        self.random.shuffle(outputs)
        return outputs

    def pick(self, axes: int | None = None) -> str | None:
        """A value to read, of so many axes a sample: often the last one, or one that many read."""
        names = [x for x in self.open if axes is None or len(self.shape(x)) == axes]
        if not names:
            return None
        if self._hub not in self.open or self.chance(0.15):
            self._hub = self.random.choice(self.open)
        if self._hub in names and self.chance(0.35):
            return self._hub
        return names[-1] if self.chance(0.4) else self.random.choice(names)

    def any(self) -> str:
        return self.pick() or self.open[-1]

    def hide(self) -> bool:
        return self.chance(0.8)

    def partner(self, name: str) -> str:
        """A value of the same shape: one that exists, or one that is made now."""
        shape, r = self.shape(name), self.random
        alike = [x for x in self.open if self.shape(x) == shape and x != name]
        if alike and self.chance(0.5):
            return r.choice(alike)
        sources = [
            x
            for x in self.open
            if len(self.shape(x)) == len(shape) and len(shape) > 0
            and self._places(x) == self._places(name)
        ]  # fmt: skip
        if sources and self.chance(0.7):
            wide = shape[0] if len(shape) == 3 else shape[-1]
            made = self.layer(r.choice(sources), wide, keep=True)
            if self.chance(0.5):
                made = self.function_or_clamp(made, hidden=True)
            return self._maybe_open(made)
        if alike:
            return self.function_or_clamp(r.choice(alike), hidden=self.hide())
        return name

    def _places(self, name: str) -> tuple[int, ...]:
        """The sizes that a layer keeps."""
        shape = self.shape(name)
        return shape[1:] if len(shape) == 3 else shape[:-1]

    def _maybe_open(self, name: str, share: float = 0.2) -> str:
        if name not in self.open and self.chance(share):
            self.open.append(name)
        return name

    def tail(self, y: str, *, share: float = 0.4) -> str:
        """What often stands behind a layer: a sum, a clamp, a function, in this order or not."""
        if self.chance(share):
            self._maybe_open(y)
            other = self.partner(y)
            if other != y or self.chance(0.2):
                pair = [y, other]
                self.random.shuffle(pair)
                y = self.add("add", *pair, hidden=True)
        if self.chance(0.4):
            y = self.clamp(self._maybe_open(y), hidden=True)
        if self.chance(0.3):
            y = self.function(self._maybe_open(y), hidden=True)
        if self.chance(0.35):
            y = self.functions(self._maybe_open(y))
        if y not in self.open:
            self.open.append(y)
        return y

    def block(self) -> None:
        x = self.any()
        if self.chance(0.25):
            self.tail(self.layer(self.padded(x)))
        else:
            self.tail(self.layer(x, keep=self.chance(0.5)))

    def newest(self) -> None:
        x = self.any()
        self.tail(self.newer(self.padded(x) if self.chance(0.2) else x))

    def siblings(self) -> None:
        """Layers that make the same codes of one value, and what is behind them."""
        x, r = self.any(), self.random
        attrs, encoder = self.encoder(x, keep=self.chance(0.6))
        alike, ends = r.choice(["none", "clamp", "any", "any"]), []
        wide = r.choice([3, 4, 8, 8])
        for _ in range(r.randint(2, 3)):
            own = wide if self.chance(0.5) else r.choice([1, 3, 5, 12])
            near = self.near(attrs, encoder) if self.chance(0.15) else (attrs, encoder)
            ends.append(self.pq(x, *near, own))
            if self.chance(0.2):
                self.single()
        for y in ends:
            if alike == "any":
                self.tail(y, share=0.25)
            else:
                self.open.append(self.add("relu", y, hidden=True) if alike == "clamp" else y)

    def fan(self) -> None:
        """Several readers of one value: layers on grids, moves in front of them, float steps."""
        x = self.any()
        for _ in range(self.random.randint(2, 5)):
            kind = self.random.choice(["layer", "layer", "moved", "moved", "float"])
            if kind == "layer":
                self.open.append(self.layer(x, integers=True))
            elif kind == "moved":
                y = self.move(x, hidden=True)
                self.open.append(self.layer(y, integers=True))
                self._maybe_open(y)
            else:
                self.function_or_clamp(x, hidden=False)

    def chain(self) -> None:
        """Moves one behind the other, with readers on the way."""
        y = self.any()
        for _ in range(self.random.randint(1, 3)):
            y = self.move(y, hidden=True)
            if self.chance(0.4):
                self.open.append(self.layer(y, integers=True))
            self._maybe_open(y, 0.3)
        self.tail(self.layer(y)) if self.chance(0.6) else self._maybe_open(y, 1.0)

    # -- steps

    def single(self) -> None:
        x = self.any()
        kind = self.random.choice(["move", "function", "affine", "reduce", "norm"])
        if kind == "move":
            self.move(x, hidden=False)
        elif kind == "function":
            self.function_or_clamp(x, hidden=False)
        elif kind == "affine":
            self.tail(self.functions(x))
        elif kind == "norm":
            self.norm(x)
        elif len(self.shape(x)) > 1:
            axes = self.random.choice([(1,), (2,), (2, 3)] if len(self.shape(x)) == 3 else [(1,)])
            op, keepdims = self.random.choice(["mean", "max"]), self.chance(0.5)
            self.add(op, x, axes=axes, keepdims=keepdims)

    def clamp(self, x: str, *, hidden: bool) -> str:
        op = self.random.choice(["relu", "relu", "relu6", "clamp"])
        attrs = {"low": -0.75, "high": self.random.choice([0.5, 1.5])} if op == "clamp" else {}
        return self.add(op, x, hidden=hidden, **attrs)

    def function(self, x: str, *, hidden: bool) -> str:
        op = self.random.choice(["gelu", "silu", "sigmoid", "tanh", "piecewise"])
        if op != "piecewise":
            return self.add(op, x, hidden=hidden)
        tensors = {"slope": self.normal(8), "intercept": self.normal(8)}
        tensors["breakpoint"] = np.sort(self.normal(7))
        return self.add(op, x, hidden=hidden, tensors=tensors)

    def function_or_clamp(self, x: str, *, hidden: bool) -> str:
        return (self.clamp if self.chance(0.5) else self.function)(x, hidden=hidden)

    def norm(self, x: str) -> str:
        size = self.shape(x)[-1]
        if len(self.shape(x)) == 3 or self.chance(0.3):
            return self.add("softmax", x, axis=self.random.randint(1, len(self.shape(x))))
        tensors = {"weight": self.normal(size)}
        if self.chance(0.3):
            return self.add("rms_norm", x, tensors=tensors, eps=1e-5)
        return self.add("layer_norm", x, tensors={**tensors, "bias": self.normal(size)}, eps=1e-5)

    def pair(self) -> None:
        """Two values put together, or one with itself, or with one of its means."""
        x = self.any()
        op = self.random.choice(["add", "add", "mul", "sub"])
        other = x if self.chance(0.1) else self.partner(x)
        if len(self.shape(x)) == 3 and self.chance(0.2):
            other = self.add("mean", x, axes=(2, 3), keepdims=True, hidden=self.hide())
            if self.chance(0.5):
                other = self.layer(other, self.shape(x)[0], keep=True)
                other = self.add("sigmoid", other, hidden=True)
        tops = [float(np.abs(self.arrays[name]).max()) for name in (x, other)]
        if op == "mul" and tops[0] * tops[1] > 50:
            op = "add"
        pair = [x, other]
        self.random.shuffle(pair)
        self.add(op, *pair)

    def concat(self) -> None:
        x = self.any()
        shape = self.shape(x)
        axis = self.random.randint(1, len(shape))
        rest = [size for i, size in enumerate(shape, 1) if i != axis]
        fit = [
            y
            for y in self.open
            if len(self.shape(y)) == len(shape)
            and [size for i, size in enumerate(self.shape(y), 1) if i != axis] == rest
        ]
        names = [x, *self.random.choices(fit, k=self.random.randint(1, 2))]
        self.random.shuffle(names)
        if sum(self.shape(y)[axis - 1] for y in names) <= 2 * MAX_CHANNELS:
            self.add("concat", *names, axis=axis)

    def attention(self) -> None:
        """Attention of layers that may share their codes."""
        x = self.pick(2)
        if x is None:
            return
        attrs, encoder = self.encoder(x)
        wide = self.random.choice([4, 8])
        names = [
            self.pq(x, attrs, encoder, wide) if self.chance(0.8) else self.layer(x, wide)
            for _ in range(3)
        ]
        for name in names:
            self._maybe_open(name)
        op, causal = "attention", self.chance(0.3)
        if self.chance(0.4):  # keys with positive sums only, or those of a slice of the keys
            op = "masked_attention"
            names.append(self.add("mean", self.add("relu", names[1]), axes=(2,)))
        self.add(op, *names, heads=2, scale=0.5, causal=causal)

    def move(self, x: str, *, hidden: bool) -> str:
        """A step that only moves values, or takes one of several: the plan may do it on bytes."""
        rank = len(self.shape(x))
        kinds = [self._slice, self._slice, self._pad, self._reshape, self._gather, self.mirrored]
        if rank == 3:
            kinds += [self._max_pool, self._max_pool, self._max_pool, self._avg_pool]
            kinds += [self._upsample, self._pixel_shuffle]
        if rank == 2:
            kinds.append(self._transpose)
        return self.random.choice(kinds)(x, hidden)

    def _slice(self, x: str, hidden: bool) -> str:
        axis = self.random.randint(1, len(self.shape(x)))
        size = self.shape(x)[axis - 1]
        start = self.random.randint(0, (size - 1) // 2)
        stop = self.random.randint(start + 1, size)
        step = self.random.choice([1, 1, 2])
        return self.add("slice", x, hidden=hidden, axis=axis, start=start, stop=stop, step=step)

    def _gather(self, x: str, hidden: bool) -> str:
        axis = self.random.randint(1, len(self.shape(x)))
        index = self.b.rng.integers(0, self.shape(x)[axis - 1], self.random.randint(1, 5))
        tensors = {"index": index.astype(np.int32)}
        return self.add("gather", x, hidden=hidden, tensors=tensors, axis=axis)

    def _pad(self, x: str, hidden: bool) -> str:
        shape = self.shape(x)
        most = 0 if self.chance(0.2) or max(shape) >= MAX_SIDE else 1
        pads = (0, 0, *(self.random.randint(0, most) for _ in range(2 * len(shape))))
        return self.add("pad", x, hidden=hidden, pads=pads, value=self.random.choice([0.0, 0.5]))

    def _reshape(self, x: str, hidden: bool) -> str:
        shape = self.shape(x)
        total = int(np.prod(shape))
        kind = self.random.choice(["flatten", "rows", "images", "tokens"])
        if kind == "tokens" and len(shape) == 3:
            return self.add("reshape", x, hidden=hidden, shape=(shape[0], -1))
        if kind == "rows" and len(shape) > 1:
            return self.add("flatten", x, hidden=hidden, start_axis=len(shape) - 1)
        if kind == "images" and total % 4 == 0 and total <= 4 * MAX_CHANNELS:
            return self.add("reshape", x, hidden=hidden, shape=(total // 4, 2, 2))
        if total <= 400:
            return self.add("flatten", x, hidden=hidden)
        return self._slice(x, hidden)

    def _window(self, x: str) -> Grid:
        """The attributes of a pooling that fits."""
        r = self.random
        while True:
            kernel = (r.randint(1, 3), r.randint(1, 3))
            stride = r.choice([kernel, (1, 1), (2, 2)])
            padding = tuple(r.choice([0, k // 2]) for k in kernel)
            ceil = self.chance(0.3)
            spans = zip(self.shape(x)[1:], kernel, stride, padding, strict=True)
            if all(pooled_size(*span, 1, ceil) > 0 for span in spans):
                return {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil}

    def _max_pool(self, x: str, hidden: bool) -> str:
        if self.chance(0.1):
            return self.add("adaptive_max_pool2d", x, hidden=hidden, output_size=(2, 3))
        x = self.padded(x, 0.0, -0.75, -NO_LIMIT) if self.chance(0.3) else x
        y = self.add("max_pool2d", x, hidden=hidden, **self._window(x))
        if float(self.arrays[y].min()) <= -NO_LIMIT:  # a window of nothing but borders
            y = self.add("relu", y, hidden=hidden)
        return y

    def _avg_pool(self, x: str, hidden: bool) -> str:
        if self.chance(0.3):
            return self.add("adaptive_avg_pool2d", x, hidden=hidden, output_size=(2, 1))
        x = self.padded(x) if self.chance(0.3) else x
        return self.add("avg_pool2d", x, hidden=hidden, **self._window(x))

    def _upsample(self, x: str, hidden: bool) -> str:
        mode = self.random.choice(["nearest", "nearest", "nearest-exact", "bilinear"])
        like = self.pick(3)
        if like is not None and self.chance(0.4):
            return self.add("upsample", x, like, hidden=hidden, mode=mode)
        if max(self.shape(x)[1:]) > MAX_SIDE // 2 or self.chance(0.3):
            return self.add("upsample", x, hidden=hidden, mode=mode, size=(5, 4))
        return self.add("upsample", x, hidden=hidden, mode=mode, scale_h=2.0, scale_w=2.0)

    def _pixel_shuffle(self, x: str, hidden: bool) -> str:
        channels, height, width = self.shape(x)
        if channels % 4 or max(height, width) > MAX_SIDE // 2:
            return self._slice(x, hidden)
        return self.add("pixel_shuffle", x, hidden=hidden, factor=2)

    def _transpose(self, x: str, hidden: bool) -> str:
        return self.add("transpose", x, hidden=hidden, axes=(0, 2, 1))


def _inputs(seed: int, r: random.Random) -> tuple[Builder, dict[str, Array]]:
    """A graph of one or two inputs and nothing else, and their arrays."""
    samples = r.choice([1, 1, 2, 3, 5])
    batch = samples if r.random() < 0.2 else None
    image = (r.randint(1, 8), r.randint(3, 10), r.randint(3, 10))
    rows = r.choice([(r.randint(2, 24),), (r.randint(1, 7), r.choice([4, 8, 12, 13]))])
    shapes = r.choice([[image], [image], [image], [image, image], [image, rows], [rows], [rows]])
    dtypes = ["int32" if r.random() < 0.25 / len(s) else "float32" for s in shapes]
    b = Builder(*((f"x{i}", (batch, *s), dtypes[i]) for i, s in enumerate(shapes)), seed=seed)
    feeds = {}
    for value, shape in zip(b.inputs, shapes, strict=True):
        size = (samples, *shape)
        ids = b.rng.integers(0, IDS, size)
        array = ids if value.dtype == "int32" else b.rng.normal(size=size)
        feeds[value.name] = array.astype(value.dtype)
    return b, feeds
