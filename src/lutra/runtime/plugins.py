"""Operators that a shared library adds to the engine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from lutra._engine import load_ops as _load_ops
from lutra.errors import EngineError

__all__ = ["include_folder", "load_ops"]


def load_ops(path: str | os.PathLike[str]) -> None:
    """Adds the operators of a shared library to the engine of this process.

    The library is C++20 compiled with the headers of the same lutra (``include_folder``);
    ``engine/core/op_registry.h`` says what it defines. It is code, so load only what you trust.
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


def include_folder() -> Path:
    """Returns the folder of the engine's headers, for ``-I`` of a compiler.

    Raises:
        EngineError: If this lutra was installed without them.
    """
    engine = importlib.util.find_spec("lutra._engine")
    assert engine is not None  # it is imported above
    assert engine.origin is not None
    folder = Path(engine.origin).parent / "include"
    if not (folder / "engine" / "core" / "op_registry.h").is_file():
        raise EngineError(f"{str(folder)!r} has no headers of the engine; install lutra again")
    return folder
