"""Which function tables a model has, as JSON values, and the same tables in another copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.functions import Piecewise
from lutra.train.functions.calls import Swapped, swap_class
from lutra.train.functions.modules import (
    TableAttention,
    TableFunction,
    TableLayerNorm,
    TableNorm,
    TableRMSNorm,
    TableSoftmax,
)

#: The attribute of a module that holds the tables of the functions that its forward calls.
_HELD: Final = "function_tables"
_TABLES: Final = (
    TableFunction, TableSoftmax, TableAttention, TableLayerNorm, TableRMSNorm, TableNorm,
)  # fmt: skip


def tables_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The tables of a model by path.

    Returns:
        JSON values by path: of a module that is a function its `kind` and settings; of a module
        whose forward calls functions `calls`, with kind and settings by the name of each function.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Swapped):
            held = module.function_tables.items()
            found[path] = {"calls": {name: _described(table) for name, table in held}}
        elif isinstance(module, _TABLES) and path.rpartition(".")[0].split(".")[-1] != _HELD:
            found[path] = _described(module)
    return found


def _described(table: nn.Module) -> dict[str, Any]:
    """Kind and settings of one table."""
    if isinstance(table, TableFunction):
        return {"kind": "function", "function": table.function}
    if isinstance(table, TableSoftmax):
        return {"kind": "softmax", "entries": len(table.exp_slope), "dim": table.dim}
    if isinstance(table, TableAttention):
        return {"kind": "attention", "entries": len(table.exp_slope)}
    if isinstance(table, TableLayerNorm | TableRMSNorm):
        kind = "layer_norm" if isinstance(table, TableLayerNorm) else "rms_norm"
        return {"kind": kind, "entries": len(table.rsqrt_slope), "eps": table.eps}
    assert isinstance(table, TableNorm)
    return {"kind": "norm", "entries": len(table.rsqrt_slope), "centred": table.centred}


def put_tables(
    model: nn.Module, tables: Mapping[str, Mapping[str, Any]], state: Mapping[str, Tensor]
) -> dict[nn.Module, nn.Module]:
    """Gives the modules of a copy the tables for the functions that they call.

    Args:
        model: has exact functions; tables that it holds already stay.
        tables: from `tables_of`.
        state: the tensors that the model will get, by name: tables of functions are made of them.

    Returns:
        The modules that are functions themselves, and what takes the place of each.

    Raises:
        LutraError: a description that is none, or that does not fit the model.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for path, entry in tables.items():
        try:
            old = model.get_submodule(path)
            calls = entry.get("calls")
            if calls is not None:
                made = {
                    name: _made(old, f"{path}.{_HELD}.{name}".lstrip("."), inner, state)
                    for name, inner in calls.items()
                }
                swap_class(old, made)
            elif not isinstance(old, _TABLES):
                replaced[old] = _made(old, path, entry, state).train(old.training)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LutraError(
                f"the function table at '{path}' ({entry}) does not fit the model: {error}; give "
                "the dense model that was converted"
            ) from error
    return replaced


def _made(
    old: nn.Module, path: str, entry: Mapping[str, Any], state: Mapping[str, Tensor]
) -> nn.Module:
    """A table for a module or one of its calls."""
    kind = entry["kind"]
    if kind == "function":
        names: Sequence[str] = ("breakpoint", "slope", "intercept")
        points = [state[f"{path}.{name}".lstrip(".")].cpu().numpy() for name in names]
        return TableFunction(Piecewise(points[0], points[1], points[2], entry["function"]))
    entries = entry["entries"]
    if kind == "softmax":
        return TableSoftmax(entry["dim"], entries)
    if kind == "attention":
        return TableAttention(entries)
    if kind == "norm":
        return TableNorm(entry["centred"], entries)
    if kind == "layer_norm" and isinstance(old, nn.LayerNorm):
        return TableLayerNorm.from_exact(old, entries)
    if kind == "rms_norm":
        return TableRMSNorm.from_exact(old, entry["eps"], entries)
    raise ValueError(f"no table of the kind {kind!r} takes the place of {type(old).__name__}")
