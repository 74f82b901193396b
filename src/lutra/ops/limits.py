"""Every limit of the operators, in one place.

The engine states its own in ``lutra._engine.limits()``; a test compares the two.
"""

from __future__ import annotations

from typing import Final

#: Axes of a value of a graph.
MAX_RANK: Final = 8
#: Axes of an array of the engine.
MAX_ENGINE_RANK: Final = 8
#: Elements of one sample: the engine counts them in 32 bits.
MAX_ELEMENTS: Final = 2**31 - 1
#: Characters of a name.
MAX_NAME: Final = 512
#: Largest kernel, stride, dilation, padding or output size that an operator accepts.
MAX_EXTENT: Final = 4096
#: Groups of a convolution.
MAX_GROUPS: Final = 2**24
#: Heads of an attention.
MAX_HEADS: Final = 4096
#: Tokens of a sequence that a decoder makes.
MAX_TOKENS: Final = 2**20
#: Entries of an axis whose indices are values of the graph: float32 holds them exactly.
MAX_INDEXED: Final = 2**24
#: Factor of a pixel shuffle or an upsampling, and stride of a transposed convolution.
MAX_FACTOR: Final = 64

#: Bits of an activation grid: with 7, sums of two products with int8 fit int16.
MAX_ACT_BITS: Final = 7
#: Entries of int8 tables and weights are in -INT8_MAX..INT8_MAX.
INT8_MAX: Final = 127

#: Centroids of a codebook.
CENTROID_COUNTS: Final = (8, 16, 32, 64)
#: Values of a sub-vector; the score of more would not be exact in the arithmetic of the kernels.
MAX_SUBVECTOR: Final = 64
#: Codebooks of a layer: a sum of so many int8 table entries is exact in int32 and in float32.
MAX_CODEBOOKS: Final = 2**24 // 128
#: Features of a row of codebooks.
MAX_PQ_DEPTH: Final = MAX_CODEBOOKS * MAX_SUBVECTOR

#: Bits of an activation index of a response table: 4, 8, 16, 32 or 64 rows.
LOOKUP_ACT_BITS: Final = (2, 3, 4, 5, 6)
#: Columns of a response table: odd, so that there is one in the middle for the weight 0.
MIN_WEIGHTS: Final = 3
MAX_WEIGHTS: Final = 33
#: Bits of a packed weight index.
WEIGHT_BITS: Final = (2, 4, 8)
#: A sum of so many entries of a response table is exact in int32.
MAX_LOOKUP_DEPTH: Final = (2**31 - 1) // INT8_MAX

#: A sum of so many products of int8 weights and activations is exact in int32.
MAX_INT8_DEPTH: Final = 2**31 // (127 * 128)

#: Values of a code of low-bit weights: 1 bit, ternary, 2, 3 and 4 bits.
LOWBIT_LEVELS: Final = (2, 3, 4, 8, 16)
#: Neighbouring low-bit weights that may share a scale, where not all of an output do.
LOWBIT_GROUPS: Final = (32, 64, 128)
#: A sum of so many products of twice the distance of a code from a zero point (at most 30) and an
#: int8 is exact in int32.
MAX_LOWBIT_DEPTH: Final = (2**31 - 1) // (30 * 128)
MAX_LOWBIT_OUTPUTS: Final = 2**24

#: Lines of a function table.
FUNCTION_ENTRIES: Final = (8, 16, 32)
