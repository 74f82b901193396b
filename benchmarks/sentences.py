"""Sentence encoders in lutra, ONNX Runtime, OpenVINO and PyTorch, in float and in int8.

    python -m benchmarks.sentences [--json FILE] [--threads N] [--isa avx2] [--case TEXT] ...

MiniLM-L6 (6 blocks, width 384, inner width 1536, 12 heads) of ids and mask to a vector of length 1.
All six linear layers of every block are product quantisation with V = 4, 16 and 32 and K = 16, the
queries, keys and values with the same codes; once more V = 16 with tables of functions for GELU,
softmax and layer norms.
"""

from __future__ import annotations

from typing import Final

from benchmarks.command import run_command
from benchmarks.lookups import Pq
from benchmarks.measure import Case
from benchmarks.networks_text import Sentences, TabledPq

_METHODS: Final = (
    *(Pq("nearest", v, 16) for v in (4, 16, 32)),
    TabledPq("nearest", 16, 16),
    Pq("tree", 16, 16),
)

CASES: Final = tuple(
    Case(Sentences(tokens), batch, _METHODS) for tokens in (32, 128) for batch in (1, 16)
)

if __name__ == "__main__":
    run_command("benchmarks.sentences", __doc__.splitlines()[0], CASES)
