"""The calibration inputs of ``lutra convert``: arrays for the arguments of a model's forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lutra.cli.common import need_finite, read_array, read_arrays
from lutra.errors import InputError
from lutra.formatting import did_you_mean
from lutra.inputs import cast_input
from lutra.node import Array, Value

#: The array of an archive that is the input of any model with one.
_ONLY = "x"


def read_inputs(path: str, forward: Any) -> dict[str, Array]:
    """The arguments of a forward pass, each with an entry for each sample.

    Args:
        path: A .npy file with the one argument, or a .npz file with an array for each argument, of
            the argument's name; ``x`` is the first argument of any model. Arrays of other names,
            such as labels, are not read.
        forward: The method that takes the arguments.

    Returns:
        Arrays by argument name, in the order of the arguments: float32, int64 or bool.

    Raises:
        InputError: If the file cannot be read, lacks an argument, or an array is empty, not finite
            or of a dtype that is no input.
    """
    if path.endswith(".npy"):
        arrays = {_ONLY: read_array(path)}
        _choose(path, list(arrays), forward)
    else:
        arrays = read_arrays(path, lambda names: _choose(path, names, forward))
    made = {name: _ready(path, name, array) for name, array in arrays.items()}
    sizes = {name: len(array) for name, array in made.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"{path!r} holds arrays of different length: {sizes}; give an entry for each sample"
        )
    return made


def _choose(path: str, held: list[str], forward: Any) -> list[str]:
    """Those names in a file that are arguments, in the order of the arguments."""
    required, names = _parameters(forward)
    given = [name for name in names if name in held]
    if not given and _ONLY in held:
        if len(required) > 1:
            raise InputError(
                f"{path!r} holds one input, but forward takes {', '.join(required)}; give a .npz "
                "file with an array for each"
            )
        return [_ONLY]
    if not given:
        raise InputError(
            f"{path!r} has no array 'x' and no argument of forward ({', '.join(names) or 'none'}), "
            f"only {held}; {did_you_mean(held[0], names) if held else ''}name each array after an "
            "argument"
        )
    missing = [name for name in required if name not in held]
    if missing:
        others = [name for name in held if name not in names]
        raise InputError(
            f"{path!r} lacks {', '.join(missing)}, which forward needs; it holds {held}: "
            f"{did_you_mean(missing[0], others)}give an array for each of {', '.join(required)}"
        )
    left_out = [name for name in names[: names.index(given[-1])] if name not in held]
    if left_out:
        raise InputError(
            f"{path!r} lacks {', '.join(left_out)}, which forward takes before {given[-1]}; the "
            f"inputs of a file are by position, so give it too, or leave out {given[-1]}"
        )
    return given


def _parameters(forward: Any) -> tuple[list[str], list[str]]:
    """The names of the arguments that are needed, and of all that may be given by position."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # no signature: it may take anything
        return [], []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [p.name for p in positional if p.default is p.empty], [p.name for p in positional]


def _ready(path: str, name: str, array: Array) -> Array:
    where = f"{path!r}: {name}"
    if array.ndim < 1 or array.size == 0:
        raise InputError(
            f"{path!r} holds {name} of shape {array.shape}; it must be (N, ...) and not empty"
        )
    if array.dtype.kind == "f":
        need_finite(path, array)
        array = cast_input(where, Value(name, "float32", array.shape), array)
    elif array.dtype != np.bool_:
        array = cast_input(where, Value(name, "int32", array.shape), array).astype(np.int64)
    # a file is mapped read-only, and PyTorch wants to be able to write
    return np.require(array, requirements=("C", "W"))


def in_batches(inputs: Mapping[str, Array], size: int) -> Sequence[tuple[Array, ...]]:
    """The arguments, ``size`` samples at a time."""
    count = len(next(iter(inputs.values())))
    return [
        tuple(array[first : first + size] for array in inputs.values())
        for first in range(0, count, size)
    ]
