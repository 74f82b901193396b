"""What losses need of the output of a model, whatever its structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lutra.errors import LutraError

#: Of the whole output and the targets.
Loss = Callable[[Any, Any], Tensor]


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor with an axis in an output: a tensor, or in a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return output if output.dim() else None
    entries = output.values() if isinstance(output, Mapping) else output
    if isinstance(entries, tuple | list) or isinstance(output, Mapping):
        for entry in entries:
            found = first_tensor(entry)
            if found is not None:
                return found
    return None


def logits(output: Any) -> Tensor:
    """The scores in an output: its `logits`, or its first tensor that is not a single number.

    Raises:
        LutraError: there is no such tensor.
    """
    found = _entry(output, "logits")
    found = found if isinstance(found, Tensor) else first_tensor(output)
    if found is None:
        if isinstance(output, Tensor):
            return output
        raise LutraError(
            f"finetune: the model returns a {type(output).__name__} without a tensor of scores; "
            "name it `logits`, or give a loss of your own"
        )
    return found


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model returns by itself: its `loss`, or a single number before others."""
    found = _entry(output, "loss")
    if found is None and isinstance(output, tuple | list) and len(output) > 1:
        found = output[0]
    return found if isinstance(found, Tensor) and found.dim() == 0 else None


def _entry(output: Any, name: str) -> Any:
    if isinstance(output, Mapping):
        return output.get(name)
    return None if isinstance(output, Tensor) else getattr(output, name, None)


def by_class(scores: Tensor, output: Any, targets: Any) -> Tensor:
    """Scores with the classes on axis 1.

    Classes are on axis 1, as PyTorch's losses have it, or on the last one, as in transformers. The
    last one it is if integer targets have the shape of the other axes, or if scores (N, T, C) come
    without targets and are one of several outputs; they then become rows (N * T, C).
    """
    last = False
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        shape = tuple(scores.shape)
        last = tuple(targets.shape) == shape[:-1] != (shape[0], *shape[2:]) and len(shape) > 2
    elif scores.dim() == 3:
        last = not isinstance(output, Tensor)
    return scores.flatten(0, -2) if last else scores


def default_loss(output: Any, targets: Any) -> Tensor:
    """The model's own loss if it returns one, or the cross entropy of its scores.

    Raises:
        LutraError: there are no targets, or they are no single tensor.
    """
    found = own_loss(output)
    if found is not None:
        return found.float()
    if not isinstance(targets, Tensor):
        kind = "no targets" if targets is None else f"targets that are a {type(targets).__name__}"
        raise LutraError(
            f"finetune: a batch has {kind}, and the model returns no loss; a batch must be a tuple "
            "(inputs, targets) or a mapping with labels, or give a loss of your own"
        )
    scores = logits(output).float()
    rows = by_class(scores, output, targets)
    return F.cross_entropy(rows, targets if rows is scores else targets.flatten())
