"""Which modules of a model can be replaced, and what the report says of the others with weights."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from lutra.train.layers.attention import why_no_projections
from lutra.train.layers.base import QuantizedLayer, family_of
from lutra.train.layers.forms import form_of, is_parametrized, why_kept
from lutra.train.layers.own_forward import OwnForward
from lutra.train.layers.wrap import wrap
from lutra.train.recipe import Function, Keep, Recipe, match
from lutra.train.report import LayerReport

_PART = "it is a part of a layer"


def replaceable(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The modules that can be replaced, with all their paths, in the order of the model."""
    fixed = _fixed(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in fixed and form_of(module) is not None:
            names.setdefault(module, []).append(name)
    return names


def kept_modules(model: nn.Module, recipe: Recipe) -> tuple[list[LayerReport], list[LayerReport]]:
    """The modules with parameters of their own that cannot be replaced, and why.

    Returns:
        Those with a matrix among the parameters, and those without, such as norms.
    """
    fixed = _fixed(model)
    recipe = {pattern: m for pattern, m in recipe.items() if not isinstance(m, Function)}
    large: list[LayerReport] = []
    small: list[LayerReport] = []
    for name, module in model.named_modules():
        parameters = list(module.parameters(is_parametrized(module)))
        reason = fixed.get(module)
        if not parameters or reason == _PART or (reason is None and form_of(module) is not None):
            continue
        method = match(recipe, name)
        if reason is None:
            named = family_of(method) is not None
            reason = _why(module) if named or not isinstance(method, Keep) else method.reason
        kind, size = type(module).__name__, sum(p.numel() for p in parameters)
        entry = LayerReport(name, kind, False, reason, weight_bytes=4 * size)
        (large if any(p.dim() > 1 for p in parameters) else small).append(entry)
    return large, small


def _why(module: nn.Module) -> str:
    """Why a module without a form stays as it is."""
    if isinstance(module, QuantizedLayer):
        return "it is converted already"
    if isinstance(module, nn.MultiheadAttention):
        return why_no_projections(module) or "no pattern of the recipe names it"
    around = wrap(module)
    if around is not None:
        return around if isinstance(around, str) else "no pattern of the recipe names it"
    return why_kept(module)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weight of a replaceable module in float32, or of what it is computed from."""
    if is_parametrized(module):
        return 4 * sum(p.numel() for p in module.parameters())
    return 4 * module.get_parameter("weight").numel()


def _fixed(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that are parts of others and cannot be replaced alone, and why."""
    fixed: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer | parametrize.ParametrizationList):
            whole = isinstance(module, QuantizedLayer)
            fixed.update(dict.fromkeys([*module.modules()][whole:], _PART))
        elif isinstance(module, OwnForward):
            fixed[module.body] = _PART
        elif isinstance(module, nn.MultiheadAttention):
            reason = f"it is a part of the attention '{name}', which is kept"
            fixed.update(dict.fromkeys([*module.modules()][1:], reason))
    return fixed
