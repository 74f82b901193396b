"""Sessions in many threads at once; without the GIL where the interpreter has none."""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lutra
from lutra.format import load_graph

ZOO = Path(__file__).resolve().parent.parent / "zoo"
MODEL = ZOO / "dscnn_speech_commands.lutra"
THREADS, ROUNDS = 6, 5
has_gil = not sysconfig.get_config_var("Py_GIL_DISABLED")


def in_threads(work: Callable[[int], None]) -> None:
    """Calls ``work(i)`` in THREADS threads that begin together; raises what one of them raised."""
    barrier, errors = threading.Barrier(THREADS), []

    def run(i: int) -> None:
        try:
            barrier.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.skipif(has_gil, reason="this interpreter has a GIL")
def test_importing_lutra_leaves_the_gil_off() -> None:
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined]
    lutra.Session(MODEL)
    assert "lutra._engine" in sys.modules
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined]


@pytest.mark.parametrize("shared", [True, False], ids=["one session", "a session each"])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_get_the_golden_outputs(shared: bool, threads: int) -> None:
    """Every thread has inputs of its own, so that a mix-up of buffers would be seen."""
    golden = load_graph(MODEL).golden
    assert golden is not None
    session = lutra.Session(MODEL, threads=threads)
    x = golden[0][0]
    inputs = [np.ascontiguousarray(np.roll(x, i, axis=-1)) for i in range(THREADS)]
    wanted = [lutra.Session(MODEL, threads=1)(each).tobytes() for each in inputs]
    assert wanted[0] == golden[1][0].tobytes()
    assert len(set(wanted)) == THREADS

    def work(i: int) -> None:
        own = session if shared else lutra.Session(MODEL, threads=threads)
        for _ in range(ROUNDS):
            assert own(inputs[i]).tobytes() == wanted[i]

    in_threads(work)


def test_matrices_of_threads() -> None:
    """One low-bit matrix that all threads multiply with."""
    rng = np.random.default_rng(3)
    matrix = lutra.LowBitMatrix.pack(rng.normal(size=(64, 96)).astype(np.float32), bits=2)
    rows = [rng.normal(size=(i + 1, 96)).astype(np.float32) for i in range(THREADS)]
    wanted = [matrix.matmul(x).tobytes() for x in rows]

    def work(i: int) -> None:
        for _ in range(ROUNDS):
            assert matrix.matmul(rows[i]).tobytes() == wanted[i]

    in_threads(work)
