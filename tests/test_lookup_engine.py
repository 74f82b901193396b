"""Lookup layers of the engine against plain NumPy: the same bits on every instruction set."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sweeps import sweep

from lutra import _engine, runnable_isas

Array = NDArray[Any]
Pair = tuple[int, int]

each_isa = pytest.mark.parametrize("isa", runnable_isas())
POOLS = {threads: _engine.ThreadPool(threads) for threads in (1, 2)}


class Case:
    """A random layer, its input, and what it computes."""

    def __init__(
        self,
        seed: int,
        *,
        size: tuple[int, int, int] = (2, 7, 9),
        channels: int = 3,
        outputs: int = 5,
        bits: int = 4,
        weights: int = 15,
        kernel: Pair = (3, 3),
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        signed: bool | int = False,  # or the index of zero
        entries: str = "random",
    ) -> None:
        rng = np.random.default_rng(seed)
        self.bits, self.zero = bits, 2 ** (bits - 1) if signed is True else int(signed)
        self.scale = 0.37
        levels = 2**bits
        if entries == "random":
            table = rng.integers(-127, 128, (levels, weights))
        elif entries == "small":
            table = rng.integers(-15, 16, (levels, weights))
        else:  # every column from one end of the range to the other
            signs = (-1) ** np.add.outer(np.arange(levels), np.arange(weights))
            table = 127 * signs
        table[self.zero] = 0
        self.table = table.astype(np.int8)
        depth = channels * kernel[0] * kernel[1]
        self.weight = rng.integers(0, weights, (outputs, depth)).astype(np.uint8)
        self.y_scale = rng.normal(size=outputs).astype(np.float32)
        self.bias = rng.normal(size=outputs).astype(np.float32)
        self.channels, self.kernel, self.stride = channels, kernel, stride
        self.padding, self.dilation = padding, dilation
        n, h, w = size
        x = rng.normal(self.scale * (levels / 2 - self.zero), 3 * self.scale, (n, channels, h, w))
        self.x = (x * levels / 8).astype(np.float32)

    def layer(self, isa: str, **change: Any) -> _engine.Layer:
        arguments: dict[str, Any] = {
            "weight": self.weight,
            "table": self.table,
            "scale": self.y_scale,
            "bias": self.bias,
            "act_scale": self.scale,
            "act_zero": self.zero,
            "act_bits": self.bits,
            "weight_bits": 8,
            "in_channels": self.channels,
            "kernel": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            **change,
        }
        tensors = {role: arguments.pop(role) for role in ("weight", "table", "scale", "bias")}
        return _engine.Layer("lookup_conv2d", isa, arguments, tensors)

    def indices(self) -> Array:
        t = np.rint(self.x / np.float32(self.scale)) + self.zero
        return np.clip(t, 0, 2**self.bits - 1).astype(np.uint8)

    def sums(self) -> Array:
        (ph, pw), (kh, kw) = self.padding, self.kernel
        (sh, sw), (dh, dw) = self.stride, self.dilation
        edges = ((0, 0), (0, 0), (ph, ph), (pw, pw))
        q = np.pad(self.indices(), edges, constant_values=self.zero)
        height = (q.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (q.shape[3] - dw * (kw - 1) - 1) // sw + 1
        outputs = len(self.weight)
        weight = self.weight.reshape(outputs, self.channels, kh, kw)
        table = self.table.astype(np.int32)
        sums = np.zeros((len(q), outputs, height, width), np.int32)
        for c in range(self.channels):
            for i in range(kh):
                for j in range(kw):
                    y, x = i * dh, j * dw
                    part = q[:, c, y : y + sh * height : sh, x : x + sw * width : sw]
                    part = part[:, :, :width]
                    for m in range(outputs):
                        sums[:, m] += table[part, weight[m, c, i, j]]
        return sums

    def output(self) -> Array:
        shape = (1, -1, 1, 1)
        y = self.sums().astype(np.float32) * self.y_scale.reshape(shape)
        return y + self.bias.reshape(shape)


def laid_out(a: Array, order: str) -> Array:
    """A copy with the axes (N, C, H, W) in this order in memory."""
    axes = ["NCHW".index(axis) for axis in order]
    return np.ascontiguousarray(a.transpose(axes)).transpose(np.argsort(axes))


def check(case: Case, isa: str, order: str = "NCHW", threads: int = 1) -> None:
    layer, want = case.layer(isa), case.output()
    for wanted in (False, True):
        x = laid_out(case.x, order)
        y = laid_out(np.full(want.shape, np.nan, np.float32), order)
        indices = laid_out(np.full(x.shape, 255, np.uint8), order) if wanted else None
        layer.run(POOLS[threads], x, y, indices)
        np.testing.assert_array_equal(y.view(np.uint32), want.view(np.uint32))
        if indices is not None:
            np.testing.assert_array_equal(indices, case.indices())


@each_isa
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@sweep("weights", [3, 5, 7, 9, 15, 17, 31, 33])
@sweep("signed", [False, True, 1, 3])
@sweep("entries", ["random", "small", "extreme"])
def test_tables(isa: str, bits: int, weights: int, signed: bool | int, entries: str) -> None:
    check(Case(bits, bits=bits, weights=weights, signed=signed, entries=entries), isa)


@each_isa
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((1, 1), (2, 2), (0, 0), (1, 1)),
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((5, 2), (3, 2), (4, 1), (1, 3)),
        ((1, 3), (1, 4), (0, 5), (2, 1)),
    ],
)
@sweep("order", ["NCHW", "NHWC", "CNHW"])
@sweep("bits", [2, 4, 5])
def test_geometry(
    isa: str, order: str, bits: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> None:
    case = Case(
        7,
        size=(2, 9, 11),
        bits=bits,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        signed=True,
    )
    check(case, isa, order, threads=2)


@each_isa
@pytest.mark.parametrize(("bits", "weights"), [(2, 3), (2, 33), (4, 15), (4, 17), (6, 33)])
@sweep("rows", [1, 2, 4, 5, 15, 16, 17, 32, 33, 48, 49, 63, 64, 65, 129])
def test_rows(isa: str, rows: int, bits: int, weights: int) -> None:
    """Linear layers, those of a few rows too, and tiles that are not full."""
    case = Case(
        rows,
        size=(rows, 1, 1),
        channels=37,
        outputs=19,
        bits=bits,
        weights=weights,
        kernel=(1, 1),
    )
    check(case, isa)
    check(case, isa, threads=2)


@each_isa
@sweep("outputs", [1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 130])
@sweep("rows", [3, 20, 64])
def test_numbers_of_outputs(isa: str, outputs: int, rows: int) -> None:
    check(Case(outputs, size=(rows, 1, 1), outputs=outputs, kernel=(1, 1), channels=9), isa)


@each_isa
@pytest.mark.parametrize("bits", [2, 4, 6])
@sweep("depth", [1, 2, 3, 4, 5, 7, 8, 9, 256, 257, 258, 515, 1030, 2100])
def test_depths(isa: str, depth: int, bits: int) -> None:
    """The longest sums of the largest entries."""
    for rows in (2, 40):
        case = Case(
            depth,
            size=(rows, 1, 1),
            channels=depth,
            outputs=3,
            bits=bits,
            weights=3,
            kernel=(1, 1),
        )
        case.table[:] = 127
        case.table[0] = 0
        check(case, isa)
        case.table[1:] = -127
        check(case, isa)


def before_a_wall(a: Array) -> Array:
    """A copy that ends where memory ends that may be read."""
    page = mmap.PAGESIZE
    size = -(-a.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), page, 0) == 0
    copy: Array = np.frombuffer(memory, a.dtype, a.size, size - a.nbytes).reshape(a.shape)
    copy[...] = a
    return copy


@each_isa
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_reads_end_with_the_arrays(isa: str, kernel: Pair) -> None:
    """A read beyond them ends the process."""
    case = Case(1, size=(1, 5, 7), kernel=kernel)
    want = case.output()
    y, indices = np.empty_like(want), before_a_wall(np.zeros(case.x.shape, np.uint8))
    case.layer(isa).run(POOLS[1], before_a_wall(case.x), y, indices)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(indices, case.indices())


BAD = [
    ({"weight": np.zeros((5, 26), np.uint8)}, r"weight indices of the shape \(5, 26\)"),
    ({"scale": np.zeros(4, np.float32)}, "one value per output, 5"),
    ({"bias": np.zeros(6, np.float32)}, "one value per output, 5"),
    ({"act_bits": 1}, "activation bits must be 2..6, not 1"),
    ({"act_bits": 7}, "activation bits must be 2..6, not 7"),
    ({"act_bits": 3}, "activations of 8 levels"),
    ({"act_zero": 3}, "activations of zero have zero responses"),
    ({"act_zero": 16}, "zero point"),
    ({"act_scale": 0.0}, "scale positive"),
    ({"act_scale": float("nan")}, "scale positive"),
    ({"table": np.zeros((16, 14), np.int8)}, "odd number of columns, 3..33, not 14"),
    ({"table": np.zeros((16, 1), np.int8)}, "odd number of columns, 3..33, not 1"),
    ({"table": np.zeros((16, 35), np.int8)}, "odd number of columns, 3..33, not 35"),
    ({"table": np.zeros((16, 3), np.int8)}, r"is not in 0\.\.2"),
    ({"kernel": (0, 3)}, "must be at least 1"),
]


@each_isa
@sweep(("change", "message"), BAD)
def test_bad_layers(isa: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(1).layer(isa, **change)


@each_isa
def test_bad_tables(isa: str) -> None:
    case = Case(1)
    case.table[3, 2] = -128
    with pytest.raises(ValueError, match=r"entry \(3, 2\) is -128; the range is -127\.\.127"):
        case.layer(isa)
    case = Case(1)
    case.table[0, 4] = 5
    with pytest.raises(ValueError, match=r"entry \(0, 4\) is 5, but activations of zero"):
        case.layer(isa)
    case = Case(1)
    case.weight[4, 11] = 15
    with pytest.raises(ValueError, match=r"index 15 of output 4, entry 11 is not in 0\.\.14"):
        case.layer(isa)


@each_isa
def test_bad_arrays(isa: str) -> None:
    case = Case(1)
    layer, pool = case.layer(isa), POOLS[1]
    y = np.empty((2, 5, 5, 7), np.float32)
    with pytest.raises(ValueError, match="do not fit the layer"):
        layer.run(pool, case.x, np.empty((2, 5, 5, 8), np.float32))
    with pytest.raises(ValueError, match="do not fit the layer"):
        layer.run(pool, np.empty((2, 4, 7, 9), np.float32), y)
    with pytest.raises(ValueError, match="do not fit the layer"):
        layer.run(pool, np.empty((2, 3, 2, 9), np.float32), np.empty((2, 5, 0, 7), np.float32))
    with pytest.raises(ValueError, match="indices need the shape and the strides of x"):
        layer.run(pool, case.x, y, np.empty((2, 3, 9, 7), np.uint8).transpose(0, 1, 3, 2))
    gaps = np.empty((2, 3, 7, 18), np.float32)[:, :, :, ::2]
    with pytest.raises(ValueError, match="without gaps"):
        layer.run(pool, gaps, y, np.empty((2, 3, 7, 18), np.uint8)[:, :, :, ::2])


@pytest.mark.parametrize("shape", [(0, 3), (1,), (7, 11), (2, 3, 5, 7), (40000, 5)])
@pytest.mark.parametrize("levels", [4, 64])
def test_gradient(shape: tuple[int, ...], levels: int) -> None:
    rng = np.random.default_rng(levels)
    indices = rng.integers(0, levels, shape).astype(np.uint8)
    x = rng.normal(size=shape).astype(np.float32)
    x.reshape(-1)[:3] = np.array([np.nan, -1.0, 0.5], np.float32)[: x.size]
    gradient = rng.normal(size=shape).astype(np.float32)
    inside = (x > np.float32(-1.0)) & (x < np.float32(0.5))
    wide = gradient.astype(np.float64)
    results = []
    for isa in runnable_isas():
        for threads in (1, 2):
            for order in ("C", "F"):
                rest = np.array(gradient, order=order)
                cells, counts, total = _engine.lookup_gradient(
                    isa,
                    POOLS[threads],
                    np.array(x, order=order),
                    np.array(indices, order=order),
                    rest,
                    -1.0,
                    0.5,
                    levels,
                )
                assert cells.dtype == np.float64
                assert counts.dtype == np.int64
                want = np.bincount(indices.reshape(-1), wide.reshape(-1), levels)
                # sums of a few thousand are in single precision
                close = 1e-5 * np.abs(wide).sum() / levels + 1e-9
                np.testing.assert_allclose(cells, want, rtol=1e-12, atol=close)
                np.testing.assert_array_equal(
                    counts, np.bincount(indices.reshape(-1), minlength=levels)
                )
                np.testing.assert_allclose(
                    total, np.sum(wide[inside] * x[inside].astype(np.float64)), atol=close
                )
                np.testing.assert_array_equal(rest, np.where(inside, gradient, np.float32(0.0)))
                if order == "C":
                    results.append((isa, cells.tobytes(), total))
    assert len(set(results)) == len(runnable_isas())  # whatever the threads


def test_bad_gradients() -> None:
    x, indices = np.zeros((4, 6), np.float32), np.zeros((4, 6), np.uint8)

    def call(
        x: Array, indices: Array, gradient: Array, levels: int = 4, isa: str = "scalar"
    ) -> None:
        _engine.lookup_gradient(isa, POOLS[1], x, indices, gradient, 0.0, 1.0, levels)

    with pytest.raises(ValueError, match="same shape and strides"):
        call(x, indices[:3], x.copy())
    with pytest.raises(ValueError, match="same shape and strides"):
        call(x, indices, np.asfortranarray(x))
    with pytest.raises(ValueError, match="without gaps"):
        call(x[:, :5], indices[:, :5], x.copy()[:, :5])
    with pytest.raises(ValueError, match=r"levels must be 1\.\.256, not 0"):
        call(x, indices, x.copy(), 0)
    with pytest.raises(ValueError, match="an index is not below 4"):
        call(x, indices + np.uint8(9), x.copy())
    with pytest.raises(ValueError, match="nothing"):
        call(x, indices, x.copy(), isa="nothing")
