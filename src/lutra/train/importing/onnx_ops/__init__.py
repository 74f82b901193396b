"""What computes each ONNX operator: a table, filled by the modules of this package."""

from __future__ import annotations

from lutra.train.importing.onnx_ops import (  # noqa: F401  (they register)
    arithmetic,
    control,
    conv,
    dense,
    norm,
    pool,
    quantized,
    recurrent,
    reduce,
    resize,
    select,
    shape,
)
from lutra.train.importing.onnx_ops.registry import OPS, Op

__all__ = ["OPS", "Op"]
