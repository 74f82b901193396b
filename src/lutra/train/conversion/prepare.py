"""A model as conversion needs it: a plain module in float32 whose layers can be replaced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lutra.errors import LutraError
from lutra.train.conversion.spill import Spill
from lutra.train.layers.attention import PROJECTIONS, Attention, why_no_projections
from lutra.train.layers.base import QuantizedLayer, family_of
from lutra.train.layers.dropin import adopt_attributes, copy_model, hooks_of, move_hooks
from lutra.train.layers.forms import WEIGHT_HOOKS, form_of, is_parametrized
from lutra.train.layers.own_forward import OwnForward
from lutra.train.layers.recurrent import Recurrent, matrix_names, why_no_matrices
from lutra.train.layers.wrap import may_wrap, wrap
from lutra.train.layers.wrapper import PARTS, Wrapper
from lutra.train.recipe import Method, Recipe, match

#: Modules whose parts are layers that take the name of the whole in recipes too.
PARENTS = (Attention, Recurrent)
_HALF = (torch.float16, torch.bfloat16)
_COMPILED = "_orig_mod"  # where torch.compile keeps the module


@dataclass
class Prepared:
    """A model that is ready for conversion.

    Attributes:
        model: the model that was given, or a copy of it where anything had to be changed.
        recipe: for its paths.
        notes: what was changed, one sentence each.
        was_half: whether its floats were float16 or bfloat16.
        folded: what computed the weights of a layer, by its path.
    """

    model: nn.Module
    recipe: Recipe
    notes: list[str] = field(default_factory=list)
    was_half: bool = False
    folded: dict[str, str] = field(default_factory=dict)


def prepare(model: Any, recipe: Recipe, is_replaced: Callable[[Method], bool]) -> Prepared:
    """Makes a model ready: not compiled, in float32, with a linear layer for each projection of an
    attention that the recipe names and each matrix of a GRU or LSTM that it gives a method which
    takes them, with plain weights in the layers that it names, and with a layer of its own for each
    transposed convolution and each layer with a forward of its own.

    Args:
        model: any module; it is not modified.
        recipe: of the conversion.
        is_replaced: whether a method makes layers.

    Raises:
        LutraError: what is given is no module, or one without weights of its own yet.
    """
    check_model(model)
    made = Prepared(model, recipe)
    compiled = [m for m in model.modules() if _is_compiled(m)]
    made.was_half = any(t.dtype in _HALF for t in (*model.parameters(), *model.buffers()))
    if compiled:
        made.recipe = {p.replace(f"{_COMPILED}.", ""): m for p, m in recipe.items()}
        made.notes.append(
            "the model was compiled by torch.compile; the converted one is not, compile it again"
        )
        made.model = _uncompiled(copy_model(_inside(model)))
    if made.was_half:
        made.notes.append("the weights were float16 or bfloat16; the converted model is in float32")
        made.model = made.model if compiled else copy_model(model)
        made.model._apply(_float)  # type: ignore[no-untyped-call]
    names: dict[nn.Module, list[str]] = {}
    for name, module in made.model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    def is_named(*paths: str) -> bool:
        return is_replaced(match(made.recipe, *paths))

    def takes_matrices(rnn: nn.Module, paths: list[str]) -> bool:
        parts = (projection_paths(paths, part) for part in matrix_names(rnn))
        families = [family_of(match(made.recipe, *part)) for part in parts]
        return all(family is not None and family.takes_recurrent for family in families)

    attentions, weights, wrapped, recurrent = [], [], [], []
    for module, paths in names.items():
        if isinstance(module, nn.MultiheadAttention):
            parts = [projection_paths(paths, part) for part in PROJECTIONS]
            if why_no_projections(module) is None and any(is_named(*part) for part in parts):
                attentions.append(paths[0])
                weights += [f"{path}.out_proj" if path else "out_proj" for path in paths[:1]]
                weights.append(paths[0])
        elif why_no_matrices(module) is None and takes_matrices(module, paths):
            recurrent.append(paths[0])
        elif _has_weight(module) and is_named(*paths, *(f"{p}.{n}" for p in paths for n in PARTS)):
            weights.append(paths[0])
            wrapped.append(paths[0])
    weights = [name for name in weights if is_parametrized(made.model.get_submodule(name))]
    wrapped = [name for name in wrapped if may_wrap(made.model.get_submodule(name))]
    if (weights or attentions or recurrent or wrapped) and made.model is model:
        made.model = copy_model(model)
    for name in weights:
        made.folded[name] = _fold(made.model.get_submodule(name))
    for name in reversed(wrapped):  # a layer inside another one first
        old = made.model.get_submodule(name)
        around = wrap(old)
        if not isinstance(around, Wrapper):
            continue
        made.notes += [lost_hook(kind, name) for kind in move_hooks(around, old)]
        made.model = replace_modules(made.model, {old: around})
        path = f"{name}.{around.part}" if name else around.part
        if isinstance(around, OwnForward) and around.is_computed:
            made.folded[path] = f"the forward of {type(old).__name__}"
        elif name in made.folded:
            made.folded[path] = made.folded[name]
    for name in attentions:
        old = made.model.get_submodule(name)
        assert isinstance(old, nn.MultiheadAttention)
        new = Attention(old)
        adopt_attributes(new, old)
        made.notes += [lost_hook(kind, name) for kind in move_hooks(new, old)]
        if any(True for _ in hooks_of(old.out_proj)):
            made.notes.append(
                f"the hooks of '{name}.out_proj' are lost: nn.MultiheadAttention never calls it"
            )
        made.model = replace_modules(made.model, {old: new})
        for part in PROJECTIONS:
            path = f"{name}.{part}" if name else part
            if name in made.folded:
                made.folded.setdefault(path, made.folded[name])
    for name in recurrent:
        rnn: Any = made.model.get_submodule(name)
        split = Recurrent(rnn)
        adopt_attributes(split, rnn)
        made.notes += [lost_hook(kind, name) for kind in move_hooks(split, rnn)]
        made.model = replace_modules(made.model, {rnn: split})
    return made


def check_model(model: Any) -> None:
    """Refuses what is no module whose layers could be replaced.

    Raises:
        LutraError: says what to give instead.
    """
    what = None
    if isinstance(model, str | os.PathLike):
        what = f"the path {os.fspath(model)!r}; load the file and give the module"
    elif isinstance(model, Mapping):
        what = "a dict, such as a state dict; load it into the module (load_state_dict) and give it"
    elif isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        what = "scripted or traced, and its layers cannot be replaced; give the module behind it"
    elif isinstance(model, torch.export.ExportedProgram):
        what = "an exported program; give the module that was exported"
    elif isinstance(model, type):
        what = f"the class {model.__name__}; give an instance of it"
    elif not isinstance(model, nn.Module):
        what = f"a {type(model).__name__}; give a torch.nn.Module"
    if what is not None:
        raise LutraError(f"convert: the model is {what}")
    for name, module in model.named_modules():
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise LutraError(
                f"convert: layer '{name}' has no weights yet ({type(module).__name__}); run the "
                "model once on a batch before"
            )


def projection_paths(paths: Iterable[str], part: str) -> tuple[str, ...]:
    """The names of a projection in a recipe: its own paths, and those of its attention."""
    given = tuple(paths)
    return (*(f"{path}.{part}" if path else part for path in given), *given)


def wrapped_paths(model: nn.Module, path: str) -> list[str]:
    """The further names in a recipe of a layer that is inside a `Wrapper`: the path of the wrapper,
    and its own path in the model that was given."""
    names = []
    parent = path.rpartition(".")[0]
    if isinstance(model.get_submodule(parent), Wrapper):
        names.append(parent)
    parts = path.split(".")
    given = [
        part
        for i, part in enumerate(parts)
        if part != "body" or not isinstance(model.get_submodule(".".join(parts[:i])), OwnForward)
    ]
    return names if given == parts else [*names, ".".join(given)]


def lost_hook(kind: str, name: str) -> str:
    """The note about a hook that could not be moved."""
    return f"a {kind} of '{name}' is lost, as it belongs to the dense layer itself"


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts new modules in all places where a model holds old ones."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def tied_parameters(model: nn.Module) -> set[int]:
    """The parameters, by `id`, that several modules hold."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def leave_fast_path(model: nn.Module) -> None:
    """Keeps the encoders of torch.nn that hold new modules off PyTorch's fast path, which reads
    the weights of layers and does not call them. The mark is an ordinary attribute that only
    the choice of the path reads, so copies and pickles have it too."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if any(isinstance(part, QuantizedLayer | Attention) for part in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            else:
                module.enable_nested_tensor = module.use_nested_tensor = False


def _has_weight(module: nn.Module) -> bool:
    """Whether a module is a layer, or something around one."""
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.modules.conv._ConvTransposeNd
    return form_of(module) is not None or isinstance(module, kinds)


def _is_compiled(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or isinstance(module._modules.get(_COMPILED), nn.Module)


def _inside(module: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped."""
    inner = module._modules.get(_COMPILED)
    return module if inner is None else _inside(inner)


