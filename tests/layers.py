"""Lookup layers for tests of the kernels: random ones, and the engine's answer for them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from graphs import pq_tensors

from lutra import Graph, Node, Value, _engine
from lutra.reference import run_node
from lutra.reference.pq import quantise, row_codes
from lutra.reference.windows import patches, windows

Array = np.ndarray[Any, Any]

CANARY = np.float32(-12345.75)
GUARD = 64  # elements before and after an output


@dataclass(frozen=True)
class Layer:
    """A convolution by table lookup with its input; a linear layer has 1x1 pixels."""

    x: Array  # (N, C, H, W)
    tensors: dict[str, Array]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    act_scale: float = 0.05
    act_zero: int = 0
    act_bits: int = 7
    group: str = "patch"
    distance: str = "l2"
    node: Node = field(init=False)

    def __post_init__(self) -> None:
        attrs: dict[str, Any] = {
            "in_channels": self.x.shape[1],
            "kernel": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "act_scale": self.act_scale,
            "act_zero": self.act_zero,
            "act_bits": self.act_bits,
            "encoder": "tree" if "splits" in self.tensors else "nearest",
            "group": self.group,
            "distance": self.distance,
        }
        roles = {role: role for role in self.tensors}
        object.__setattr__(self, "node", Node("pq_conv2d", "layer", ("x",), "y", attrs, roles))

    def graph(self) -> Graph:
        """A graph of this layer alone."""
        value = Value("x", "float32", (None, *self.x.shape[1:]))
        return Graph((value,), ("y",), (self.node,), self.tensors)

    def reference(self) -> Array:
        """(N, M, Ho, Wo) from the reference executor."""
        return run_node(self.node, [self.x], self.tensors)

    def quantised_rows(self) -> Array:
        """uint8 (N * Ho * Wo, D): what is searched for in the codebooks."""
        x_q = quantise(self.x, self.act_scale, self.act_zero, self.act_bits)
        around = [(0, 0), (0, 0), (self.padding[0],) * 2, (self.padding[1],) * 2]
        padded = np.pad(x_q, around, constant_values=self.act_zero)
        view = windows(padded, self.kernel, self.stride, self.dilation)
        return np.concatenate([block for _, _, block in patches(view)])

    def reference_codes(self) -> Array:
        """uint8 (B, N * Ho * Wo) from the reference executor."""
        codes = row_codes(self.node, self.quantised_rows(), self.tensors)
        return np.ascontiguousarray(codes.T.astype(np.uint8))

    def native(self, isa: str) -> _engine.Layer:
        """The layer in the engine."""
        return _engine.Layer(self.node.op, isa, self.node.attrs, self.tensors)


def random_layer(
    seed: int,
    *,
    size: tuple[int, int, int] = (1, 1, 1),
    channels: int = 1,
    outputs: int = 5,
    count: int = 16,
    width: int = 9,
    kernel: tuple[int, int] = (1, 1),
    act_bits: int = 7,
    act_zero: int = 0,
    **attrs: Any,
) -> Layer:
    """A random layer; ``size`` is (N, H, W)."""
    rng = np.random.default_rng(seed)
    length = channels * kernel[0] * kernel[1]
    tensors = pq_tensors(rng, length, outputs, count=count, width=width, bits=act_bits)
    n, height, columns = size
    # covers the grid and goes beyond it on both sides
    top = 2**act_bits
    x = rng.uniform(-0.1 * top, 1.1 * top, (n, channels, height, columns)) - act_zero
    x = (x * 0.05).astype(np.float32)
    return Layer(
        x, tensors, kernel=kernel, act_bits=act_bits, act_zero=min(act_zero, top - 1), **attrs
    )


def run_native(
    layer: Layer, isa: str, order: str = "NCHW", threads: int = 1
) -> tuple[Array, Array]:
    """Runs the engine's layer into guarded memory and checks that the guards are unharmed.

    Args:
        layer: The layer.
        isa: Its instruction set.
        order: Axes of the output in memory; the engine writes "CNHW" directly. A "*" behind it
            leaves a hole after every element.
        threads: Threads to use.

    Returns:
        Output (N, M, Ho, Wo) and codes (B, rows).
    """
    shape = layer.reference().shape
    axes = ["NCHW".index(axis) for axis in order[:4]]
    step = 2 if order.endswith("*") else 1
    flat, memory = guarded((*(shape[axis] for axis in axes), step), np.float32, CANARY)
    out = memory[..., 0].transpose(np.argsort(axes))
    codebooks = layer.tensors["tables"].shape[0]
    rows = shape[0] * shape[2] * shape[3]
    flat_codes, codes = guarded((codebooks, rows), np.uint8, 0xEE)
    layer.native(isa).run(_engine.ThreadPool(threads), layer.x, out, codes)
    result = out.copy()
    out[...] = CANARY
    assert (flat == CANARY).all(), "written outside the output"
    for guard in (flat_codes[:GUARD], flat_codes[-GUARD:]):
        assert (guard == 0xEE).all(), "written outside the codes"
    return result, codes


def guarded(shape: tuple[int, ...], dtype: type, fill: Any) -> tuple[Array, Array]:
    """An array between two guards: all of the memory, and the array."""
    flat = np.full(math.prod(shape) + 2 * GUARD, fill, dtype)
    return flat, flat[GUARD:-GUARD].reshape(shape)


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays are equal bit for bit: -0.0 is not 0.0, and NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
