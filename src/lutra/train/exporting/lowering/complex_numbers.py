"""Complex numbers of a torch program, written as their real and imaginary parts.

A Fourier transform of an axis of fixed size is a product with constant matrices, of cosines and of
sines. What is left without complex numbers is written in operators that have lowerings.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from lutra.train.exporting.lowering.sources import Sources

_aten = torch.ops.aten
#: What moves values, and does to both parts what it does to a tensor.
_MOVES = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose",
    "permute", "movedim", "slice", "select", "expand", "clone", "contiguous", "alias", "detach",
    "roll", "flip", "cat", "stack", "sum", "mean", "neg", "lift_fresh_copy", "constant_pad_nd",
    "unbind", "split", "split_with_sizes", "chunk", "index_select", "repeat", "slice_scatter",
    "select_scatter", "copy", "index", "gather", "cumsum", "tile", "diagonal", "pad",
)  # fmt: skip
_LINEAR = ("add", "sub")
_PRODUCTS = ("mul", "matmul", "bmm", "mm", "einsum")
#: Of each transform: whether its input is real, whether its result is, whether it is an inverse.
_TRANSFORMS = {
    "fft": (False, False, False),
    "ifft": (False, False, True),
    "rfft": (True, False, False),
    "irfft": (False, True, True),
}


class _Refused(Exception):
    """There is a complex number that cannot be written in two parts."""


@dataclass(frozen=True)
class _Parts:
    """Nodes for the parts of a complex tensor; no imaginary one where it is 0."""

    real: fx.Node
    imaginary: fx.Node | None


def split_complex(program: ExportedProgram) -> None:
    """Write what computes with complex numbers in real ones, in place.

    Where a complex number is left after all the program stays as it is, and errors name what it
    has.
    """
    graph = program.graph
    if not any(_is_complex(node) for node in graph.nodes if node.op == "call_function"):
        return
    before = set(graph.nodes)
    split = _Split(graph, Sources(program))
    replaced: list[tuple[fx.Node, fx.Node]] = []
    try:
        for node in list(graph.nodes):
            if node.op == "call_function" and (made := split.written(node)) is not None:
                replaced.append((node, made))
        if any(_is_complex(node) for node in next(iter(graph.find_nodes(op="output"))).args[0]):
            raise _Refused
    except _Refused:
        for node in reversed(list(graph.nodes)):
            if node not in before:
                graph.erase_node(node)
        return
    for old, new in replaced:
        old.replace_all_uses_with(new)
    graph.eliminate_dead_code()


class _Split:
    """Nodes that were written for those of a graph."""

    def __init__(self, graph: fx.Graph, sources: Sources) -> None:
        self._graph, self._sources = graph, sources
        self._parts: dict[fx.Node, Any] = {}
        self._node: Any = None

    def written(self, node: fx.Node) -> fx.Node | None:
        """What takes the place of a node with real values that reads complex ones; None for any
        other, and for one with complex values, whose parts are remembered."""
        reads = any(_is_complex(each) for each in node.all_input_nodes)
        if not reads and not _is_complex(node):
            return None
        if not self._is_activation(node):
            return None  # torch computes it
        self._node = node
        mode = detect_fake_mode(tree_leaves(node.meta["val"])) or nullcontext()
        with self._graph.inserting_before(node), mode:
            made = self._of(node, _name(node))
        if _is_complex(node):
            self._parts[node] = made
            return None
        if not isinstance(made, _Parts):
            raise _Refused
        return made.real

    def _is_activation(self, node: fx.Node) -> bool:
        return self._sources.is_activation(node)

    def _of(self, node: fx.Node, name: str) -> Any:
        args: Any = node.args
        if name.startswith("fft_"):
            return self._transform(node, name.removeprefix("fft_"))
        if name == "stft":
            return self._spectrogram(node)
        if name == "view_as_complex":
            return _Parts(*(self._call(_aten.select.int, args[0], -1, i) for i in (0, 1)))
        if name in ("complex", "polar"):
            return self._polar(*args) if name == "polar" else _Parts(args[0], args[1])
        if name == "getitem":
            return self._given(args[0])[args[1]]
        if name == "view_as_real":
            x = self._given(args[0])
            return _Parts(self._call(_aten.stack.default, [x.real, self._imaginary(x)], -1), None)
        if name in (
            "real",
            "imag",
            "conj",
            "_conj",
            "conj_physical",
            "abs",
            "angle",
            "resolve_conj",
        ):
            return self._unary(name, self._given(args[0]))
        if name in ("_to_copy", "to"):
            x = self._given(args[0])
            return x if _is_complex(node) else _Parts(x.real, None)
        if name in _LINEAR and not node.kwargs:
            return self._sum(node, *(self._given(x) for x in args[:2]))
        if name == "exp":
            x = self._given(args[0])
            return self._polar(self._call(_aten.exp.default, x.real), self._imaginary(x))
        if name == "reciprocal":
            return self._quotient(self._given(1.0), self._given(args[0]))
        if name == "square" or (name == "pow" and args[1] == 2):
            x = self._given(args[0])
            return self._product_of(_aten.mul.Tensor, x, x)
        if name == "div" and not node.kwargs and _is_complex(args[1]):
            return self._quotient(*(self._given(x) for x in args[:2]))
        if name == "div" and not _is_complex(args[1]) and not isinstance(args[1], complex):
            x = self._given(args[0])
            return self._each(x, lambda part: self._call(node.target, part, *args[1:]))
        if name in _PRODUCTS:
            return self._product(node, args)
        if name in _MOVES:
            return self._moved(node)
        raise _Refused

    def _given(self, x: Any) -> Any:
        """An argument in its parts."""
        if isinstance(x, (int, float, complex)):
            return _Parts(x.real, x.imag if isinstance(x, complex) else None)  # type: ignore[arg-type]
        if x in self._parts:
            return self._parts[x]
        if not _is_complex(x):
            return _Parts(x, None)
        self._parts[x] = _Parts(  # a constant, or what depends on sizes
            self._call(_aten.real.default, x), self._call(_aten.imag.default, x)
        )
        return self._parts[x]

    def _unary(self, name: str, x: _Parts) -> _Parts:
        if name == "real":
            return _Parts(x.real, None)
        if name == "imag":
            return _Parts(self._imaginary(x), None)
        if name == "abs":
            square = self._call(_aten.mul.Tensor, x.real, x.real)
            if x.imaginary is not None:
                other = self._call(_aten.mul.Tensor, x.imaginary, x.imaginary)
                square = self._call(_aten.add.Tensor, square, other)
            return _Parts(self._call(_aten.sqrt.default, square), None)
        if name == "angle":
            return _Parts(self._call(_aten.atan2.default, self._imaginary(x), x.real), None)
        if name == "resolve_conj" or x.imaginary is None:
            return x
        return _Parts(x.real, self._call(_aten.neg.default, x.imaginary))

    def _imaginary(self, x: _Parts) -> fx.Node:
        if x.imaginary is not None:
            return x.imaginary
        return self._call(_aten.mul.Tensor, x.real, 0.0)

    def _polar(self, size: fx.Node, angle: fx.Node) -> _Parts:
        parts = (self._call(f, angle) for f in (_aten.cos.default, _aten.sin.default))
        return _Parts(*(self._call(_aten.mul.Tensor, size, part) for part in parts))

    def _sum(self, node: fx.Node, a: _Parts, b: _Parts) -> _Parts:
        target: Any = _aten.add.Tensor if _name(node) == "add" else _aten.sub.Tensor
        real = self._call(target, a.real, b.real)
        if b.imaginary is None:
            imaginary = a.imaginary
        elif a.imaginary is None:
            imaginary = b.imaginary
            if _name(node) == "sub":
                imaginary = self._call(_aten.neg.default, imaginary)
        else:
            imaginary = self._call(target, a.imaginary, b.imaginary)
        if imaginary is not None and imaginary.meta["val"].shape != real.meta["val"].shape:
            imaginary = self._call(
                _aten.add.Tensor, imaginary, self._call(_aten.mul.Tensor, real, 0.0)
            )
        return _Parts(real, imaginary)

    def _product(self, node: fx.Node, args: Any) -> _Parts:
        einsum = _name(node) == "einsum"
        pair = args[1] if einsum else args[:2]
        if len(pair) != 2:
            raise _Refused
        a, b = (self._given(x) for x in pair)

        def times(x: Any, y: Any) -> fx.Node:
            if einsum:
                return self._call(node.target, args[0], [x, y])
            if not isinstance(x, fx.Node):
                x, y = y, x
            return self._call(node.target, x, y)

        return self._product_by(times, a, b)

    def _product_of(self, target: Any, a: _Parts, b: _Parts) -> _Parts:
        return self._product_by(lambda x, y: self._call(target, x, y), a, b)

    def _product_by(self, times: Callable[[Any, Any], fx.Node], a: _Parts, b: _Parts) -> _Parts:
        """(a + b i) (c + d i)."""
        real = times(a.real, b.real)
        if a.imaginary is not None and b.imaginary is not None:
            both = times(a.imaginary, b.imaginary)
            real = self._call(_aten.sub.Tensor, real, both)
        cross = [
            times(x, y)
            for x, y in ((a.real, b.imaginary), (a.imaginary, b.real))
            if x is not None and y is not None
        ]
        imaginary = cross[0] if cross else None
        if len(cross) == 2:
            imaginary = self._call(_aten.add.Tensor, *cross)
        return _Parts(real, imaginary)

    def _quotient(self, a: _Parts, b: _Parts) -> _Parts:
        """a conj(b) / |b|^2."""
        size = self._call(_aten.mul.Tensor, b.real, b.real)
        other = self._imaginary(b)
        size = self._call(_aten.add.Tensor, size, self._call(_aten.mul.Tensor, other, other))
        turned = _Parts(b.real, self._call(_aten.neg.default, other))
        number: Any = a.real  # of a real number that is no tensor
        if isinstance(number, (int, float)):
            made = self._each(turned, lambda part: self._call(_aten.mul.Tensor, part, number))
        else:
            made = self._product_of(_aten.mul.Tensor, a, turned)
        return self._each(made, lambda part: self._call(_aten.div.Tensor, part, size))

    def _each(self, x: _Parts, make: Callable[[Any], fx.Node]) -> _Parts:
        return _Parts(make(x.real), None if x.imaginary is None else make(x.imaginary))

    def _moved(self, node: fx.Node) -> Any:
        target: Any = node.target
        split: dict[fx.Node, _Parts] = {
            each: self._given(each) for each in node.all_input_nodes if _is_tensor(each)
        }
        parts: list[Any] = []
        for imaginary in (False, True):

            def part(x: fx.Node, imaginary: bool = imaginary) -> Any:
                if x not in split:
                    return x
                return self._imaginary(split[x]) if imaginary else split[x].real

            args: Any = fx.map_arg(node.args, part)
            parts.append(self._call(target, *args, **node.kwargs))
        if isinstance(node.meta["val"], (list, tuple)):
            count = len(node.meta["val"])
            return [
                _Parts(*(self._call(operator.getitem, each, i) for each in parts))
                for i in range(count)
            ]
        return _Parts(*parts)

    # ---- Fourier transforms -----------------------------------------------------------------

    def _transform(self, node: fx.Node, name: str) -> _Parts:
        if name in ("fftshift", "ifftshift"):
            return self._shifted(node, inverse=name == "ifftshift")
        kind = name.rstrip("2n")
        if kind not in _TRANSFORMS:
            raise _Refused
        args: list[Any] = [*node.args, *(None,) * (4 - len(node.args))]
        sizes = node.kwargs.get("n", node.kwargs.get("s", args[1]))
        axes = node.kwargs.get("dim", args[2])
        norm: Any = node.kwargs.get("norm", args[3])
        x: _Parts = self._given(args[0])
        rank: int = args[0].meta["val"].ndim
        if name == kind:
            axes, sizes = [-1 if axes is None else axes], None if sizes is None else [sizes]
        elif axes is None:
            axes = [-2, -1] if name.endswith("2") else list(range(-len(sizes or [0] * rank), 0))
        sizes = [None] * len(axes) if sizes is None else sizes
        _, gives_real, inverse = _TRANSFORMS[kind]
        turns = list(zip(axes, sizes, strict=True))
        # only the last axis is half of what it stands for
        order = turns if gives_real else turns[::-1]
        for place, (axis, size) in enumerate(order):
            last = place == (len(order) - 1 if gives_real else 0)
            half = (kind[0] == "r" and last) or (gives_real and last)
            x = self._along(x, axis % rank, size, half, inverse, norm)
        return x

    def _shifted(self, node: fx.Node, inverse: bool) -> _Parts:
        x: Any = node.args[0]
        axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        sizes = x.meta["val"].shape
        axes = list(range(len(sizes))) if axes is None else axes
        axes = [axes] if isinstance(axes, int) else list(axes)
        if not all(isinstance(sizes[axis], int) for axis in axes):
            raise _Refused
        shifts = [(sizes[axis] + inverse) // 2 for axis in axes]
        return self._each(
            self._given(x), lambda part: self._call(_aten.roll.default, part, shifts, axes)
        )

    def _spectrogram(self, node: fx.Node) -> _Parts:
        """Transforms of the windows of signals (N, T): two convolutions."""
        given: list[Any] = [*node.args, *(None,) * (8 - len(node.args))]
        x, size, hop, width, window, normalized, onesided, as_complex = given[:8]
        if x.meta["val"].ndim != 2 or as_complex is False or self._is_complex_or_moving(window):
            raise _Refused
        hop, width = hop or size // 4, width or size
        count = size if onesided is False else size // 2 + 1
        scale = size**-0.5 if normalized else 1.0
        signal = self._call(_aten.unsqueeze.default, x, 1)
        parts = []
        for function, sign in ((_aten.cos.default, 1.0), (_aten.sin.default, -1.0)):
            weight = self._matrix(count, size, size, sign * scale, function)
            if window is not None:
                left = (size - width) // 2
                pads = [left, size - width - left]
                whole = self._call(_aten.constant_pad_nd.default, window, pads, 0.0)
                weight = self._call(_aten.mul.Tensor, weight, whole)
            elif width != size:
                raise _Refused
            weight = self._call(_aten.unsqueeze.default, weight, 1)
            parts.append(self._call(_aten.conv1d.default, signal, weight, None, [hop]))
        return _Parts(*parts)

    def _is_complex_or_moving(self, window: Any) -> bool:
        return window is not None and (_is_complex(window) or self._is_activation(window))

    def _along(
        self, x: _Parts, axis: int, size: Any, half: bool, inverse: bool, norm: str | None
    ) -> _Parts:
        """A transform of one axis, of which a real one holds half."""
        given = x.real.meta["val"].shape[axis]
        if not isinstance(given, int) or not isinstance(size, (int, type(None))):
            raise _Refused
        if size is None or size < 0:
            size = 2 * (given - 1) if half and inverse else given
        wanted = size // 2 + 1 if half and inverse else size
        if wanted != given:
            x = self._each(x, lambda part: self._cut(part, axis, given, wanted))
        rows, columns = (size, size)
        if half:
            rows, columns = (wanted, size) if inverse else (size, size // 2 + 1)
        scale = {"ortho": size**-0.5, "forward": 1.0 if inverse else 1 / size}.get(
            norm or "backward", 1 / size if inverse else 1.0
        )
        cosines = self._matrix(rows, columns, size, scale, _aten.cos.default)
        sines = self._matrix(rows, columns, size, scale, _aten.sin.default)
        if half and inverse:  # entries that stand for two
            cosines, sines = (self._doubled(each, rows, size) for each in (cosines, sines))
        sign = 1.0 if inverse else -1.0
        real = self._times(x.real, cosines, axis)
        imaginary = None
        if x.imaginary is not None:
            other = self._times(x.imaginary, sines, axis)
            target = _aten.sub.Tensor if inverse else _aten.add.Tensor
            real = self._call(target, real, other)
        if half and inverse:
            return _Parts(real, None)
        imaginary = self._call(_aten.mul.Tensor, self._times(x.real, sines, axis), sign)
        if x.imaginary is not None:
            other = self._times(x.imaginary, cosines, axis)
            imaginary = self._call(_aten.add.Tensor, imaginary, other)
        return _Parts(real, imaginary)

    def _cut(self, x: fx.Node, axis: int, given: int, wanted: int) -> fx.Node:
        """An axis with its end left out, or zeros behind it."""
        if wanted < given:
            return self._call(_aten.slice.Tensor, x, axis, 0, wanted)
        pads = [0, 0] * (x.meta["val"].ndim - 1 - axis) + [0, wanted - given]
        return self._call(_aten.constant_pad_nd.default, x, pads, 0.0)

    def _times(self, x: fx.Node, matrix: fx.Node, axis: int) -> fx.Node:
        rank = x.meta["val"].ndim
        if axis == rank - 1:
            return self._call(_aten.matmul.default, x, matrix)
        turned = self._call(_aten.transpose.int, x, axis, -1)
        made = self._call(_aten.matmul.default, turned, matrix)
        return self._call(_aten.transpose.int, made, axis, -1)

    def _matrix(self, rows: int, columns: int, size: int, scale: float, function: Any) -> fx.Node:
        """Of the function of 2 pi j k / size, times a scale."""
        places = (
            self._call(_aten.arange.default, count, dtype=torch.int64) for count in (rows, columns)
        )
        down, across = places
        down = self._call(_aten.unsqueeze.default, down, 1)
        turns = self._call(_aten.mul.Tensor, down, across)
        turns = self._call(_aten.remainder.Scalar, turns, size)
        turns = self._call(_aten._to_copy.default, turns, dtype=torch.float64)
        angle = self._call(_aten.mul.Tensor, turns, 2 * math.pi / size)
        made = self._call(_aten.mul.Tensor, self._call(function, angle), scale)
        return self._call(_aten._to_copy.default, made, dtype=torch.float32)

    def _doubled(self, matrix: fx.Node, rows: int, size: int) -> fx.Node:
        """Rows of a matrix twice, but for those that stand for one: the first, and the last of an
        even size."""
        single: Sequence[int] = (0, rows - 1) if size % 2 == 0 else (0,)
        factors = [1.0 if row in single else 2.0 for row in range(rows)]
        parts = [self._call(_aten.full.default, [1, 1], each) for each in factors]
        return self._call(_aten.mul.Tensor, matrix, self._call(_aten.cat.default, parts, 0))

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made: fx.Node = self._graph.call_function(target, args, kwargs)
        values: Any = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
        place = {k: self._node.meta[k] for k in ("nn_module_stack",) if k in self._node.meta}
        made.meta = {**place, "val": target(*values[0], **values[1])}
        return made


def _name(node: fx.Node) -> str:
    target = str(node.target)
    return (
        target.split(".")[1] if target.startswith("aten.") else getattr(node.target, "__name__", "")
    )


def _is_tensor(node: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, list, tuple))


def _is_complex(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(each, Tensor) and each.is_complex() for each in values)
