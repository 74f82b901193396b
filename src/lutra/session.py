"""A model that is ready to run: a graph, its plan and the checks of what goes in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from lutra import _engine
from lutra.cpu import choose_isa, choose_threads
from lutra.errors import EngineError, InputError
from lutra.format import load_graph
from lutra.graph import Graph, Shape, Value, sized
from lutra.ops.registry import Array
from lutra.plan import build_plan
from lutra.profile import Profile, input_pool, measure
from lutra.text import counted

__all__ = ["Session"]

#: Larger batches run in pieces, so that the memory of a session stays within bounds.
_ARENA_LIMIT: Final = 2**29


class Session:
    """Runs a model on the CPU.

    A session may be used by several threads at the same time; each run has memory of its own.

    Example:
        >>> session = lutra.Session("resnet.lutra", threads=2)
        >>> logits = session(images)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes | Graph,
        *,
        threads: int | None = None,
        isa: str | None = None,
        check_finite: bool = True,
    ) -> None:
        """Loads a model and packs its tables for one instruction set.

        Args:
            model: A .lutra file, its bytes, or a graph.
            threads: Number of threads, the caller's included. Without it the environment variable
                LUTRA_NUM_THREADS decides, and without that the cores that this process may use.
            isa: Instruction set, one of ``lutra.runnable_isas()`` or "auto". Without it the
                environment variable LUTRA_ISA decides, and without that the best one is taken.
            check_finite: Whether ``run`` refuses inputs with NaN or infinite values.

        Raises:
            FormatError: If the file cannot be read or is not sound.
            GraphError: If the graph is not valid.
            UnsupportedCpuError: If the kernels asked for cannot run here.
            EngineError: If the engine cannot run the graph.
            ValueError: If the number of threads is not in 1..1024.
        """
        self._isa = choose_isa(isa)
        self._threads = choose_threads(threads)
        self._check_finite = check_finite
        if isinstance(model, Graph):
            self._name, self._graph = "graph", model
        else:
            self._name = "bytes" if isinstance(model, bytes) else Path(model).name
            self._graph = load_graph(model)
        self._outputs = [self._graph.values[name] for name in self._graph.outputs]
        self._plan = build_plan(self._graph, self._isa, self._threads)
        # Two samples tell what one takes: of a single one, inputs and outputs are not copied. Then
        # one, which most runs have. A graph that does not fit the engine fails here, not in `run`.
        self._piece = max(1, 2 * _ARENA_LIMIT // max(1, self._arena_bytes(2)))
        self._arena_bytes(1)
        self._can_split = all(value.shape[0] is None for value in self._graph.inputs)

    @property
    def graph(self) -> Graph:
        """The graph that runs."""
        return self._graph

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._isa

    @property
    def threads(self) -> int:
        """Number of threads, the caller's included."""
        return self._threads

    def get_inputs(self) -> list[Value]:
        """Name, dtype and shape of every input; None is an axis of any size."""
        return list(self._graph.inputs)

    def get_outputs(self) -> list[Value]:
        """Name, dtype and shape of every output; None is an axis of any size."""
        return list(self._outputs)

    def run(self, output_names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """Runs the model once.

        Args:
            output_names: The outputs to return, in this order; None for all.
            feeds: A float32 array for every input, by name.

        Returns:
            New float32 arrays.

        Raises:
            InputError: If a name is unknown or missing, or an array has the wrong dtype, shape or
                content.
            MemoryError: If the batch does not fit in memory.
        """
        picked = list(range(len(self._outputs)))
        if output_names is not None:
            names = [value.name for value in self._outputs]
            for name in output_names:
                if name not in names:
                    raise InputError(
                        f"Session.run: there is no output {name!r}; the model has {names}"
                    )
            picked = [names.index(name) for name in output_names]
        results = self._execute(self._checked(feeds))
        return [results[index] for index in picked]

    def __call__(self, x: Array) -> Array:
        """Runs a model of one input and one output.

        Args:
            x: The input, float32.

        Returns:
            The output, float32.

        Raises:
            InputError: If the model has several inputs or outputs, and as ``run`` does.
            MemoryError: If the batch does not fit in memory.
        """
        inputs, outputs = self._graph.inputs, self._outputs
        if len(inputs) != 1 or len(outputs) != 1:
            raise InputError(
                f"Session: the model has {len(inputs)} inputs and {len(outputs)} outputs; "
                "call session.run(None, {name: array}) instead"
            )
        return self.run(None, {inputs[0].name: x})[0]

    def profile(
        self,
        inputs: Mapping[str, Array] | Array | None = None,
        *,
        batch: int = 1,
        runs: int = 20,
        warmup: int = 3,
    ) -> Profile:
        """Times every step of the model.

        Args:
            inputs: As ``run`` takes them, or the array of a model of one input. Without them
                random ones are made, which change from run to run.
            batch: Samples of random inputs; a batch that the model fixes wins.
            runs: Runs that are timed.
            warmup: Runs before, not timed.

        Returns:
            Medians over the runs; ``print`` it for a table.

        Raises:
            InputError: If a number is out of range, if the batch is so large that ``run`` would
                cut it, and as ``run`` does.
            MemoryError: If the batch does not fit in memory.

        Example:
            >>> print(session.profile(batch=8))  # doctest: +SKIP
        """
        for name, number, least in (("batch", batch, 1), ("runs", runs, 1), ("warmup", warmup, 0)):
            if number < least:
                raise InputError(
                    f"Session.profile: {name}={number} is less than {least}; give at least {least}"
                )
        if inputs is None:
            pool = [self._checked(feeds) for feeds in input_pool(self._graph, batch)]
        elif isinstance(inputs, Mapping):
            pool = [self._checked(inputs)]
        elif len(self._graph.inputs) == 1:
            pool = [self._checked({self._graph.inputs[0].name: inputs})]
        else:
            raise InputError(
                f"Session.profile: the model has {len(self._graph.inputs)} inputs; "
                "give a dict with an array for each"
            )
        samples = pool[0][0].shape[0]
        if samples > self._piece and self._can_split:
            raise InputError(
                f"Session.profile: a batch of {samples} runs in pieces of {self._piece}; "
                f"profile a batch of {self._piece} at most"
            )
        try:
            return measure(self._graph, self._plan, pool, runs, warmup)
        except MemoryError:
            raise MemoryError(
                f"Session.profile: a batch of {samples} does not fit in memory; use a smaller batch"
            ) from None

    def arena_bytes(self, batch: int = 1) -> int:
        """Bytes of working memory that one run takes, tables and outputs not counted.

        Args:
            batch: Samples in the batch; a batch size that the model fixes wins.

        Raises:
            InputError: If the batch is less than 1.
        """
        if batch < 1:
            raise InputError(f"Session.arena_bytes: batch={batch} is less than 1; give at least 1")
        return self._arena_bytes(min(batch, self._piece) if self._can_split else batch)

    def __repr__(self) -> str:
        shapes = [
            ", ".join("x".join(str(size) for size in value.shape[1:]) or "1" for value in values)
            for values in (self._graph.inputs, self._outputs)
        ]
        lookups = sum(1 for cost in self._graph.cost().values() if cost.lookups)
        size = self._graph.parameter_bytes()
        return (
            f"Session({self._name}, {shapes[0]} -> {shapes[1]}, "
            f"{counted(lookups, 'lookup layer')}, {self._isa}, "
            f"{counted(self._threads, 'thread')}, "
            f"{f'{size / 1e6:.2f} MB' if size >= 10_000 else f'{size / 1e3:.2f} kB'})"
        )

    def _arena_bytes(self, batch: int) -> int:
        shapes = [sized(value.shape, batch) for value in self._graph.inputs]
        try:
            return self._plan.arena_bytes(shapes)
        except ValueError as error:
            raise EngineError(f"the engine cannot run this graph: {error}") from error
        except MemoryError:
            raise MemoryError(
                f"the model does not fit in memory with a batch of {batch}; use a smaller batch"
            ) from None

    def _execute(self, arrays: list[Array]) -> list[Array]:
        """Runs a batch, in pieces where it is large: samples do not depend on each other."""
        batch = arrays[0].shape[0]
        try:
            if batch <= self._piece or not self._can_split:
                return list(self._plan.run(arrays))
            results = [np.empty(sized(v.shape, batch), np.float32) for v in self._outputs]
            for first in range(0, batch, self._piece):
                piece = slice(first, first + self._piece)
                parts = self._plan.run([array[piece] for array in arrays])
                for result, part in zip(results, parts, strict=True):
                    result[piece] = part
        except MemoryError:
            raise MemoryError(
                f"Session.run: a batch of {batch} does not fit in memory; use a smaller batch"
            ) from None
        except ValueError as error:
            raise EngineError(f"Session.run: {error}") from error
        return results

    def _checked(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The inputs in order, as aligned C-contiguous float32."""
        names = [value.name for value in self._graph.inputs]
        if not isinstance(feeds, Mapping):
            raise InputError(
                f"Session.run: the inputs are a {type(feeds).__name__}; "
                f"give a dict with an array for each of {names}"
            )
        for name in feeds:
            if name not in names:
                raise InputError(f"Session.run: there is no input {name!r}; the model has {names}")
        batch: int | None = None
        arrays: list[Array] = []
        for value in self._graph.inputs:
            if value.name not in feeds:
                raise InputError(
                    f"Session.run: the input {value.name!r} is missing; give all of {names}"
                )
            array = feeds[value.name]
            _check_input(value, array, batch)
            if value.shape[0] is None:
                batch = array.shape[0]
            plain = np.require(array, requirements=("C", "A"))
            if self._check_finite and not _engine.all_finite(plain):
                raise _not_finite(value.name, array)
            arrays.append(plain)
        return arrays


def _check_input(value: Value, array: object, batch: int | None) -> None:
    """Raises InputError unless it is a float32 array of the right shape."""
    where = f"Session.run: input {value.name!r}"
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"{where} is a {type(array).__name__}; give a numpy array, "
            "such as np.asarray(x, dtype=np.float32)"
        )
    if array.dtype != np.float32:
        raise InputError(
            f"{where} has dtype {array.dtype}; the model takes float32: "
            "convert it with .astype(np.float32)"
        )
    takes = f"the model takes {_shape_text(value.shape)}"
    if array.ndim != len(value.shape):
        raise InputError(
            f"{where} has shape {array.shape}, which is {array.ndim} axes, but {takes}; "
            "give every axis, the batch included"
        )
    for axis, (size, wanted) in enumerate(zip(array.shape, value.shape, strict=True)):
        if size == 0:
            raise InputError(f"{where} has shape {array.shape}, which is empty; {takes}")
        if wanted is not None and size != wanted:
            raise InputError(
                f"{where} has shape {array.shape} but {takes}; axis {axis} must be {wanted}: "
                "change the input, or export the model with an example input of that size"
            )
    if value.shape[0] is None and batch not in (None, array.shape[0]):
        raise InputError(
            f"{where} has a batch of {array.shape[0]} and an input before it one of {batch}; "
            "all inputs must have the same batch"
        )


def _not_finite(name: str, array: Array) -> InputError:
    """The error for an input with NaN or infinite values."""
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    return InputError(
        f"Session.run: input {name!r} holds {bad} values of {array.size} that are NaN or "
        "infinite; correct them, or allow them with Session(..., check_finite=False)"
    )


def _shape_text(shape: Shape) -> str:
    sizes = ["N" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
