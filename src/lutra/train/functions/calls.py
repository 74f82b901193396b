"""Calls of functions inside a module's forward: found while data runs, and swapped for tables.

A `TorchFunctionMode` sees every torch function that Python code calls. What a call computes, and
of which tensor, is said once here; the rest is in `function_swap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Tables by the name of their function.
Tables = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Call:
    """A call of a function that has a table.

    Attributes:
        function: Its name: one of `lutra.functions.KNOWN`, or "softmax", "attention",
            "layer_norm", "rms_norm".
        x: What it is called with.
        run: Makes the result with a module for the table.
    """

    function: str
    x: Tensor
    run: Callable[[nn.Module], Tensor]


def _each(name: str) -> Callable[..., Call | None]:
    def call(input: Tensor, inplace: bool = False) -> Call | None:
        if not inplace:
            return Call(name, input, lambda table: table(input))
        return Call(name, input, lambda table: input.copy_(table(input)))

    return call


def _gelu(input: Tensor, approximate: str = "none") -> Call | None:
    name = "gelu" if approximate == "none" else "gelu_tanh"
    return Call(name, input, lambda table: table(input))


def _softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Call | None:
    if beta != 1.0 or threshold < 14.0:  # where a line takes over, nearer than float32 sees
        return None
    return Call("softplus", input, lambda table: table(input))


def _elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Call | None:
    return _each("elu")(input, inplace) if alpha == 1.0 else None


def _softmax_of(input: Tensor, dim: int | None, dtype: torch.dtype | None) -> Call | None:
    if dim is None:
        return None
    x = input if dtype is None else input.to(dtype)
    return Call("softmax", x, lambda table: table(x, dim))


def _softmax(
    input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None
) -> Call | None:
    return _softmax_of(input, dim, dtype)


def _softmax_functional(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Call | None:
    return _softmax_of(input, dim, dtype)


def _attention(query: Tensor, *args: Any, **kwargs: Any) -> Call | None:
    return Call("attention", query, lambda table: table(query, *args, **kwargs))


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Call | None:
    if len(tuple(normalized_shape)) != 1:
        return None
    return Call("layer_norm", input, lambda table: table(input, weight, bias, eps))


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Call | None:
    if len(tuple(normalized_shape)) != 1:
        return None
    return Call("rms_norm", input, lambda table: table(input, weight, eps))


_CALLS: dict[Any, Callable[..., Call | None]] = {
    F.gelu: _gelu,
    F.softplus: _softplus,
    F.elu: _elu,
    F.softmax: _softmax_functional,
    torch.softmax: _softmax,
    torch.special.softmax: _softmax,
    Tensor.softmax: _softmax,
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **{
        function: _each(name)
        for name, functions in {
            "silu": (F.silu,),
            "mish": (F.mish,),
            "sigmoid": (torch.sigmoid, Tensor.sigmoid, torch.special.expit),
            "tanh": (torch.tanh, Tensor.tanh),
            "erf": (torch.erf, Tensor.erf, torch.special.erf),
            "exp": (torch.exp, Tensor.exp),
            "sqrt": (torch.sqrt, Tensor.sqrt),
            "rsqrt": (torch.rsqrt, Tensor.rsqrt),
            "reciprocal": (torch.reciprocal, Tensor.reciprocal),
        }.items()
        for function in functions
    },
}


def call_of(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """What a torch function that is called computes; None if no table can."""
    known = _CALLS.get(function)
    if known is None or "out" in kwargs:
        return None
    try:
        call = known(*args, **kwargs)
    except TypeError:  # a form of the call that is not known here
        return None
    if call is None or not isinstance(call.x, Tensor) or not call.x.is_floating_point():
        return None
    return call


class Watching(TorchFunctionMode):
    """Tells of every call that a table could make.

    Args:
        seen: Called with each.
    """

    def __init__(self, seen: Callable[[Call], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = call_of(func, args, kwargs or {})
        if call is not None:
            self._seen(call)
        return func(*args, **(kwargs or {}))


class _Swapping(TorchFunctionMode):
    """Makes calls with the tables of the innermost swapped module whose forward runs."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tables = _active.get()
        call = call_of(func, args, kwargs or {}) if tables else None
        if call is not None and tables is not None:
            table = tables.get(call.function)
            if table is not None:
                return call.run(table)
        return func(*args, **(kwargs or {}))


_active: ContextVar[Tables | None] = ContextVar("lutra_function_tables", default=None)


class Swapped:
    """What a module's class gets in front: functions that forward calls are made with tables.

    The tables are the submodule `function_tables`. A module with none calls the exact functions,
    also where a module around it has tables.
    """

    function_tables: nn.ModuleDict

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module, with tables."""
        outer = _active.get()
        token = _active.set(dict(self.function_tables.items()))
        try:
            if outer is not None:
                return super().forward(*args, **kwargs)  # type: ignore[misc]
            with _Swapping():
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _active.reset(token)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name that pickle could find, only its base has.
        return _restored, (type(self).__mro__[2],), self.__dict__


def swap_class(module: nn.Module, tables: Tables) -> None:
    """Gives a module tables for the functions that its forward calls, in place."""
    if isinstance(module, Swapped):
        for name, table in tables.items():
            module.function_tables[name] = table
        return
    module.__class__ = _swapped(type(module))
    module.function_tables = nn.ModuleDict(dict(tables))
    module.function_tables.train(module.training)


_classes: dict[type, type] = {}


def _swapped(base: type) -> type:
    if base not in _classes:
        _classes[base] = type(f"Table{base.__name__}", (Swapped, base), {"__module__": __name__})
    return _classes[base]


def _restored(base: type) -> Any:
    return object.__new__(_swapped(base))


@contextmanager
def exact_functions() -> Iterator[None]:
    """Functions called inside are exact, also in a module that has tables; a decorator too."""
    token = _active.set({}) if _active.get() is not None else None
    try:
        yield
    finally:
        if token is not None:
            _active.reset(token)
