"""Matrices of low-bit weights: exact on every instruction set, with every kernel."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import same_bits

import lutra
from lutra import InputError, LowBitMatrix, runnable_isas
from lutra.lowbit import REGISTER_ROWS, TABLE_ROWS
from lutra.node import Array
from lutra.ops.limits import MAX_LOWBIT_DEPTH
from lutra.ops.lowbit_storage import BITS, TERNARY, levels_of, load_codes, store_codes, stored_shape
from lutra.reference.lowbit import lowbit_levels, lowbit_matmul, lowbit_sums, quantise_rows

ISAS = runnable_isas()
KERNELS = ("dense", "tables", "registers")
#: Activations that are hard for sums of 16 bits.
FILLS = ("random", "most", "least", "alternating", "opposed")


def random_codes(rng: np.random.Generator, outputs: int, depth: int, bits: float) -> Array:
    """Codes as users give them."""
    codes = rng.integers(0, levels_of(bits), (outputs, depth))
    return codes - 1 if bits == TERNARY else codes


def activations(rng: np.random.Generator, n: int, levels: Array, fill: str) -> Array:
    """int8 (n, K); `opposed` has the sign of the first output's levels, so that nothing cancels."""
    depth = levels.shape[1]
    if fill == "random":
        return rng.integers(-128, 128, (n, depth), dtype=np.int8)
    if fill in ("most", "least"):
        return np.full((n, depth), 127 if fill == "most" else -128, np.int8)
    if fill == "alternating":
        return np.tile(np.where(np.arange(depth) % 2, 127, -128).astype(np.int8), (n, 1))
    return np.tile(np.where(levels[0] > 0, 127, -128).astype(np.int8), (n, 1))


def levels_of_matrix(matrix: LowBitMatrix) -> Array:
    codes = matrix.codes.astype(np.int32)
    return codes if matrix.bits == TERNARY else 2 * codes - (levels_of(matrix.bits) - 1)


