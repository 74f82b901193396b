"""Operators from shared libraries: built with the headers of the engine, loaded at run time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Array, int8_tensors
from index_family import TESTS, compile_plugin, load_index_family
from plans import F, add, int8, normal, plan, run

from lutra._engine import load_ops, ops
from lutra.reference.pq import quantise

GRID: dict[str, Any] = {"act_scale": 0.05, "act_zero": 8, "act_bits": 4}


@pytest.fixture(autouse=True)
def _plugin() -> None:
    load_index_family()


def tensors(outputs: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "table": rng.integers(-128, 128, (16, outputs)).astype(np.int8),
        "scale": rng.uniform(0.001, 0.01, outputs).astype(F),
        "bias": rng.normal(size=outputs).astype(F),
    }


def index_linear(x: Array, t: dict[str, Array]) -> Array:
    """In NumPy."""
    x_q = quantise(x, GRID["act_scale"], GRID["act_zero"], GRID["act_bits"])
    sums = t["table"][x_q].astype(np.int32).sum(1)
    y: Array = sums.astype(F) * t["scale"] + t["bias"]
    return y


@pytest.mark.parametrize(("rows", "features", "outputs"), [(1, 1, 1), (3, 20, 7), (150, 64, 33)])
def test_an_operator_of_a_plugin(rows: int, features: int, outputs: int) -> None:
    assert "index_linear" in ops()
    x, t = normal(rows, features), tensors(outputs)
    x.flat[0] = np.nan
    got = run(lambda p, v: add(p, "index_linear", v[0], tensors=t, in_features=features, **GRID), x)
    np.testing.assert_array_equal(got, index_linear(x, t))


def test_steps_of_plugins_and_of_the_engine_read_each_other() -> None:
    x, t, dense = normal(9, 20), tensors(24), int8_tensors(np.random.default_rng(1), (5, 24))

    def layer(p: Any, x: int) -> int:
        return add(p, "index_linear", x, tensors=t, in_features=20, **GRID)

    got = run(lambda p, v: int8(p, layer(p, add(p, "relu", v[0])), dense), x)
    made = index_linear(np.maximum(x, 0), t)
    np.testing.assert_array_equal(got, run(lambda p, v: int8(p, v[0], dense), made))


def test_plugins_name_what_they_lack() -> None:
    made = plan("scalar", 1, ["float32"], lambda p, v: add(p, "relu", v[0]))
    t = tensors(3)
    for bad, message in (
        ({"scale": t["scale"]}, r"index_linear needs the tensor 'table' \(int8, 2 axes\), and has"),
        ({**t, "table": t["table"].astype(F)}, "and it is float32 with 2 axes"),
        ({**t, "bias": np.zeros(2, F)}, "one value for each of its columns"),
    ):
        with pytest.raises(ValueError, match=message):
            add(made, "index_linear", 0, tensors=bad, in_features=4, **GRID)
    with pytest.raises(ValueError, match=r"attribute 'act_scale' \(float\), and has 'act_b"):
        add(made, "index_linear", 0, tensors=t, in_features=4, act_zero=0, act_bits=4)
    with pytest.raises(ValueError, match="index_linear neither adds another value nor clamps"):
        add(made, "index_linear", 0, tensors=t, in_features=4, clamp=(0.0, 1.0), **GRID)


def test_libraries_that_are_no_plugins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load operators from '.*missing\.so'"):
        load_ops(str(tmp_path / "missing.so"))
    source, library = tmp_path / "other.cc", tmp_path / "other.so"
    source.write_text("int other() { return 1; }\n")
    compile_plugin(source, library)
    with pytest.raises(ValueError, match="has no operators: it must define lutra_engine_abi"):
        load_ops(str(library))


def test_plugins_of_another_engine_are_refused(tmp_path: Path) -> None:
    code = (TESTS / "index_family_op.cc").read_text()
    source, library = tmp_path / "old.cc", tmp_path / "old.so"
    source.write_text(code.replace("return engine_abi()", 'return "lutra engine 0"'))
    compile_plugin(source, library)
    with pytest.raises(ValueError, match=r"for another engine \(lutra engine 0; this one is"):
        load_ops(str(library))


def test_two_operators_of_one_name(tmp_path: Path) -> None:
    library = tmp_path / "again.so"
    compile_plugin(TESTS / "index_family_op.cc", library)
    before = ops()
    with pytest.raises(ValueError, match="there is an operator 'index_linear' already"):
        load_ops(str(library))
    assert ops() == before
