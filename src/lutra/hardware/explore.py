"""The search over both: how coarse the codes are, and how large the circuit is.

Every combination of ``v``, ``k``, encoder, ``tile`` and ``elements`` is one accelerator for a whole
network. Three numbers describe it: the error that the codes cost, the cycles of one sample (the
exact model), and the cells that Yosys counts. What no other combination beats in all three is the
front.

Counting cells takes minutes, so a combination is left out before that where one that was counted
already is as good in error and cycles, and as small as this one can be. As small as it can be: an
accelerator with more distance elements or more outputs in a cycle has no fewer cells than one with
fewer and all else equal, which was counted before. A combination beyond ``max_error``, or slower
than ``max_cycles`` even if it read a table row in every cycle, is left out too. (LUT-DLA, arXiv
2501.10658, prunes by bounds of the same three kinds.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from lutra.atomic import write_whole
from lutra.hardware.cost import memory_bits
from lutra.hardware.cycles import count_cycles, pass_commands
from lutra.hardware.design import ENCODERS, Design, HardwareError

__all__ = ["Candidate", "Exploration", "LayerShape", "explore"]

#: The error of a layer by its name, for V, K and an encoder.
Sensitivity = Callable[[str, int, int, str], float]
_AXES: Final = ("encoder", "v", "k", "tile", "elements")
_MOST_ROWS: Final = 1024


@dataclass(frozen=True)
class LayerShape:
    """A layer before it has codes.

    Attributes:
        name: Its name.
        rows: Its rows for one sample.
        inputs: Inputs of a row.
        outputs: Its outputs.
    """

    name: str
    rows: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Candidate:
    """A combination that was measured.

    Attributes:
        design: The accelerator.
        error: Sum of the errors of all layers.
        cycles: Of one sample.
        cells: That Yosys counts.
        memory_bits: Bits of its memories.
    """

    design: Design
    error: float
    cycles: int
    cells: int
    memory_bits: int

    def beats(self, other: Candidate) -> bool:
        """Whether this one is at least as good in everything, and better in something."""
        mine = (self.error, self.cycles, self.cells)
        theirs = (other.error, other.cycles, other.cells)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Exploration:
    """What a search found.

    Attributes:
        measured: Every combination whose cells are known, by error.
        combinations: How many there were.
        pruned: How many were left out without counting cells.
    """

    measured: tuple[Candidate, ...]
    combinations: int
    pruned: int

    @property
    def front(self) -> tuple[Candidate, ...]:
        """The combinations that no other beats, by error."""
        return tuple(
            one for one in self.measured if not any(other.beats(one) for other in self.measured)
        )


def explore(
    network: Sequence[LayerShape],
    sensitivities: Sensitivity,
    ranges: Mapping[str, Sequence[Any]],
    *,
    act_bits: int = 7,
    max_error: float = math.inf,
    max_cycles: float = math.inf,
    cells: Callable[[Design], int] | None = None,
    store: Path | None = None,
) -> Exploration:
    """Searches for the accelerators of a network that no other beats.

    Args:
        network: Its layers.
        sensitivities: The error that a layer has with given V, K and encoder, for instance what it
            costs in accuracy when it alone is converted so. The errors of layers are added.
        ranges: What to try, by name: ``encoder``, ``v``, ``k``, ``tile``, ``elements``. Elements
            that do not divide ``k`` are passed over.
        act_bits: Bits of an activation.
        max_error: No combination with more error is of interest.
        max_cycles: No combination with more cycles is of interest.
        cells: Counts the cells of a design; Yosys where it is None.
        store: A file that keeps what was counted, so that a search that was stopped goes on.

    Raises:
        HardwareError: If a range is missing or unknown, or the file is not one of this search.

    Example:
        >>> from lutra.hardware.explore import LayerShape, explore
        >>> shapes = [LayerShape("conv", 64, 144, 32)]
        >>> found = explore(
        ...     shapes, lambda name, v, k, encoder: v / k,
        ...     {"encoder": ["l2"], "v": [3, 9], "k": [16], "tile": [8, 16], "elements": [4, 16]},
        ...     cells=lambda design: design.elements * design.v * 100 + design.tile * 150,
        ... )
        >>> found.combinations, len(found.front)
        (8, 8)
    """
    for axis in {*_AXES, *ranges}:
        if axis not in ranges or axis not in _AXES or not ranges[axis]:
            raise HardwareError(f"explore: ranges must have exactly {_AXES}, not {[*ranges]}")
    for encoder in ranges["encoder"]:
        if encoder not in ENCODERS:
            raise HardwareError(f"explore: encoder={encoder!r}; choose from {ENCODERS}")
    counting = cells or _yosys
    kept = _Store(store)
    measured: list[Candidate] = []
    combinations = pruned = 0
    for design in _designs(network, ranges, act_bits):
        combinations += 1
        error = sum(
            sensitivities(layer.name, design.v, design.k, design.encoder) for layer in network
        )
        if error > max_error or _least_cycles(network, design) > max_cycles:
            pruned += 1
            continue
        candidate = Candidate(
            design, error, _cycles(network, design), 0, sum(memory_bits(design).values())
        )
        if candidate.cycles > max_cycles:
            pruned += 1
            continue
        known = kept.get(design)
        if known is None:
            bound = replace(candidate, cells=_least_cells(design, measured))
            if any(other.beats(bound) for other in measured):
                pruned += 1
                continue
            known = counting(design)
            kept.put(design, known)
        measured.append(replace(candidate, cells=known))
    ordered = sorted(measured, key=lambda one: (one.error, one.cycles, one.cells))
    return Exploration(tuple(ordered), combinations, pruned)


def _designs(
    network: Sequence[LayerShape], ranges: Mapping[str, Sequence[Any]], act_bits: int
) -> Iterator[Design]:
    """Every combination, small circuits first, so that bounds come before what they bound."""
    rows = min(_MOST_ROWS, max(layer.rows for layer in network))
    outputs = max(layer.outputs for layer in network)
    axes = [ranges[axis] if axis == "encoder" else sorted(set(ranges[axis])) for axis in _AXES]
    for encoder, v, k, tile, elements in product(*axes):
        # A tree has no distance elements, so that all their numbers are one design.
        if k % elements or (encoder == "tree" and elements != axes[-1][0]):
            continue
        # What a tree looks at is not what its code stands for: codebooks are counted by v.
        most = max(-(-layer.inputs // v) for layer in network)
        yield Design(
            encoder=encoder, v=v, k=k, tile=tile, elements=elements, act_bits=act_bits, rows=rows,
            codes=0 if tile >= outputs else rows * most, fifo=32,
            sum_bits=max(8, 1 + (128 * most).bit_length()),
        )  # fmt: skip


def _least_cycles(network: Sequence[LayerShape], design: Design) -> int:
    """Cycles if a table row were read in each."""
    return sum(
        layer.rows * -(-layer.inputs // design.v) * -(-layer.outputs // design.tile)
        for layer in network
    )


def _cycles(network: Sequence[LayerShape], design: Design) -> int:
    return sum(
        count_cycles(
            design,
            pass_commands(design, layer.rows, -(-layer.inputs // design.v), layer.outputs),
        ).cycles
        for layer in network
    )


def _least_cells(design: Design, measured: Sequence[Candidate]) -> int:
    """The cells of the largest smaller design with all else equal; 0 where there is none."""
    return max(
        (
            one.cells
            for one in measured
            if one.design.tile <= design.tile
            and one.design.elements <= design.elements
            and (one.design.encoder, one.design.v, one.design.k)
            == (design.encoder, design.v, design.k)
        ),
        default=0,
    )


def _yosys(design: Design) -> int:
    from lutra.hardware.accelerator import Accelerator
    from lutra.hardware.synthesis import synthesize

    return synthesize(Accelerator(design)).cells


class _Store:
    """Cells that were counted, in a file that is written after each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.cells: dict[str, int] = {}
        if path is not None and path.exists():
            try:
                found = json.loads(path.read_text())
                self.cells = {str(key): int(value) for key, value in found["cells"].items()}
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise HardwareError(
                    f"{str(path)!r} is no file of a search ({error}); give another name"
                ) from error

    def get(self, design: Design) -> int | None:
        return self.cells.get(design.to_json())

    def put(self, design: Design, cells: int) -> None:
        self.cells[design.to_json()] = cells
        if self.path is not None:
            text = json.dumps({"cells": self.cells}, indent=1)
            write_whole(self.path, (text + "\n").encode())


def as_rows(found: Exploration) -> list[dict[str, Any]]:
    """The front as plain numbers, for tables and JSON."""
    return [
        {**{axis: asdict(one.design)[axis] for axis in _AXES}, "error": one.error,
         "cycles": one.cycles, "cells": one.cells, "memory_bits": one.memory_bits}
        for one in found.front
    ]  # fmt: skip
