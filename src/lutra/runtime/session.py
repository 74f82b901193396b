"""A model that is ready to run: a graph, its plan and the checks of what goes in."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from lutra._engine import Cache, all_finite
from lutra.errors import EngineError, GraphError, InputError
from lutra.format import load_graph
from lutra.formatting import counted, did_you_mean, shape_text
from lutra.graph import Graph, Sizes, sized
from lutra.hub import MODEL, find_file
from lutra.inputs import cast_input, check_ids, id_ranges
from lutra.node import Array, Value
from lutra.ops import OPS
from lutra.runtime.cpu import choose_isa, choose_threads, usable_memory
from lutra.runtime.plan import build_plan
from lutra.runtime.profile import Profile, input_pool, measure

__all__ = ["Session"]

#: Larger batches run in pieces, so that the memory of a session stays within bounds.
_ARENA_LIMIT: Final = 2**29
#: Batches of sequences run in pieces whose values, of each thread, stay in or near the second-level
#: cache: their layers are so wide that larger ones wait for memory. Images share tiles of rows
#: instead, the more of them the better.
_SEQUENCE_ARENA: Final = 2**22
_ATTENTIONS: Final = frozenset({"attention", "masked_attention", "cached_attention"})
#: So many sizes of samples are remembered.
_KNOWN_SIZES: Final = 64
_DTYPES: Final = {name: np.dtype(name) for name in ("float32", "int32")}
_Shapes: TypeAlias = Sequence[tuple[int, ...]]


class _Fit(NamedTuple):
    """How inputs of some sizes run.

    Attributes:
        piece: The largest batch that runs at once.
        bytes: Of working memory for one sample, or for the batch where it is fixed.
        outputs: Shapes of the outputs without the batch.
    """

    piece: int
    bytes: int
    outputs: tuple[tuple[int, ...], ...]


class Session:
    """Runs a model on the CPU.

    A session may be used by several threads at the same time; each run has memory of its own.

    Examples:
        >>> import numpy as np
        >>> import lutra
        >>> relu = lutra.Node("relu", "relu", ("x",), "y")
        >>> graph = lutra.Graph((lutra.Value("x", "float32", (None, 3)),), ("y",), (relu,))
        >>> lutra.save_graph(graph, "relu.lutra")
        >>> session = lutra.Session("relu.lutra", threads=1)
        >>> session(np.array([[-1, 0, 2]], np.float32))
        array([[0., 0., 2.]], dtype=float32)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes | Graph,
        *,
        threads: int | None = None,
        isa: str | None = None,
        check_finite: bool = True,
        max_memory: int | None = None,
    ) -> None:
        """Loads a model and packs its tables for one instruction set.

        Args:
            model: A .lutra file, its bytes, or a graph.
            threads: Number of threads, the caller's included. Without it the environment variable
                LUTRA_NUM_THREADS decides, and without that the cores that this process may use.
            isa: Instruction set, one of ``lutra.runnable_isas()`` or "auto". Without it the
                environment variable LUTRA_ISA decides, and without that the best one is taken.
            check_finite: Whether ``run`` refuses inputs with NaN or infinite values.
            max_memory: Bytes of working memory that one run may take, see ``arena_bytes``. Without
                it all of the memory that this process may have.

        Raises:
            FormatError: If the file cannot be read or is not sound.
            GraphError: If the graph is not valid.
            UnsupportedCpuError: If the kernels asked for cannot run here.
            EngineError: If the engine cannot run the graph.
            MemoryError: If the model does not fit in memory with a batch of 1.
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
        self._input_names = [value.name for value in self._graph.inputs]
        self._ids = id_ranges(self._graph)
        self._plan = build_plan(self._graph, self._isa, self._threads)
        self._remembers = any(OPS[node.op].remembers for node in self._graph.nodes)
        self._can_split = all(value.shape[0] is None for value in self._graph.inputs)
        self._limit = usable_memory() if max_memory is None else max_memory
        self._fits: OrderedDict[_Shapes, _Fit] = OrderedDict()
        self._lock = threading.Lock()
        if not self._graph.is_dynamic:
            # What most runs have. A graph that does not fit the engine fails here, not in `run`.
            shapes = [sized(value.shape, 1) for value in self._graph.inputs]
            self._room(shapes)
            self._plan.prepare(shapes)

    @classmethod
    def from_pretrained(
        cls,
        where: str | os.PathLike[str],
        *,
        filename: str = MODEL,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        isa: str | None = None,
        check_finite: bool = True,
        max_memory: int | None = None,
    ) -> Session:
        """Loads the model of a folder that ``lutra.train.save_pretrained`` wrote, or of the hub.

        Args:
            where: The folder, or the name of a repository of the Hugging Face hub, ``owner/name``,
                which needs ``pip install 'lutra[hub]'``.
            filename: The file in it.
            revision: Branch, tag or commit of the repository.
            token: Of the hub, for private repositories.
            cache_dir: Where files of the hub are kept.
            threads: As of ``Session``.
            isa: As of ``Session``.
            check_finite: As of ``Session``.
            max_memory: As of ``Session``.

        Raises:
            InputError: If there is no such folder, or no such file in it.
            LutraError: If the repository cannot be read; see ``Session`` for all others.
        """
        path = find_file(where, filename, revision=revision, token=token, cache_dir=cache_dir)
        return cls(path, threads=threads, isa=isa, check_finite=check_finite, max_memory=max_memory)

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

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Name, dtype and shape of every input; None is an axis of any size."""
        return tuple(self._graph.inputs)

    @property
    def outputs(self) -> tuple[Value, ...]:
        """Name, dtype and shape of every output; None is an axis of any size."""
        return tuple(self._outputs)

    def get_inputs(self) -> list[Value]:
        """``inputs`` as a list."""
        return list(self.inputs)

    def get_outputs(self) -> list[Value]:
        """``outputs`` as a list."""
        return list(self.outputs)

    def new_cache(self, sequences: int = 1) -> Cache:
        """Memory for what a decoder keeps of sequences from run to run; it grows with them.

        ``nbytes`` says how much it holds; ``select(rows)`` makes sequence i what rows[i] was, as
        when some of them are done. A cache is for one run at a time.

        Args:
            sequences: How many; runs with the cache have that batch.

        Raises:
            InputError: If it is less than 1, or the model remembers nothing.
        """
        if type(sequences) is not int or sequences < 1:
            raise InputError(
                f"Session.new_cache: sequences={sequences!r} is not a whole number of at least 1"
            )
        if not self._remembers:
            raise InputError(
                "Session.new_cache: the model remembers nothing from run to run; export a decoder "
                "with lutra.train.export_decoder"
            )
        return self._plan.cache(sequences)

    def run(
        self,
        output_names: Sequence[str] | None,
        feeds: Mapping[str, Array],
        *,
        cache: Cache | None = None,
    ) -> list[Array]:
        """Runs the model once.

        Args:
            output_names: The outputs to return, in this order; None for all.
            feeds: An array for every input, by name. A float32 input takes float32, float16, uint8,
                int8 and int16, which are cast exactly, and float64, which is rounded. An int32
                input (token ids, masks) takes integers of any width that fit, and bool.
            cache: What earlier runs left of these sequences, for decoders, see ``new_cache``.

        Returns:
            New float32 arrays.

        Raises:
            InputError: If a name is unknown or missing, an array has the wrong dtype, shape or
                content, or a number does not fit into the dtype of its input.
            MemoryError: If one sample takes more memory than the session may use, or the outputs
                do not fit in memory.
        """
        if output_names is None:
            return self.run_checked(self._checked(feeds), cache)
        names = [value.name for value in self._outputs]
        for name in output_names:
            if name not in names:
                raise InputError(
                    f"Session.run: there is no output {name!r}; {did_you_mean(name, names)}"
                    f"the model has {names}"
                )
        picked = [names.index(name) for name in output_names]
        results = self.run_checked(self._checked(feeds), cache)
        return [results[index] for index in picked]

    def __call__(self, x: Array) -> Array:
        """Runs a model of one input and one output.

        Args:
            x: The input, as ``run`` takes it.

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
        sizes: Sizes | None = None,
        runs: int = 20,
        warmup: int = 3,
    ) -> Profile:
        """Times every step of the model.

        Args:
            inputs: As ``run`` takes them, or the array of a model of one input. Without them
                random ones are made, which change from run to run.
            batch: Samples of random inputs; a batch that the model fixes wins.
            sizes: Shapes of random inputs by name, which win over ``batch``; by default, where the
                model takes samples of any size, those of its golden data.
            runs: Runs that are timed.
            warmup: Runs before, not timed.

        Returns:
            Medians over the runs; ``print`` it for a table.

        Raises:
            InputError: If a number is out of range, if the batch is so large that ``run`` would
                cut it, and as ``run`` does.
            MemoryError: If the batch does not fit in memory.

        Examples:
            >>> import lutra
            >>> relu = lutra.Node("relu", "relu", ("x",), "y")
            >>> graph = lutra.Graph((lutra.Value("x", "float32", (None, 3)),), ("y",), (relu,))
            >>> profile = lutra.Session(graph).profile(batch=8)
            >>> [step.name for step in profile.steps]
            ['relu']
        """
        for name, number, least in (("batch", batch, 1), ("runs", runs, 1), ("warmup", warmup, 0)):
            if number < least:
                raise InputError(
                    f"Session.profile: {name}={number} is less than {least}; give at least {least}"
                )
        if inputs is None:
            pool = [self._checked(feeds) for feeds in input_pool(self._graph, batch, sizes=sizes)]
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
        piece = self._room([array.shape for array in pool[0]]).piece
        if samples > piece:
            raise InputError(
                f"Session.profile: a batch of {samples} runs in pieces of {piece}; "
                f"profile a batch of {piece} at most"
            )
        try:
            return measure(self._graph, self._plan, pool, runs, warmup)
        except MemoryError:
            raise MemoryError(
                f"Session.profile: a batch of {samples} does not fit in memory; use a smaller batch"
            ) from None

    def arena_bytes(self, batch: int = 1, *, sizes: Sizes | None = None) -> int:
        """Bytes of working memory that one run takes, tables and outputs not counted.

        Args:
            batch: Samples in the batch; a batch size that the model fixes wins.
            sizes: Shapes of the inputs by name, which win over ``batch``; needed where the model
                takes samples of any size, unless it has golden data to take them from.

        Raises:
            InputError: If the batch is less than 1, or the shapes are missing or do not fit.
        """
        if batch < 1:
            raise InputError(f"Session.arena_bytes: batch={batch} is less than 1; give at least 1")
        sizes = self._graph.nominal_sizes(batch) if sizes is None else sizes
        if sizes is None:
            raise InputError(
                "Session.arena_bytes: the model takes samples of any size; give sizes={name: shape}"
            )
        try:
            self._graph.infer(sizes)
        except GraphError as error:
            raise InputError(f"Session.arena_bytes: {error}") from error
        shapes = [tuple(sizes[value.name]) for value in self._graph.inputs]
        piece = self._fit(shapes).piece
        return self._arena_bytes([(min(shape[0], piece), *shape[1:]) for shape in shapes])

    def __repr__(self) -> str:
        shapes = [
            ", ".join("x".join(str(s or "?") for s in value.shape[1:]) or "1" for value in values)
            for values in (self._graph.inputs, self._outputs)
        ]
        lookups = sum(1 for cost in self._graph.unit_cost().values() if cost.lookups)
        size = self._graph.parameter_bytes()
        return (
            f"Session({self._name}, {shapes[0]} -> {shapes[1]}, "
            f"{counted(lookups, 'lookup layer')}, {self._isa}, "
            f"{counted(self._threads, 'thread')}, "
            f"{f'{size / 1e6:.2f} MB' if size >= 10_000 else f'{size / 1e3:.2f} kB'})"
        )

    def _fit(self, shapes: _Shapes) -> _Fit:
        """How inputs of these shapes run.

        Args:
            shapes: Of the inputs in order, each one that the model takes.

        Raises:
            InputError: If an operator cannot work on the sizes that come to it.
        """
        # Where batches are cut, only the sizes of a sample matter.
        key = tuple((0, *shape[1:]) for shape in shapes) if self._can_split else tuple(shapes)
        with self._lock:
            known = self._fits.get(key)
            if known is not None:
                self._fits.move_to_end(key)
                return known
        made = self._new_fit(shapes)
        with self._lock:
            self._fits[key] = made
            if len(self._fits) > _KNOWN_SIZES:
                self._fits.popitem(last=False)
        return made

    def _new_fit(self, shapes: _Shapes) -> _Fit:
        inputs = self._graph.inputs
        batches = [(2, *s[1:]) if self._can_split else tuple(s) for s in shapes]
        ends = self._outputs
        if self._graph.is_dynamic:
            sizes = {value.name: shape for value, shape in zip(inputs, shapes, strict=True)}
            try:
                values = self._graph.infer(sizes)
            except GraphError as error:
                given = _shapes_text(inputs, shapes)
                raise InputError(
                    f"Session.run: the model cannot work on inputs of {given}: {error}"
                ) from error
            ends = [values[value.name] for value in ends]
        outputs = tuple(tuple(size or 0 for size in value.shape[1:]) for value in ends)
        # Two samples tell what one takes: of a single one, inputs and outputs are not copied.
        need = self._arena_bytes(batches)
        most = _ARENA_LIMIT if self._limit is None else min(_ARENA_LIMIT, self._limit)
        if any(node.op in _ATTENTIONS for node in self._graph.nodes):
            most = min(most, _SEQUENCE_ARENA * self._threads)
        piece = max(1, 2 * most // max(1, need)) if self._can_split else shapes[0][0]
        if self._can_split:
            need = self._arena_bytes([(1, *shape[1:]) for shape in shapes])
        return _Fit(piece, need, outputs)

    def _room(self, shapes: _Shapes) -> _Fit:
        """The same as ``_fit``, for a run.

        Raises:
            InputError: If an operator cannot work on the sizes that come to it.
            MemoryError: If one sample takes more memory than the session may use.
        """
        fit = self._fit(shapes)
        if self._limit is not None and fit.bytes > self._limit:
            raise MemoryError(
                f"Session: inputs of {_shapes_text(self._graph.inputs, shapes)} take "
                f"{_gigabytes(fit.bytes)} of working memory{' a sample' * self._can_split}, and "
                f"{_gigabytes(self._limit)} may be used; cut them into smaller ones"
            )
        return fit

    def _arena_bytes(self, shapes: _Shapes) -> int:
        try:
            return self._plan.arena_bytes(shapes)
        except ValueError as error:
            raise EngineError(f"the engine cannot run this graph: {error}") from error

    def run_checked(self, arrays: list[Array], cache: Cache | None = None) -> list[Array]:
        """Runs a batch as ``run`` does, without looking at the inputs, which takes longer than a
        small model. In pieces where it is large: samples do not depend on each other.

        Args:
            arrays: Of the inputs in order: C-contiguous, of their dtypes and of shapes and with
                numbers that the model takes.
            cache: As of ``run``.

        Returns:
            All outputs.

        Raises:
            As ``run`` does.
        """
        batch = arrays[0].shape[0]
        if cache is not None and cache.sequences != batch:
            raise InputError(
                f"Session.run: the cache holds {cache.sequences} sequences and the inputs have a "
                f"batch of {batch}; they must be the same"
            )
        fit = self._room([array.shape for array in arrays])
        try:
            if batch <= fit.piece:
                return list(self._plan.run(arrays, cache))
            results = [np.empty((batch, *shape), np.float32) for shape in fit.outputs]
            for first in range(0, batch, fit.piece):
                piece = slice(first, first + fit.piece)
                parts = self._plan.run([array[piece] for array in arrays], cache, first)
                for result, part in zip(results, parts, strict=True):
                    result[piece] = part
        except MemoryError:
            raise MemoryError(
                "Session.run: inputs of "
                f"{_shapes_text(self._graph.inputs, [a.shape for a in arrays])} do not fit in "
                "memory; use a smaller batch or smaller inputs"
            ) from None
        except ValueError as error:
            raise EngineError(f"Session.run: {error}") from error
        return results

    def _checked(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The inputs in order, as aligned C-contiguous float32 or int32."""
        names = self._input_names
        if not isinstance(feeds, Mapping):
            raise InputError(
                f"Session.run: the inputs are a {type(feeds).__name__}; "
                f"give a dict with an array for each of {names}"
            )
        for name in feeds:
            if name not in names:
                raise InputError(
                    f"Session.run: there is no input {name!r}; {did_you_mean(name, names)}"
                    f"the model has {names}"
                )
        batch: int | None = None
        arrays: list[Array] = []
        for value in self._graph.inputs:
            if value.name not in feeds:
                raise InputError(
                    f"Session.run: the input {value.name!r} is missing; give all of {names}"
                )
            given = feeds[value.name]
            _check_shape(value, given, batch)
            array = given
            if not (isinstance(given, np.ndarray) and given.dtype == _DTYPES[value.dtype]):
                array = cast_input(_where(value), value, given)
            if value.shape[0] is None:
                batch = array.shape[0]
            if value.name in self._ids:
                node, rows = self._ids[value.name]
                check_ids(_where(value), node, array, rows)
            flags, plain = array.flags, array
            if not (flags.c_contiguous and flags.aligned):
                plain = np.require(array, requirements=("C", "A"))
            if value.dtype == "float32" and self._check_finite and not all_finite(plain):
                raise _not_finite(value.name, array)
            arrays.append(plain)
        return arrays


