"""The exceptions that lutra raises on purpose.

Every message is one sentence: what happened, where, the values, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class LutraError(Exception):
    """Base class of every error that lutra raises on purpose."""


class GraphError(LutraError, ValueError):
    """A graph that breaks the rules of its operators."""


class FormatError(LutraError, ValueError):
    """A file that cannot be read or written, or that is not a sound lutra model."""


class InputError(LutraError, ValueError):
    """An array given to a model that has the wrong name, shape, type or content."""


class UnsupportedModelError(LutraError, ValueError):
    """A PyTorch model that cannot be exported.

    Attributes:
        items: One line for each unsupported operator, all of them and not only the first.
    """

    def __init__(self, message: str, items: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.items: tuple[str, ...] = tuple(items)


class UnsupportedCpuError(LutraError, RuntimeError):
    """Kernels that were asked for and that this CPU (or this build) cannot run."""


class EngineError(LutraError, RuntimeError):
    """A failure inside the native engine."""
