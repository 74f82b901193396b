"""Matrices of weights of 1 to 4 bits, usable on their own with NumPy and PyTorch.

Activations become int8, row by row; sums are exact integers, the same on every instruction set.
Products are computed by lookups in tables of activation sums (Vec-LUT, arXiv 2512.06443) or by
multiplications of unpacked weights, whichever was measured to be faster; ``LowBitMatrix.explain``
says which. See ``lutra.reference.lowbit`` for the equations.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias, cast, get_args

import numpy as np

from lutra._engine import LowBitMatrix as PackedMatrix
from lutra._engine import ThreadPool, all_finite, choose_lowbit
from lutra.errors import InputError
from lutra.formatting import counted, shape_text
from lutra.inputs import cast_input
from lutra.node import Array, Value
from lutra.ops.limits import LOWBIT_GROUPS, MAX_LOWBIT_DEPTH, MAX_LOWBIT_OUTPUTS
from lutra.ops.lowbit_storage import BITS, TERNARY, levels_of, load_codes, store_codes
from lutra.reference.lowbit import lowbit_levels
from lutra.runtime.cpu import choose_isa, choose_threads

__all__ = ["KernelChoice", "LowBitMatrix"]

Kernel: TypeAlias = Literal["dense", "tables", "registers"]
_BITS_TEXT: Final = "1, 1.58, 2, 3 or 4"


@dataclass(frozen=True)
class KernelChoice:
    """Which kernel multiplies a matrix, and why.

    Attributes:
        kernel: ``"tables"``: lookups in tables whose entries are vectors over rows;
            ``"registers"``: lookups in tables of 16 entries, which stay in registers, for few rows;
            ``"dense"``: weights are unpacked and multiplied.
        isa: The instruction set.
        reason: One sentence.
    """

    kernel: Kernel
    isa: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel} on {self.isa}: {self.reason}"


#: Rows of a tile of the kernel of tables.
TABLE_ROWS: Final = 32
#: Rows at most for which tables in registers may be faster than products.
REGISTER_ROWS: Final = 4


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPool:
    return ThreadPool(threads)


class LowBitMatrix:
    """A matrix of M x K weights of 1 to 4 bits. ``pack`` makes one.

    A weight is ``scale * (code - zero_point)``, where the code is one of 0..2**bits - 1; of ternary
    weights (1.58 bits) ``scale * code`` with a code of -1, 0 or 1. A scale belongs to an output, or
    to ``group`` neighbouring weights of it.

    Attributes:
        bits: 1, 1.58, 2, 3 or 4.
        shape: (M, K).
        group: Weights that share a scale; None where all weights of an output do.
        isa: The instruction set of the kernels.
        stored: The codes as bytes, the same on every machine; see ``lutra.ops.lowbit_storage``.
        scales: float32 (M, K / group): what a step of a code stands for.
        zero_points: float32 (M, K / group), or None for ternary weights.

    Example:
        >>> import numpy as np
        >>> from lutra import LowBitMatrix
        >>> weights = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
        >>> matrix = LowBitMatrix.pack(weights, bits=1.58)
        >>> matrix.matmul(weights[:5]).shape
        (5, 64)
        >>> matrix.explain(5).kernel
        'dense'
    """

    def __init__(
        self,
        stored: Array,
        bits: float,
        depth: int,
        scales: Array,
        zero_points: Array | None,
        *,
        group: int | None = None,
        trits: int = 5,
        isa: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.bits = bits
        self.shape = (len(stored), depth)
        self.group = group
        self.isa = choose_isa(isa)
        self.stored = stored
        self.scales = scales
        self.zero_points = zero_points
        self._trits = trits
        self._threads = choose_threads(threads)
        self._packed: dict[str, PackedMatrix] = {}

    @classmethod
    def pack(
        cls,
        weights: Any,
        bits: float,
        group: int | None = None,
        zero_points: Any = None,
        scales: Any = None,
        *,
        trits: int = 5,
        isa: str | None = None,
        threads: int | None = None,
    ) -> LowBitMatrix:
        """Packs codes, or rounds numbers to codes.

        Numbers without ``scales`` get those that fit their groups: twice the mean magnitude for
        1 bit, so that a code is plus or minus the mean; the mean magnitude for ternary weights
        (absmean, BitNet b1.58, arXiv 2402.17764); for 2 to 4 bits the smallest scales that bring
        every weight into the range of the codes.

        Args:
            weights: (M, K), an array or a PyTorch tensor. Integers are codes: 0..2**bits - 1, or
                -1, 0, 1 for ternary weights. Floats are numbers to round.
            bits: 1, 1.58 (ternary), 2, 3 or 4.
            group: Neighbouring weights of an output that share a scale: 32, 64 or 128, which has to
                divide K. None: all weights of an output.
            zero_points: The code that stands for 0, by group: a number, (M,) or (M, K / group),
                multiples of 1/2 in 0..2**bits - 1. None: the middle, ``(2**bits - 1) / 2``, which
                no code is. Ternary weights have none.
            scales: What a step of a code stands for, by group: a number, (M,) or (M, K / group).
                None: 1 for codes.
            trits: Ternary codes that are stored in a byte: 5 (1.6 bits a weight) or 4 (2 bits).
            isa: Instruction set of the kernels; None chooses as a session does.
            threads: Threads of a product; None chooses as a session does.

        Raises:
            ValueError: If an argument is out of range, or does not fit the others; the sentence
                says which.
            TypeError: If weights, scales or zero points are no numbers.
            UnsupportedCpuError: If the kernels of ``isa`` cannot run here.
        """
        where = "LowBitMatrix.pack"
        if bits not in BITS:
            raise ValueError(f"{where}: bits={bits!r}; give {_BITS_TEXT}")
        if trits not in (4, 5):
            raise ValueError(f"{where}: trits={trits!r}; give 5 or 4 ternary codes in a byte")
        array = _weights(where, weights)
        outputs, depth = array.shape
        groups = 1 if group is None else _groups(where, group, depth)
        s = None if scales is None else _by_group(where, "scales", scales, outputs, groups)
        z = _zero_points(where, zero_points, bits, outputs, groups)
        if array.dtype.kind == "f":
            codes, s = _round(array.astype(np.float32), bits, groups, s, z)
        else:
            codes = _codes(where, array, bits)
            s = np.ones((outputs, groups), np.float32) if s is None else s
        stored = store_codes(codes, bits, trits=trits)
        return cls(stored, bits, depth, s, z, group=group, trits=trits, isa=isa, threads=threads)

    def __getstate__(self) -> dict[str, Any]:
        """Without what kernels have packed: a copy packs again."""
        return {**self.__dict__, "_packed": {}}

    def __repr__(self) -> str:
        outputs, depth = self.shape
        grouped = "" if self.group is None else f", group={self.group}"
        return f"LowBitMatrix({outputs} x {depth}, bits={self.bits:g}{grouped}, {self.isa})"

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points as they are stored."""
        zeros = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.stored.nbytes + self.scales.nbytes + zeros

    @property
    def packed_nbytes(self) -> int:
        """Bytes in the order of kernels: each kernel packs the weights when it first runs."""
        return sum(packed.nbytes for packed in self._packed.values())

    @property
    def codes(self) -> Array:
        """The codes, (M, K): int8 -1, 0, 1 of ternary weights, else uint8 0..2**bits - 1."""
        codes = load_codes(self.stored, self.bits, self.shape[1], trits=self._trits)
        return codes.astype(np.int8) - np.int8(1) if self.bits == TERNARY else codes

    def dequantize(self) -> Array:
        """The weights as numbers, float32 (M, K)."""
        codes = load_codes(self.stored, self.bits, self.shape[1], trits=self._trits)
        levels = lowbit_levels(codes, levels_of(self.bits))
        scale, zero = self._scale_and_zero()
        repeat = self.shape[1] // self.scales.shape[1]
        if zero is not None:
            levels = levels - np.repeat(zero.T, repeat, axis=1)
        weights: Array = levels.astype(np.float32) * np.repeat(scale.T, repeat, axis=1)
        return weights

    def explain(self, rows: int) -> KernelChoice:
        """Which kernel ``matmul`` takes for so many rows, and why.

        Args:
            rows: Rows of activations, at least 1.
        """
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"LowBitMatrix.explain: rows={rows!r}; give a number of at least 1")
        what = "ternary weights" if self.bits == TERNARY else f"weights of {self.bits:g} bits"
        if self.group is not None:
            what += f" in groups of {self.group}"
        if self.isa == "scalar":
            reason = "the scalar kernels are the specification and have no tables"
            return KernelChoice("dense", self.isa, reason)
        if self.isa not in ("avx2", "avx512", "neon", "neon_dot"):
            reason = f"low-bit weights have scalar kernels on {self.isa}, without tables"
            return KernelChoice("dense", self.isa, reason)
        outputs, depth = self.shape
        group = depth if self.group is None else self.group
        kernel, time, lookups = choose_lowbit(
            self.isa, outputs, depth, levels_of(self.bits), group, rows
        )
        if time == 0.0:
            reason = f"lookups were measured to be slower for {counted(rows, 'row')} of {what}"
            return KernelChoice("dense", self.isa, reason)
        costs = f"{time:.2f} times what products cost"
        if kernel != "dense":
            how = "lookups in registers" if kernel == "registers" else "lookups"
            reason = f"{how} for {counted(rows, 'row')} of {what} were measured to cost {costs}"
        else:
            few = (
                f"a table for five weights has to serve more than {counted(outputs, 'output')}"
                if lookups == "registers"
                else f"a tile of {TABLE_ROWS} rows costs the same when it is not full"
            )
            reason = f"lookups for {counted(rows, 'row')} of {what} would cost {costs}; {few}"
        return KernelChoice(cast(Kernel, kernel), self.isa, reason)

    def matmul(self, x: Any, *, kernel: Kernel | None = None) -> Any:
        """The product with the transposed matrix, ``x @ weights.T``.

        Each row of ``x`` is rounded to int8 by its largest magnitude; sums are exact. Gradients do
        not pass through.

        Args:
            x: (..., K), float32 or what a session takes for it; an array, or a PyTorch tensor of
                any floating dtype on the CPU.
            kernel: ``"dense"``, ``"tables"`` or ``"registers"``; None takes what ``explain`` says.

        Returns:
            float32 (..., M), an array or a tensor as ``x`` is.

        Raises:
            InputError: If ``x`` has another shape or dtype, or numbers that are not finite.
        """
        where = "LowBitMatrix.matmul: x"
        array, tensor = _array(x)
        array = cast_input(where, Value("x", "float32", (None,)), array)
        rows = self._rows(where, array)
        if not all_finite(rows):
            raise InputError(f"{where} holds NaN or an infinity; give finite numbers")
        out = self.multiply(rows, kernel=kernel)
        y = out.reshape(*array.shape[:-1], self.shape[0])
        return sys.modules["torch"].from_numpy(y) if tensor else y

    def multiply(
        self, rows: Array, *, kernel: Kernel | None = None, pool: ThreadPool | None = None
    ) -> Array:
        """``matmul`` without its checks.

        Args:
            rows: float32 (n, K), C-contiguous. A row that holds NaN or an infinity gives NaN.
            kernel: As of ``matmul``.
            pool: The threads; None takes those of the matrix.

        Returns:
            float32 (n, M).
        """
        out = np.empty((len(rows), self.shape[0]), np.float32)
        if len(rows):
            pool = _pool(self._threads) if pool is None else pool
            self._pack_for(kernel, len(rows)).matmul(pool, rows, out)
        return out

    def sums(self, x: Any, *, kernel: Kernel | None = None) -> Array:
        """Exact integer sums of levels times activations.

        The level of a weight is its ternary code, or ``2 * code - (2**bits - 1)``.

        Args:
            x: int8 (n, K), an array or a PyTorch tensor; every number from -128 to 127.
            kernel: ``"dense"``, ``"tables"`` or ``"registers"``; None takes what ``explain`` says.

        Returns:
            int32 (n, M), or (n, K / group, M) where weights have groups.

        Raises:
            InputError: If ``x`` has another shape or dtype.
        """
        where = "LowBitMatrix.sums: x"
        array, _ = _array(x)
        if not isinstance(array, np.ndarray) or array.dtype != np.int8 or array.ndim != 2:
            what = type(array).__name__
            if isinstance(array, np.ndarray):
                what = f"{array.dtype} {shape_text(array.shape)}"
            raise InputError(f"{where} is {what}; give an array of int8 (n, {self.shape[1]})")
        rows = self._rows(where, array)
        out = np.empty((len(rows), self.scales.shape[1], self.shape[0]), np.int32)
        if len(rows):
            self._pack_for(kernel, len(rows)).sums(_pool(self._threads), rows, out)
        return out if self.group is not None else out[:, 0]

    def _rows(self, where: str, array: Array) -> Array:
        depth = self.shape[1]
        if array.ndim < 1 or array.shape[-1] != depth:
            raise InputError(
                f"{where} has shape {shape_text(array.shape)}; its last axis must be {depth}, the "
                "columns of the matrix"
            )
        return np.ascontiguousarray(array.reshape(-1, depth))

    def _pack_for(self, kernel: Kernel | None, rows: int) -> PackedMatrix:
        name = self.explain(rows).kernel if kernel is None else kernel
        kernels = get_args(Kernel)
        if name not in kernels:
            known = ", ".join(map(repr, kernels))
            raise ValueError(f"LowBitMatrix: kernel={kernel!r}; choose {known} or None")
        packed = self._packed.get(name)
        if packed is None:
            codes = load_codes(self.stored, self.bits, self.shape[1], trits=self._trits)
            scale, zero = self._scale_and_zero()
            group = self.shape[1] if self.group is None else self.group
            levels = levels_of(self.bits)
            packed = PackedMatrix(self.isa, name, levels, group, codes, scale, zero)
            self._packed[name] = packed
        return packed

    def _scale_and_zero(self) -> tuple[Array, Array | None]:
        """Those of levels, (K / group, M); no zero where all are 0."""
        if self.zero_points is None:
            return np.ascontiguousarray(self.scales.T), None
        top = levels_of(self.bits) - 1
        zero = np.ascontiguousarray((2 * self.zero_points - top).astype(np.int32).T)
        scale = np.ascontiguousarray(self.scales.T) * np.float32(0.5)
        return scale, zero if zero.any() else None


