"""What a model returns, as tensors in tuples, lists and dicts, and the names of these tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lutra.errors import UnsupportedModelError

__all__ = ["names_of", "return_tensors"]


def return_tensors(model: nn.Module) -> nn.Module:
    """Make a model return its tensors only, in tuples, lists and dicts, in place.

    Fields of data classes become entries of a dict. What holds no tensors is left out: numbers,
    texts, None, and objects of classes of their own such as the caches of a decoder.

    Args:
        model: The model. A hook that runs behind all its others changes what it returns.
    """

    def only_tensors(module: nn.Module, inputs: Any, output: Any) -> Any:
        made = _tensors(output)
        if made is None:
            raise UnsupportedModelError(
                f"export: {type(module).__name__} returns a {type(output).__name__} without "
                "tensors; return a tensor, or tensors in a tuple, a list, a dict or a data class."
            )
        return made

    model.register_forward_hook(only_tensors)
    return model


def _tensors(value: Any) -> Any:
    """The tensors in something, in the order in which they stand there; None without any."""
    if isinstance(value, Tensor):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Mapping)):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        parts = {str(key): _tensors(each) for key, each in value.items()}
        return {key: each for key, each in parts.items() if each is not None} or None
    if isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", None)  # of a named tuple
        if fields is not None:
            return _tensors(dict(zip(fields, value, strict=True)))
        made = [each for each in map(_tensors, value) if each is not None]
        return made or None
    return None


def names_of(tree: Any) -> list[str]:
    """Names of the outputs of a model, in order.

    Args:
        tree: What it returns, with anything in place of tensors.

    Returns:
        The keys of a dict, joined to the numbers or keys of what they hold, such as
        `hidden_states_0`; else `output`, or `output_0`, `output_1`, ...
    """
    if isinstance(tree, Mapping):
        return _keys(tree, "")
    count = _count(tree)
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _keys(tree: Any, prefix: str) -> list[str]:
    if isinstance(tree, Mapping):
        parts = [(str(key), each) for key, each in tree.items()]
    elif isinstance(tree, (tuple, list)):
        parts = [(str(index), each) for index, each in enumerate(tree)]
    else:
        return [prefix]
    return [
        name for key, each in parts for name in _keys(each, f"{prefix}_{key}" if prefix else key)
    ]


def _count(tree: Any) -> int:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return sum(map(_count, tree)) if isinstance(tree, (tuple, list)) else 1