def _uncompiled(model: nn.Module) -> nn.Module:
    """Takes the wrappers of torch.compile out of a copy."""
    wrapped = {m: _inside(m) for m in model.modules() if m._modules.get(_COMPILED) is not None}
    return replace_modules(model, wrapped)


def _fold(module: nn.Module) -> str:
    """Gives a module plain weights, as they are computed in eval mode; says what computed them."""
    done = []
    mode = module.training
    module.eval()
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        values = {tensor: getattr(module, tensor).detach().clone() for tensor in parametrizations}
        done += [type(s).__name__.strip("_") for steps in parametrizations.values() for s in steps]
        trained = any(p.requires_grad for p in parametrizations.parameters())
        # torch's own way takes the property off the class, which the original shares.
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for tensor, value in values.items():
            module.register_parameter(tensor, nn.Parameter(value, requires_grad=trained))
    for hook in [h for h in module._forward_pre_hooks.values() if isinstance(h, WEIGHT_HOOKS)]:
        done.append(type(hook).__name__)
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        else:
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
    module.train(mode)
    return " and ".join(dict.fromkeys(done))


class CalibrationData:
    """Batches, of which the first is remembered.

    Args:
        data: batches.
        to_float: whether float16 and bfloat16 become float32.
    """

    def __init__(self, data: Iterable[Any], to_float: bool) -> None:
        self._data, self._to_float = data, to_float
        self.first: Any = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self._data:
            made = _floats(batch) if self._to_float else batch
            if self.first is None:
                self.first = made
            yield made

    def kept(self, store: Spill) -> list[Any]:
        """All batches, to be read again and again."""
        whole = isinstance(self._data, list | tuple) and not self._to_float
        batches = store.keep_all(self._data if whole else iter(self))
        self.first = batches[0] if batches else None
        return batches


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _floats(value: Any) -> Any:
    """A structure with float32 in place of float16 and bfloat16."""
    if isinstance(value, Tensor):
        return _float(value)
    if isinstance(value, Mapping):
        return {name: _floats(entry) for name, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_floats(entry) for entry in value))
    if isinstance(value, tuple | list):
        return type(value)(_floats(entry) for entry in value)
    return value
