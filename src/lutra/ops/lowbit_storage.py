"""How low-bit weights lie in files and in memory before a kernel packs them: the same everywhere.

A matrix of M outputs and K inputs has a code for each weight, row after row:

* ternary codes 0, 1, 2 (for -1, 0, 1), five in a byte, the first one least: 1.6 bits a weight.
  ``byte = sum over j of code[j] * 3**j``; the array is (M, ceil(K / 5));
* ternary codes in two bits, four in a byte, the first one in the lowest: (M, ceil(K / 4));
* codes of 1, 2, 3 and 4 bits as bit planes: bit ``i`` of the code of weight ``k`` is bit ``k % 8``
  of byte ``k // 8`` of plane ``i``; the array is (M, bits, ceil(K / 8)).

What fills up the last byte of a row is 0.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from lutra.node import Array

__all__ = ["BITS", "TERNARY", "levels_of", "load_codes", "store_codes", "stored_shape"]

#: Bits of ternary weights, as users write it: log2(3) is 1.585.
TERNARY: Final = 1.58
#: The kinds of weights.
BITS: Final[tuple[float, ...]] = (1, TERNARY, 2, 3, 4)
_POWERS: Final = 3 ** np.arange(5)


def levels_of(bits: float) -> int:
    """How many values a code of ``bits`` bits has; 3 for 1.58."""
    return 3 if bits == TERNARY else 2 ** int(bits)


def stored_shape(bits: float, outputs: int, depth: int, *, trits: int = 5) -> tuple[int, ...]:
    """The shape of the bytes of a matrix.

    Args:
        bits: One of ``BITS``.
        outputs: Rows of the matrix.
        depth: Columns.
        trits: Ternary codes of a byte: 5 or 4.
    """
    if bits == TERNARY:
        return outputs, -(-depth // trits)
    return outputs, int(bits), -(-depth // 8)


def store_codes(codes: Array, bits: float, *, trits: int = 5) -> Array:
    """Codes as bytes.

    Args:
        codes: uint8 (M, K), each below ``levels_of(bits)``.
        bits: One of ``BITS``.
        trits: Ternary codes of a byte: 5 or 4.

    Returns:
        uint8 of ``stored_shape``.
    """
    outputs, depth = codes.shape
    if bits != TERNARY:
        planes = [codes >> i & 1 for i in range(int(bits))]
        return np.stack([np.packbits(p, axis=1, bitorder="little") for p in planes], axis=1)
    digits = np.zeros((outputs, -(-depth // trits) * trits), np.uint8)
    digits[:, :depth] = codes
    weights = _POWERS if trits == 5 else 4 ** np.arange(4)
    stored: Array = (digits.reshape(outputs, -1, trits) @ weights).astype(np.uint8)
    return stored


def load_codes(stored: Array, bits: float, depth: int, *, trits: int = 5) -> Array:
    """The codes of stored bytes: the inverse of ``store_codes``.

    Args:
        stored: uint8 of ``stored_shape``.
        bits: One of ``BITS``.
        depth: Columns of the matrix.
        trits: Ternary codes of a byte: 5 or 4.

    Returns:
        uint8 (M, depth). A byte that no code has (of ternary weights) gives a code that is too
        large, or digits of its remainder; who reads files checks before.
    """
    codes: Array
    if bits != TERNARY:
        planes = np.unpackbits(stored, axis=2, count=depth, bitorder="little")
        codes = np.zeros((stored.shape[0], depth), np.uint8)
        for i in range(int(bits)):
            codes |= planes[:, i] << i
        return codes
    if trits == 5:
        codes = stored[..., None] // _POWERS.astype(np.uint8) % 3
    else:
        codes = stored[..., None] >> (2 * np.arange(4, dtype=np.uint8)) & 3
    return np.ascontiguousarray(codes.reshape(stored.shape[0], -1)[:, :depth])
