"""Writes small compiled models: sound ones that together hold every operator, which fuzzing starts
from, and ones whose steps are wrong in ways that random bytes hardly ever are."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from graphs import Array, every_op_graph, tiny_graph
from random_graphs import random_graph
from sequences import (
    every_decoder_graph,
    every_pointwise_op_graph,
    every_selection_graph,
    every_sequence_op_graph,
)

from lutra import compile_plan
from lutra.graph import Graph
from lutra.node import AttrValue
from lutra.ops import OPS
from lutra.runtime.compiled import _Writer
from lutra.runtime.plan import add_steps

#: Larger ones are tried too seldom.
LARGEST = 60_000


_NUMBERS: Final = (
    0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 32, 63, 64, 65, 127, 128, 255, 256, 4096, 4097, 65536, 2**24,
    2**31 - 1, -(2**31),
)  # fmt: skip
_REALS: Final = (
    0.0, -0.0, 1.0, -1.0, 0.5, 1e-310, 1e-30, 1e-5, 63.0, 1e5, 1e30, 1e300, np.inf, -np.inf, np.nan
)  # fmt: skip
_TEXTS: Final = (
    "", "nearest", "nearest-exact", "bilinear", "tree", "patch", "row", "pixel", "zeros", "border",
    "reflection", "none", "tanh",
)  # fmt: skip


class _WrongWriter(_Writer):
    """Writes a plan down, but changes what some steps are made from."""

    def __init__(self, seed: int, often: float) -> None:
        super().__init__()
        self._random, self._often = random.Random(seed), often

    def add(self, op: str, inputs: Any, attrs: Any, tensors: Any, **more: Any) -> int:
        """Adds a step."""
        r = self._random
        while r.random() < self._often:
            kind = r.randrange(8)
            if kind < 3 and attrs:
                name = r.choice(sorted(attrs))
                attrs = {**attrs, name: self._attr(attrs[name])}
            elif kind < 6 and tensors:
                role = r.choice(sorted(tensors))
                tensors = {**tensors, role: self._wrong(tensors[role], tensors)}
            elif kind == 6:
                inputs = [r.randrange(self._values) for _ in inputs]
            else:
                more = self._changed(more)
        return super().add(op, inputs, attrs, tensors, **more)

    def _attr(self, value: AttrValue) -> AttrValue:
        r = self._random
        if r.random() < 0.03:
            return r.choice((True, 1, 1.0, "nearest", (1, 1)))
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return r.choice((*_NUMBERS, value + 1, value - 1, 2 * value))
        if isinstance(value, float):
            return r.choice((*_REALS, 2 * value, -value))
        if isinstance(value, str):
            return r.choice(_TEXTS)
        sizes = list(value)
        if sizes and r.random() < 0.8:
            place = r.randrange(len(sizes))
            sizes[place] = r.choice((*_NUMBERS, sizes[place] + 1, sizes[place] - 1))
        elif r.random() < 0.5:
            sizes.append(r.choice(_NUMBERS))
        return tuple(sizes[: r.randrange(10)])

    def _wrong(self, array: Array, others: Mapping[str, Array]) -> Array:
        r = self._random
        kind = r.randrange(7)
        axis = r.randrange(array.ndim)
        if kind == 0 and array.shape[axis] > 1:
            return np.take(array, range(r.randrange(1, array.shape[axis])), axis)
        if kind == 1:
            return np.repeat(array, 2, axis)
        if kind == 2:
            return np.swapaxes(array, axis, r.randrange(array.ndim))
        if kind == 3:
            return array.reshape(r.choice(((-1,), (1, -1), (-1, 1), (1, 1, -1))))
        if kind == 4:
            return others[r.choice(sorted(others))]
        if kind == 5 and array.dtype == np.float32:
            return np.full_like(array, r.choice((np.nan, np.inf, -1e30, 0.0, 1e-40)))
        if array.dtype == np.float32:
            return (
                np.nan_to_num(array)
                .astype(np.int32)
                .astype(r.choice((np.int8, np.uint8, np.int32)))
            )
        info = np.iinfo(array.dtype)
        return np.full_like(array, r.choice((info.min, info.max, info.max // 2, 0)))

    def _changed(self, more: dict[str, Any]) -> dict[str, Any]:
        r = self._random
        kind = r.randrange(4)
        if kind == 0:
            return {**more, "residual": r.randrange(self._values)}
        if kind == 1:
            return {**more, "clamp": (r.choice(_REALS[:4]), r.choice(_REALS[:4]))}
        if kind == 2 and more.get("planes"):
            return {**more, "planes": [abs(r.choice(_NUMBERS)) for _ in more["planes"]]}
        sizes = [self._other_size(size) for size in more["output_shape"]]
        read = [[self._other_size(size) for size in shape] for shape in more["input_shapes"]]
        return {**more, "output_shape": sizes[: r.randrange(1, 9)], "input_shapes": read}

    def _other_size(self, size: int) -> int:
        r = self._random
        return size if r.random() < 0.6 else r.choice((-1, 1, 2, 3, 4, 64, 4096, size + 1))


def wrong(count: int, first: int = 0) -> dict[str, bytes]:
    """Files with wrong steps by name."""
    graphs, files = list(_graphs().values()), {}
    for seed in range(first, first + count):
        graph = graphs[seed % len(graphs)]
        writer = _WrongWriter(seed, 1 / (1 + len(graph.nodes) / 2))
        add_steps(writer, graph)
        files[f"wrong{seed}"] = writer.content(graph)
    return files


def corpus() -> dict[str, bytes]:
    """The sound files by name."""
    files = {name: compile_plan(graph) for name, graph in _graphs().items()}
    return {name: data for name, data in files.items() if len(data) <= LARGEST}


def _graphs() -> dict[str, Graph]:
    graphs: dict[str, Graph] = {
        "tiny": tiny_graph(),
        "every": every_op_graph(),
        "sequence": every_sequence_op_graph(),
        "pointwise": every_pointwise_op_graph(),
        "selection": every_selection_graph(),
        "decoder": every_decoder_graph(),
    }
    graphs |= {f"random{seed}": random_graph(seed)[0] for seed in range(150)}
    missing = set(OPS) - {node.op for graph in graphs.values() for node in graph.nodes}
    if missing:
        raise SystemExit(f"no graph of the corpus has {', '.join(sorted(missing))}")
    return graphs


def write(folder: Path, files: Mapping[str, bytes]) -> int:
    """Writes files into a folder, which is made, and returns how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / f"{name}.lutrac").write_bytes(data)
    return len(files)


if __name__ == "__main__":
    # FOLDER [COUNT]: sound files, or so many with wrong steps
    made = wrong(int(sys.argv[2])) if len(sys.argv) > 2 else corpus()
    print(write(Path(sys.argv[1]), made), "files")