def _where(value: Value) -> str:
    """What an input is, for errors."""
    return f"Session.run: input {value.name!r}"


# Runs of a small model take a few microseconds, so that no sentence is written before it is needed.
def _check_shape(value: Value, array: object, batch: int | None) -> None:
    """Raises InputError about an array of the wrong shape; what is no array is left alone."""
    if not isinstance(array, np.ndarray):
        return
    shape, wanted = array.shape, value.shape
    if len(shape) != len(wanted):
        raise InputError(
            f"{_where(value)} has shape {shape}, which is {array.ndim} axes, but {_takes(value)}; "
            "give every axis, the batch included"
        )
    for axis, size in enumerate(shape):
        if size == 0:
            raise InputError(f"{_where(value)} has shape {shape}, which is empty; {_takes(value)}")
        if size != wanted[axis] and wanted[axis] is not None:
            raise InputError(
                f"{_where(value)} has shape {shape} but {_takes(value)}; axis {axis} must be "
                f"{wanted[axis]}: change the input, or export the model with an example input of "
                "that size or with dynamic_axes"
            )
    if batch is not None and wanted[0] is None and batch != shape[0]:
        raise InputError(
            f"{_where(value)} has a batch of {shape[0]} and an input before it one of {batch}; "
            "all inputs must have the same batch"
        )


def _takes(value: Value) -> str:
    return f"the model takes {shape_text(value.shape)}"


def _not_finite(name: str, array: Array) -> InputError:
    """The error for an input with NaN or infinite values."""
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    return InputError(
        f"Session.run: input {name!r} holds {bad} values of {array.size} that are NaN or "
        "infinite; correct them, or allow them with Session(..., check_finite=False)"
    )


def _shapes_text(inputs: Sequence[Value], shapes: _Shapes) -> str:
    named = zip(inputs, shapes, strict=True)
    return ", ".join(f"{value.name!r} {shape_text(shape)}" for value, shape in named)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
