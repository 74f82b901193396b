"""What an imported module knows of its inputs: their names, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from lutra.errors import InputError

#: The place in the `meta` of a module.
KEY: Final = "lutra"


@dataclass(frozen=True)
class Example:
    """The inputs and outputs of an imported module.

    Attributes:
        arguments: Names of the arguments of `forward`.
        inputs: Their names where the module comes from.
        outputs: Names of the outputs there.
        shapes: Shapes that the module takes, batch first.
        dtypes: Of the arguments.
        limits: Numbers that entries of integer arguments stay below.
        any_batch: Whether axis 0 may have any size.
    """

    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    limits: tuple[int, ...]
    any_batch: bool = True

    def make(self, samples: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random arguments: normal noise, and numbers below the limits."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for shape, dtype, limit in zip(self.shapes, self.dtypes, self.limits, strict=True):
            size = (samples, *shape[1:]) if shape and self.any_batch else shape
            if dtype.is_floating_point:
                made.append(torch.randn(size, generator=generator))
            else:
                made.append(torch.randint(0, limit, size, generator=generator).to(dtype))
        return tuple(made)


def noted(
    module: nn.Module,
    example: Example,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Puts what is known of a module into its `meta`, which copies keep.

    Args:
        module: That was imported.
        example: Its inputs and outputs.
        ranges: Of values of files of integers.
        arguments: With which the file was read, as JSON values.
    """
    cast(Any, module).meta[KEY] = {
        "example": example, "ranges": dict(ranges or {}), "arguments": dict(arguments or {}),
    }  # fmt: skip


def arguments_of(module: nn.Module) -> dict[str, Any]:
    """The arguments with which a module was imported, as JSON values; none of other modules."""
    entry = getattr(module, "meta", None)
    found = entry.get(KEY, {}).get("arguments") if isinstance(entry, dict) else None
    return dict(found or {})


def example_of(module: nn.Module) -> Example | None:
    """What an imported module, or a copy of it, knows of its inputs; None for other modules."""
    entry = getattr(module, "meta", None)
    found = entry.get(KEY, {}).get("example") if isinstance(entry, dict) else None
    return found if isinstance(found, Example) else None


def example_inputs(module: nn.Module, samples: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs that an imported module takes.

    Args:
        module: From `load_onnx` or `from_graph`, or a converted copy of it.
        samples: The size of the batch; files with a fixed batch keep theirs.
        seed: Of the random numbers.

    Returns:
        A tensor for each argument of `forward`: normal noise, or whole numbers.

    Raises:
        InputError: The module was not imported.
    """
    example = example_of(module)
    if example is None:
        raise InputError(
            f"example_inputs: the {type(module).__name__} was not made by load_onnx or from_graph, "
            "so nothing is known of its inputs; make them yourself"
        )
    return example.make(samples, seed)
