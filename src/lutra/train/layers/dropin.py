"""What stays when a layer takes the place of another: attributes, hooks, and copies with them."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

_FORWARD_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_OTHER_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_FULL = "_is_full_backward_hook"


def adopt_attributes(new: nn.Module, old: nn.Module) -> None:
    """Gives a new layer what other code reads from the old one: `in_channels`, `kernel_size`,
    `out_features`, ..., and what was set on the instance.

    Tensors, private attributes and those that the new layer has already are left out.
    """
    bound = (Tensor, nn.Module, types.MethodType, types.FunctionType)
    for name, value in old.__dict__.items():
        if not name.startswith("_") and not isinstance(value, bound) and not hasattr(new, name):
            new.__dict__[name] = value


def move_hooks(new: nn.Module, old: nn.Module) -> list[str]:
    """Registers the hooks of an old layer on the one in its place.

    Returns:
        The kinds of hooks that are lost, as they belong to the old layer itself.
    """
    lost = []
    for kind in (*_FORWARD_HOOKS, *_OTHER_HOOKS):
        hooks, place = getattr(old, kind, {}), getattr(new, kind, {})
        for key, hook in hooks.items():
            if old in owners(hook):
                lost.append(kind.strip("_").replace("_", " ").removesuffix("s"))
            elif isinstance(hook, _WrappedHook) and hook.with_module:
                place[key] = _WrappedHook(hook.hook, new)
            else:
                place[key] = hook
    if getattr(old, _FULL, None) is not None:
        setattr(new, _FULL, getattr(old, _FULL))
    return lost


def copy_forward_hooks(new: nn.Module, old: nn.Module) -> None:
    """Registers the forward hooks of a layer on its frozen form too."""
    for kind in _FORWARD_HOOKS:
        getattr(new, kind).update(getattr(old, kind))


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that calls the same hooks, where these are no methods of its modules.

    Weights that were computed from others, as by weight norm, are copied too.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hook in hooks_of(module):
            bound = [owner for owner in owners(hook) if isinstance(owner, nn.Module)]
            if not bound:
                memo[id(hook)] = hook
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """All functions that are registered as hooks of a module."""
    for kind in (*_FORWARD_HOOKS, *_OTHER_HOOKS):
        for hook in getattr(module, kind, {}).values():
            if callable(hook):  # other dicts say which hooks take keywords
                yield hook.hook if isinstance(hook, _WrappedHook) else hook


def owners(hook: Any) -> list[Any]:
    """The objects that a hook is bound to: of a method, and of a call with arguments filled in."""
    if isinstance(hook, types.MethodType):
        return [hook.__self__]
    if isinstance(hook, functools.partial):
        return [*owners(hook.func), *hook.args, *hook.keywords.values()]
    if isinstance(hook, _WrappedHook):
        return owners(hook.hook)
    return []
