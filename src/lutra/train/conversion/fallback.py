"""What a layer becomes where it cannot have the method that a recipe gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lutra.errors import LutraError
from lutra.train.layers.base import KINDS, QuantizedLayer, families, family_of
from lutra.train.recipe import Method


def settle(method: Method, module: nn.Module, kind: type[nn.Module]) -> tuple[Method, str]:
    """The first of a method and its `otherwise`s that a layer can have.

    Args:
        method: what the recipe gives the layer.
        module: the layer.
        kind: as which of `KINDS` families see it.

    Returns:
        The method, without an `otherwise`, and why it is not the one that the recipe names first;
        no reason where it is. The last method stands even if the layer cannot have it.
    """
    given, reasons = method, []
    while (other := getattr(method, "otherwise", None)) is not None:
        refusal = why_not(method, module, kind)
        if refusal is None:
            break
        reasons.append(refusal)
        method = other
    if getattr(method, "otherwise", None) is not None:
        changed: Any = method
        method = replace(changed, otherwise=None)
    if not reasons:
        return method, ""
    return method, f"{method.name} in place of {given.name}: {'; '.join(reasons)}"


def why_not(method: Method, module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a layer cannot have a method, in a few words; None where it can.

    Args:
        method: the method.
        module: the layer.
        kind: as which of `KINDS` families see it.
    """
    family = family_of(method)
    if family is None:
        return None
    if kind not in family.layers:
        return only(kind)
    form = family.layers[kind]
    if not issubclass(form, QuantizedLayer):
        return None
    try:
        form.check(form.geometry_of(module), method)
    except LutraError as error:
        return str(error).partition(";")[0]
    return None


def only(kind: type[nn.Module]) -> str:
    """Which methods a kind of layer takes."""
    able = sorted(family.method.__name__ for family in families() if kind in family.layers)
    return f"{KINDS[kind]}s take {' or '.join(f'{name}()' for name in able)} only"
