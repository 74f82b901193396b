"""The engine and the rules of the operators have the same limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lutra._engine import Layer
from lutra._engine import limits as engine_limits
from lutra.ops import limits


def test_the_engine_has_the_limits_of_the_operators() -> None:
    own = engine_limits()
    assert len(own) > 10
    for name, value in own.items():
        wanted = getattr(limits, name.upper())
        assert (list(wanted) if isinstance(wanted, tuple) else wanted) == value, name


def test_the_engine_refuses_more_codebooks() -> None:
    def layer(codebooks: int) -> Layer:
        tensors = {
            "tables": np.zeros((codebooks, 8, 1), np.int8),
            "splits": np.zeros((codebooks, 3), np.int32),
            "thresholds": np.zeros((codebooks, 7), np.uint8),
            "scale": np.ones(1, np.float32),
            "bias": np.zeros(1, np.float32),
        }
        attrs: dict[str, Any] = {"act_scale": 1.0, "act_zero": 0, "act_bits": 7, "in_features": 1}
        return Layer("pq_linear", "scalar", attrs, tensors)

    layer(limits.MAX_CODEBOOKS)
    with pytest.raises(ValueError, match=f"codebooks must be 1..{limits.MAX_CODEBOOKS}, "):
        layer(limits.MAX_CODEBOOKS + 1)


@pytest.mark.parametrize("weights", [2, 4, 32, limits.MAX_WEIGHTS + 2])
def test_the_engine_refuses_other_numbers_of_weights(weights: int) -> None:
    tensors = {
        "table": np.zeros((4, weights), np.int8),
        "weight": np.zeros((1, 1), np.uint8),
        "scale": np.ones(1, np.float32),
        "bias": np.zeros(1, np.float32),
    }
    attrs: dict[str, Any] = {"act_scale": 1.0, "act_zero": 0, "act_bits": 2, "in_features": 1}
    with pytest.raises(ValueError, match="odd number of columns"):
        Layer("lookup_linear", "scalar", {**attrs, "weight_bits": 8}, tensors)


@pytest.mark.parametrize("name", ["kernel", "stride", "padding", "dilation"])
def test_the_engine_refuses_larger_windows(name: str) -> None:
    attrs: dict[str, Any] = {
        "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "in_channels": 1
    }  # fmt: skip
    attrs[name] = (1, limits.MAX_EXTENT + 1)
    with pytest.raises(ValueError, match=f"at most {limits.MAX_EXTENT}, not"):
        Layer("pq_conv2d", "scalar", attrs, {})
