"""Operators that a shared library adds to the engine."""

from __future__ import annotations

import os

from lutra._engine import load_ops as _load_ops
from lutra.errors import EngineError

__all__ = ["load_ops"]


def load_ops(path: str | os.PathLike[str]) -> None:
    """Adds the operators of a shared library to the engine of this process.

    The library is C++ compiled with the headers in ``cpp/`` of the same lutra;
    ``cpp/engine/core/op_registry.h`` says what it defines. It is code, so load only what you trust.
    The rules of its operators are registered with ``lutra.ops.register``.

    Args:
        path: The library.

    Raises:
        EngineError: If it cannot be loaded, was built for another engine, or adds an operator that
            the engine has.
    """
    try:
        _load_ops(os.fspath(path))
    except (ValueError, RuntimeError) as error:
        raise EngineError(f"{os.fspath(path)!r} cannot be loaded: {error}") from error