def _array(x: Any) -> tuple[Any, bool]:
    """An array of what was given, and whether that was a PyTorch tensor."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return x, False
    x = x.detach()
    if x.is_floating_point():
        x = x.float()
    return x.cpu().numpy(), True


def _weights(where: str, weights: Any) -> Array:
    """Weights as an array of integers or floats, checked as far as they can be without `bits`."""
    array, _ = _array(weights)
    array = np.asarray(array)
    if array.dtype.kind not in "iuf":
        raise TypeError(
            f"{where}: weights have dtype {array.dtype}; give integers as codes or floats to round"
        )
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{where}: weights have shape {shape_text(array.shape)}; give (outputs, inputs), at "
            "least one of each"
        )
    outputs, depth = array.shape
    if outputs > MAX_LOWBIT_OUTPUTS or depth > MAX_LOWBIT_DEPTH:
        raise ValueError(
            f"{where}: weights have shape {shape_text(array.shape)}; at most {MAX_LOWBIT_OUTPUTS} "
            f"outputs and {MAX_LOWBIT_DEPTH} inputs have exact sums"
        )
    with np.errstate(over="ignore"):
        finite = array.dtype.kind != "f" or bool(np.isfinite(array.astype(np.float32)).all())
    if not finite:
        raise ValueError(
            f"{where}: weights hold NaN, an infinity or a number beyond float32; give finite ones"
        )
    return array


def _groups(where: str, group: int, depth: int) -> int:
    if group not in LOWBIT_GROUPS:
        raise ValueError(f"{where}: group={group!r}; give 32, 64, 128 or None")
    if depth % group:
        raise ValueError(
            f"{where}: a group of {group} does not divide the {depth} inputs; choose another "
            "group, or None"
        )
    return depth // group


def _by_group(where: str, name: str, given: Any, outputs: int, groups: int) -> Array:
    """Numbers of every group, float32 (outputs, groups)."""
    array = np.asarray(_array(given)[0])
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{where}: {name} have dtype {array.dtype}; give numbers")
    if array.shape == (outputs,):
        array = array[:, None]
    if array.ndim and array.shape not in ((outputs, 1), (outputs, groups)):
        raise ValueError(
            f"{where}: {name} have shape {shape_text(array.shape)}; give one number, "
            f"({outputs},) or ({outputs}, {groups})"
        )
    with np.errstate(over="ignore"):
        wide = np.ascontiguousarray(np.broadcast_to(array, (outputs, groups)), np.float32)
    if not np.isfinite(wide).all():
        raise ValueError(
            f"{where}: {name} hold numbers that are not finite in float32; give others"
        )
    return wide


def _zero_points(where: str, given: Any, bits: float, outputs: int, groups: int) -> Array | None:
    """float32 (outputs, groups), or None for ternary weights."""
    if bits == TERNARY:
        if given is not None:
            raise ValueError(f"{where}: ternary weights have no zero_points; leave them out")
        return None
    top = levels_of(bits) - 1
    points = _by_group(where, "zero_points", top / 2 if given is None else given, outputs, groups)
    bad = (points < 0) | (points > top) | (2 * points != np.rint(2 * points))
    if bad.any():
        raise ValueError(
            f"{where}: zero_points hold {points[bad][0]:g}; give multiples of 1/2 in 0..{top}"
        )
    return points


def _codes(where: str, array: Array, bits: float) -> Array:
    low, high = (-1, 1) if bits == TERNARY else (0, levels_of(bits) - 1)
    least, most = int(array.min()), int(array.max())
    if least < low or most > high:
        worst = least if least < low else most
        raise ValueError(
            f"{where}: weights hold the code {worst}; codes of {bits:g} bits are {low}..{high}"
        )
    return (array.astype(np.int8) - np.int8(low)).astype(np.uint8)


def _round(
    weights: Array, bits: float, groups: int, scales: Array | None, zero_points: Array | None
) -> tuple[Array, Array]:
    """The nearest codes, uint8 as they are stored, and the scales of the groups."""
    outputs, depth = weights.shape
    grouped = weights.reshape(outputs, groups, depth // groups)
    top = levels_of(bits) - 1
    zero = np.ones((outputs, groups), np.float32) if zero_points is None else zero_points
    if scales is None:
        scales = _fitted_scales(grouped.astype(np.float64), bits, zero)
    step = np.where(scales == 0, np.float32(1), scales)[:, :, None]
    with np.errstate(over="ignore"):  # an infinite quotient is cut off
        codes = np.clip(np.rint(grouped / step + zero[:, :, None]), 0, top)
    return codes.astype(np.uint8).reshape(outputs, depth), scales


def _fitted_scales(grouped: Array, bits: float, zero: Array) -> Array:
    """The mean magnitude, or what brings every weight into the range of the codes."""
    if bits in (1, TERNARY):
        mean = np.abs(grouped).mean(axis=2)
        return cast(Array, (2 * mean if bits == 1 else mean).astype(np.float32))
    top = levels_of(bits) - 1
    above = grouped.max(axis=2).clip(min=0) / np.where(zero < top, top - zero, np.inf)
    below = -grouped.min(axis=2).clip(max=0) / np.where(zero > 0, zero, np.inf)
    return cast(Array, np.maximum(above, below).astype(np.float32))
