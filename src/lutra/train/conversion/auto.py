"""A recipe that fits any network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from torch import nn

from lutra.errors import LutraError
from lutra.train.layers.forms import form_of
from lutra.train.layers.wrap import wrap
from lutra.train.layers.wrapper import Wrapper
from lutra.train.recipe import PQ, Int8, Keep, Method, Recipe

#: Layers with fewer inputs or outputs gain nothing from lookups: finding codes is most of the work.
NARROW: Final = 32
#: Linear layers of so many inputs are those of transformers, where V = 16 loses little.
WIDE: Final = 256
_WIDE_V: Final = 16
_EXACT: Final = Int8(otherwise=Keep())


def auto_recipe(model: nn.Module) -> dict[str, Method]:
    """A recipe for a whole model, by the rule of docs/training.md.

    In the order of the model's modules:

    * the first and the last convolution or linear layer: `Int8()`; where the first layer is an
      embedding, that is the first;
    * embeddings, grouped convolutions, and layers with fewer than 32 inputs or outputs: `Int8()`;
    * linear layers of at least 256 inputs: `PQ(v=16)`;
    * the others: `PQ()`, which takes the patch of one channel for a kernel and V = 4 for 1x1
      convolutions and linear layers.

    Layers that cannot be looked up become `Int8()`, and those that cannot be Int8 are kept:
    every method has an `otherwise`.

    Args:
        model: any module; it is only looked at.

    Returns:
        One pattern for each layer and attention, its path, and `"*"` at the end. Change it as you
        like, and see it with `recipe_to_json`. `convert(model, "auto", data)` is the short form.

    Raises:
        LutraError: the model has no layer that can be replaced.

    Examples:
        >>> import torch
        >>> from lutra.train import auto_recipe
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(16, 512), torch.nn.Linear(512, 512), torch.nn.Linear(512, 10)
        ... )
        >>> recipe = auto_recipe(model)
        >>> [(name, method.name, getattr(method, "v", None)) for name, method in recipe.items()]
        [('0', 'int8', None), ('1', 'pq', 16), ('2', 'int8', None), ('*', 'pq', None)]
    """
    if not isinstance(model, nn.Module):
        raise LutraError(
            f"auto_recipe: the model is a {type(model).__name__}; give a torch.nn.Module"
        )
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner  # what torch.compile wraps
    layers = [
        (name, layer) for name, module in model.named_modules() if (layer := _layer_of(module))
    ]
    if not layers:
        raise LutraError(
            f"auto_recipe: {type(model).__name__} has no convolution, linear layer or embedding "
            "that could be replaced; write a recipe by hand"
        )
    ends = {layers[0][0]}
    ends.update([name for name, module in layers if not isinstance(module, nn.Embedding)][-1:])
    recipe = {
        _literal(name): _EXACT if name in ends else _by_width(module) for name, module in layers
    }
    return {**recipe, "*": PQ(otherwise=_EXACT)} if "" not in recipe else recipe


def resolve(model: nn.Module, recipe: Recipe | Literal["auto"]) -> Recipe:
    """A recipe; that of `auto_recipe` for "auto".

    Raises:
        LutraError: another text, or what is no mapping of texts.
    """
    given: object = recipe
    if given == "auto":
        return auto_recipe(model)
    if isinstance(given, Mapping):
        others = [pattern for pattern in given if not isinstance(pattern, str)]
        if not others:
            return given
        found = f"a mapping of {others[0]!r}"
    else:
        found = f"the text {given!r}" if isinstance(given, str) else repr(given)
    raise LutraError(
        f"the recipe is {found}; give a dict of patterns and methods, such as "
        '{"*": Int8()}, "auto", or recipe_from_json of what a file holds'
    )


def _layer_of(module: nn.Module) -> nn.Module | None:
    """The layer that a module is or holds, or an attention; None for all others."""
    around = wrap(module)
    if isinstance(around, Wrapper):
        return around.layer
    is_layer = form_of(module) is not None or type(module) is nn.MultiheadAttention
    return module if is_layer and around is None else None


def _by_width(module: nn.Module) -> Method:
    """The method of a layer in the middle of a network."""
    form, size = form_of(module), getattr(module, "embed_dim", 0)
    if form is None:  # an attention, whose projections follow it
        widths, v = (size, size), _WIDE_V if size >= WIDE else None
    elif form.dense is nn.Embedding:
        return _EXACT
    else:
        weight: Any = module.weight
        outputs, inputs = weight.shape[:2][::-1] if form.transposed else weight.shape[:2]
        if getattr(module, "groups", 1) > 1:
            return _EXACT
        widths, v = (inputs, outputs), None
        if form.dense is nn.Linear and inputs >= WIDE:
            v = _WIDE_V
    return _EXACT if min(widths) < NARROW else PQ(v=v, otherwise=_EXACT)


def _literal(name: str) -> str:
    """A pattern that matches this path only."""
    return re.sub(r"([*?[])", r"[\1]", name)