def all_sums(matrix_of: Any, x: Array) -> list[tuple[str, str, Array]]:
    """The sums of every instruction set and kernel."""
    return [
        (isa, kernel, matrix_of(isa).sums(x, kernel=kernel)) for isa in ISAS for kernel in KERNELS
    ]


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    outputs=st.integers(1, 70),
    depth=st.integers(1, 300),
    group=st.sampled_from([None, 32, 64, 128]),
    n=st.integers(1, 70),
    fill=st.sampled_from(FILLS),
    trits=st.sampled_from([4, 5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_are_exact(
    bits: float,
    outputs: int,
    depth: int,
    group: int | None,
    n: int,
    fill: str,
    trits: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    if group is not None:
        depth = group * (1 + depth // group)
    codes = random_codes(rng, outputs, depth, bits)
    if fill == "opposed":  # the largest magnitudes that sums can have
        codes[:] = rng.choice([codes.min(), codes.max()], (outputs, depth))

    def matrix_of(isa: str) -> LowBitMatrix:
        return LowBitMatrix.pack(codes, bits, group, isa=isa, trits=trits, threads=1)

    levels = levels_of_matrix(matrix_of("scalar"))
    x = activations(rng, n, levels, fill)
    wanted = lowbit_sums(levels, x, depth if group is None else group)
    wanted = wanted[:, 0] if group is None else wanted
    for isa, kernel, sums in all_sums(matrix_of, x):
        assert sums.dtype == np.int32
        np.testing.assert_array_equal(sums, wanted, f"{isa} {kernel}")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
def test_sums_at_the_bounds_of_16_bits(bits: float, isa: str, kernel: str) -> None:
    """Equal signs everywhere, at every depth around those where 16-bit sums are full."""
    top = levels_of(bits) - 1
    extremes = (-1, 1) if bits == TERNARY else (0, top)
    for code in extremes:
        for value in (127, -128):
            for depth in [*range(1, 70), *range(84, 90), *range(120, 135), *range(250, 262), 1021]:
                codes = np.full((17, depth), code)
                x = np.full((33, depth), value, np.int8)
                matrix = LowBitMatrix.pack(codes, bits, isa=isa, threads=1)
                level = int(levels_of_matrix(matrix)[0, 0])
                sums = matrix.sums(x, kernel=kernel)
                assert (sums == depth * level * value).all(), (depth, code, value)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("outputs", "depth", "group"), [(641, 523, None), (321, 384, 128)])
def test_many_outputs_in_parts(outputs: int, depth: int, group: int | None, isa: str) -> None:
    """More outputs than kernels take at once, and parts of them that threads take."""
    rng = np.random.default_rng(0)
    for bits in BITS:
        codes = random_codes(rng, outputs, depth, bits)
        x = rng.normal(size=(2, depth)).astype(np.float32)
        for threads in (1, 3):
            matrix = LowBitMatrix.pack(codes, bits, group, isa=isa, threads=threads)
            q, _ = quantise_rows(x)
            want = lowbit_sums(levels_of_matrix(matrix), q, depth if group is None else group)
            got = matrix.sums(q, kernel="registers").reshape(want.shape)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", BITS)
def test_the_deepest_sums_fit_int32(bits: float) -> None:
    code = 1 if bits == TERNARY else levels_of(bits) - 1
    codes = np.full((1, MAX_LOWBIT_DEPTH), code, np.int8)
    x = np.full((1, MAX_LOWBIT_DEPTH), -128, np.int8)
    for isa in ISAS[1:] or ISAS:
        matrix = LowBitMatrix.pack(codes, bits, isa=isa, threads=1)
        level = int(levels_of_matrix(matrix)[0, 0])
        for kernel in KERNELS:
            assert matrix.sums(x, kernel=kernel).item() == -128 * level * MAX_LOWBIT_DEPTH


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    outputs=st.integers(1, 50),
    groups=st.integers(1, 4),
    group=st.sampled_from([None, 32, 64, 128]),
    n=st.integers(1, 40),
    zeros=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_have_the_bits_of_the_reference(
    bits: float, outputs: int, groups: int, group: int | None, n: int, zeros: bool, threads: int,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    depth = groups * group if group else int(rng.integers(1, 200))
    count = groups if group else 1
    scales = np.exp(rng.normal(size=(outputs, count))).astype(np.float32)
    points = None
    if zeros and bits != TERNARY:
        points = rng.integers(0, 2 * levels_of(bits) - 1, (outputs, count)) / 2
    codes = random_codes(rng, outputs, depth, bits)
    x = (rng.normal(size=(n, depth)) * np.exp(3 * rng.normal(size=(n, 1)))).astype(np.float32)
    x[rng.integers(n)] = 0
    first = LowBitMatrix.pack(codes, bits, group, points, scales, isa="scalar")
    levels = levels_of_matrix(first)
    wanted = lowbit_matmul(levels, *first._scale_and_zero(), x, group or depth)
    for isa in ISAS:
        matrix = LowBitMatrix.pack(codes, bits, group, points, scales, isa=isa, threads=threads)
        for kernel in KERNELS:
            assert same_bits(matrix.matmul(x, kernel=kernel), wanted), (isa, kernel)
    q, step = quantise_rows(x)
    exact = (q * step[:, None].astype(np.float64)) @ first.dequantize().T.astype(np.float64)
    np.testing.assert_allclose(wanted, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max() + 1e-30)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1),
    seed=st.integers(0, 99),
)
def test_rows_are_quantised_alike(values: list[float], seed: int) -> None:
    """Through a matrix of one weight in each output, a product is the quantised activation."""
    x = np.array([values], np.float32)
    eye = np.eye(x.shape[1], dtype=np.int8)
    q, step = quantise_rows(x)
    assert np.abs(q.astype(np.int32)).max() in (0, 127)
    wanted = q.astype(np.float32) * step[:, None]
    for isa in ISAS:
        for kernel in KERNELS:
            y = LowBitMatrix.pack(eye, TERNARY, isa=isa, threads=1).matmul(x, kernel=kernel)
            assert same_bits(y, wanted), (isa, kernel)


@pytest.mark.parametrize("isa", ISAS)
def test_many_rows_and_outputs_in_parts(isa: str) -> None:
    """More outputs than a call of a kernel takes, several tiles of rows, threads."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-1, 2, (4200, 45))
    x = rng.integers(-128, 128, (70, 45), dtype=np.int8)
    wanted = x.astype(np.int32) @ codes.T.astype(np.int32)
    for threads in (1, 3):
        matrix = LowBitMatrix.pack(codes, TERNARY, isa=isa, threads=threads)
        for kernel in KERNELS:
            np.testing.assert_array_equal(matrix.sums(x, kernel=kernel), wanted)


@given(
    bits=st.sampled_from(BITS),
    outputs=st.integers(1, 9),
    depth=st.integers(1, 50),
    trits=st.sampled_from([4, 5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_stored_codes_come_back(
    bits: float, outputs: int, depth: int, trits: int, seed: int
) -> None:
    codes = (
        np.random.default_rng(seed).integers(0, levels_of(bits), (outputs, depth)).astype(np.uint8)
    )
    stored = store_codes(codes, bits, trits=trits)
    assert stored.shape == stored_shape(bits, outputs, depth, trits=trits)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(load_codes(stored, bits, depth, trits=trits), codes)


def test_the_order_of_stored_codes_is_the_documented_one() -> None:
    ternary = np.array([[2, 0, 1, 2, 1, 1]], np.uint8)
    assert store_codes(ternary, TERNARY).tolist() == [[2 + 9 + 54 + 81, 1]]
    assert store_codes(ternary, TERNARY, trits=4).tolist() == [[2 + 16 + 128, 1 + 4]]
    codes = np.array([[5, 2, 7, 0, 0, 0, 0, 0, 4]], np.uint8)
    assert store_codes(codes, 3).tolist() == [[[0b101, 0], [0b110, 0], [0b101, 1]]]


def test_stored_bytes_count_what_the_bits_say() -> None:
    codes = np.zeros((10, 320), np.int8)
    for bits, trits, stored in ((1, 5, 400), (TERNARY, 5, 640), (TERNARY, 4, 800), (2, 5, 800),
                                (3, 5, 1200), (4, 5, 1600)):  # fmt: skip
        matrix = LowBitMatrix.pack(codes, bits, trits=trits)
        assert matrix.stored.nbytes == stored
        points = 0 if bits == TERNARY else 40
        assert matrix.nbytes == stored + 40 + points
        assert matrix.packed_nbytes == 0
        matrix.matmul(np.ones((1, 320), np.float32))
        assert matrix.packed_nbytes > 0


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", BITS)
def test_numbers_are_rounded_to_the_nearest_code(bits: float, group: int | None) -> None:
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(20, 96)).astype(np.float32)
    weights[3] = 0
    matrix = LowBitMatrix.pack(weights, bits, group)
    grouped = weights.reshape(20, -1, 96 // matrix.scales.shape[1])
    mean, most = np.abs(grouped).mean(axis=2), np.abs(grouped).max(axis=2)
    top = levels_of(bits) - 1
    known = {1: 2 * mean, TERNARY: mean}.get(bits, 2 * most / top)
    np.testing.assert_allclose(matrix.scales, known, rtol=1e-6)
    step = np.repeat(matrix.scales, 96 // matrix.scales.shape[1], axis=1)
    allowed = np.arange(-1, 2) if bits == TERNARY else np.arange(levels_of(bits)) - top / 2
    choices = step[:, :, None] * allowed
    nearest = np.abs(choices - weights[:, :, None]).min(axis=2)
    error = np.abs(matrix.dequantize() - weights)
    np.testing.assert_allclose(error, nearest, atol=1e-6)


def test_given_scales_and_zero_points_are_kept() -> None:
    weights = np.array([[-0.5, 0.0, 0.26, 0.9, 7.0, -7.0]], np.float32)
    matrix = LowBitMatrix.pack(weights, 2, None, 1, 0.5)
    assert matrix.codes.tolist() == [[0, 1, 2, 3, 3, 0]]
    assert matrix.dequantize().tolist() == [[-0.5, 0.0, 0.5, 1.0, 1.0, -0.5]]
    fitted = LowBitMatrix.pack(np.array([[-1.0, 0.0, 2.0]]), 2, zero_points=1)
    assert fitted.scales.tolist() == [[1.0]]
    assert fitted.codes.tolist() == [[0, 1, 3]]


def test_vectors_and_stacks_of_rows() -> None:
    rng = np.random.default_rng(1)
    matrix = LowBitMatrix.pack(rng.integers(0, 4, (5, 12)), 2)
    x = rng.normal(size=(2, 3, 12)).astype(np.float32)
    y = matrix.matmul(x)
    assert y.shape == (2, 3, 5)
    assert same_bits(matrix.matmul(x[1, 2]), y[1, 2])
    assert matrix.matmul(x[:0]).shape == (0, 3, 5)
    assert same_bits(matrix.matmul(x.astype(np.float16)), matrix.matmul(
        x.astype(np.float16).astype(np.float32)))  # fmt: skip
    assert same_bits(matrix.matmul(np.asfortranarray(x)), y)


@pytest.mark.parametrize("isa", ISAS)
def test_explain_says_what_matmul_takes(isa: str) -> None:
    rng = np.random.default_rng(0)
    for bits in BITS:
        for group in (None, 32, 64, 128):
            codes = random_codes(rng, 4, 128, bits)
            for rows in (1, 8, 16, 32, 256):
                matrix = LowBitMatrix.pack(codes, bits, group, isa=isa, threads=1)
                choice = matrix.explain(rows)
                matrix.matmul(np.ones((rows, 128), np.float32))
                assert list(matrix._packed) == [choice.kernel]
                assert choice.isa == isa
                assert str(choice).startswith(f"{choice.kernel} on {isa}: ")
                if isa == "scalar":
                    assert choice.kernel == "dense"
                assert rows > REGISTER_ROWS or choice.kernel != "tables"
                assert rows <= REGISTER_ROWS or choice.kernel != "registers"


GOOD: dict[str, Any] = {"weights": np.ones((2, 64), np.float32), "bits": 2}


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"bits": 5}, ValueError, "bits=5; give 1, 1.58, 2, 3 or 4"),
        ({"weights": np.full((2, 64), np.nan)}, ValueError, "weights hold NaN"),
        ({"weights": np.full((2, 64), 1e300)}, ValueError, "a number beyond float32"),
        ({"weights": np.ones((2, 0))}, ValueError, r"shape \(2, 0\); give \(outputs, inputs\)"),
        ({"weights": np.ones((0, 2))}, ValueError, r"shape \(0, 2\); give \(outputs, inputs\)"),
        ({"weights": np.ones(64)}, ValueError, r"shape \(64,\); give \(outputs, inputs\)"),
        ({"weights": np.ones((2, 64), bool)}, TypeError, "weights have dtype bool"),
        ({"weights": [["a"]]}, TypeError, "weights have dtype <U1"),
        ({"weights": np.full((2, 64), 4)}, ValueError, "the code 4; codes of 2 bits are 0..3"),
        ({"weights": np.full((2, 64), -1)}, ValueError, "the code -1; codes of 2 bits are 0..3"),
        ({"weights": np.full((2, 64), 2), "bits": 1.58}, ValueError, "the code 2; .* are -1..1"),
        (
            {"weights": np.zeros((1, MAX_LOWBIT_DEPTH + 1), np.int8)},
            ValueError,
            "at most .* inputs",
        ),
        ({"group": 48}, ValueError, "group=48; give 32, 64, 128 or None"),
        ({"group": 128}, ValueError, "a group of 128 does not divide the 64 inputs"),
        ({"trits": 3}, ValueError, "trits=3; give 5 or 4"),
        ({"scales": np.ones(3)}, ValueError, r"scales have shape \(3,\); give one number, \(2,\)"),
        ({"scales": np.inf}, ValueError, "scales hold numbers that are not finite"),
        ({"scales": "x"}, TypeError, "scales have dtype <U1"),
        ({"zero_points": 4}, ValueError, r"zero_points hold 4; give multiples of 1/2 in 0\.\.3"),
        ({"zero_points": 0.25}, ValueError, "zero_points hold 0.25; give multiples of 1/2"),
        ({"zero_points": 1, "bits": 1.58}, ValueError, "ternary weights have no zero_points"),
        ({"isa": "mmx"}, lutra.UnsupportedCpuError, "isa='mmx' cannot run"),
        ({"threads": 0}, ValueError, "threads=0 is out of range"),
    ],
)
def test_bad_arguments_of_pack(
    change: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        LowBitMatrix.pack(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (np.ones((3, 63), np.float32), r"x has shape \(3, 63\); its last axis must be 64"),
        (np.float32(1) * np.ones(()), "its last axis must be 64|float64"),
        (np.ones((3, 64), np.complex64), "x has dtype complex64"),
        ([[1.0] * 64], "x is a list; give a numpy array"),
        (np.full((3, 64), np.inf, np.float32), "x holds NaN or an infinity"),
    ],
)
def test_bad_activations(x: Any, sentence: str) -> None:
    matrix = LowBitMatrix.pack(**GOOD)
    with pytest.raises(InputError, match=sentence):
        matrix.matmul(x)


def test_bad_integer_activations_rows_and_kernels() -> None:
    matrix = LowBitMatrix.pack(**GOOD)
    with pytest.raises(InputError, match=r"x is int16 \(2, 64\); give an array of int8"):
        matrix.sums(np.ones((2, 64), np.int16))
    with pytest.raises(InputError, match=r"x is list; give an array of int8 \(n, 64\)"):
        matrix.sums([1])
    with pytest.raises(InputError, match="its last axis must be 64"):
        matrix.sums(np.ones((2, 65), np.int8))
    with pytest.raises(ValueError, match="rows=0; give a number of at least 1"):
        matrix.explain(0)
    with pytest.raises(ValueError, match="kernel='fast'; choose 'dense', 'tables', 'reg"):
        matrix.matmul(np.ones((1, 64), np.float32), kernel="fast")  # type: ignore[arg-type]


def test_copies_compute_the_same() -> None:
    rng = np.random.default_rng(4)
    matrix = LowBitMatrix.pack(rng.normal(size=(9, 64)), 3, 32)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    y = matrix.matmul(x)
    for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        assert repr(other) == repr(matrix) == f"LowBitMatrix(9 x 64, bits=3, group=32, {ISAS[-1]})"
        assert same_bits(other.matmul(x), y)


def test_levels_are_symmetric() -> None:
    """LUT Tensor Core's form: every bit counts +1 or -1."""
    for bits in (1, 2, 3, 4):
        codes = np.arange(2**bits, dtype=np.uint8)[None]
        signs = [(codes >> i & 1).astype(np.int32) * 2 - 1 for i in range(bits)]
        by_bits = sum(sign * 2**i for i, sign in enumerate(signs))
        np.testing.assert_array_equal(lowbit_levels(codes, 2**bits), by_bits)


@pytest.mark.skipif("avx2" not in ISAS, reason="needs AVX2")
def test_tables_are_taken_for_full_tiles() -> None:
    matrix = LowBitMatrix.pack(np.zeros((4, 32), np.int8), TERNARY, isa="avx2")
    assert LowBitMatrix.pack(np.zeros((4, 32), np.int8), 1, isa="avx2").explain(1).kernel == (
        "registers"
    )
    assert matrix.explain(TABLE_ROWS).kernel == "tables"
    assert matrix.explain(TABLE_ROWS + 1).kernel == "dense"
    assert matrix.explain(10 * TABLE_ROWS + 1).kernel == "tables"
    assert "0.60 times what products cost" in matrix.explain(TABLE_ROWS).reason


@pytest.mark.skipif("avx512" not in ISAS, reason="needs AVX-512")
def test_few_outputs_do_not_pay_for_tables() -> None:
    """Where lookups of five weights are taken for one row, few outputs take products."""
    many, few = (
        LowBitMatrix.pack(np.zeros((m, 32), np.int8), TERNARY, isa="avx512") for m in (8192, 64)
    )
    assert few.explain(1).kernel == "dense"
    if many.explain(1).kernel == "registers":
        assert "has to serve more than 64 outputs" in few.explain(1).reason
    assert many.explain(2).kernel == "dense"
