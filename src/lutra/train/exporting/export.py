"""From a trained torch model to a `.lutra` file."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import nn

from lutra.errors import InputError
from lutra.format import save_graph
from lutra.graph import Graph
from lutra.node import Array
from lutra.reference.compare import difference
from lutra.runtime.session import Session
from lutra.train.conversion.speed_gate import attached
from lutra.train.exporting.capture import (
    ExampleInput,
    argument_names,
    capture,
    dynamic_axes_of,
    example_tensors,
    prepare_copy,
)
from lutra.train.exporting.compact_tables import (
    CompactTables,
    compact_tables_of,
    sources_of,
    with_compact_tables,
)
from lutra.train.exporting.fold import fold_program, with_biases
from lutra.train.exporting.last_axis import with_affines_along_last
from lutra.train.exporting.lowering import decomposed, lower
from lutra.train.exporting.lowering.modules import check_modules
from lutra.train.exporting.outputs import return_tensors
from lutra.train.exporting.parity import (
    Check,
    Rounding,
    check_engine,
    check_graph,
    check_other_size,
    feeds_of,
    other_size,
    outputs_of,
    rounding_share,
)
from lutra.train.importing.examples import example_of
from lutra.train.layers.base import FrozenLayer, QuantizedLayer
from lutra.train.layers.dropin import copy_forward_hooks
from lutra.train.threads import threads_for

_SAMPLES: Final = 8  # of the check
#: Golden data take so many bytes at most, or this share of the parameters, whichever is more.
_GOLDEN_BYTES: Final = 16 * 1024
_GOLDEN_SHARE: Final = 10

#: "factors" is an old name of "compact".
Tables = Literal["stored", "compact", "factors"]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: ExampleInput,
    *,
    metadata: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: Sequence[int] | Mapping[str, Sequence[int]] = (0,),
    golden: bool = True,
    tolerance: float = 1e-3,
    tables: Tables = "stored",
) -> Graph:
    """Write a model as a `.lutra` file, after checking that the file computes what torch does.

    The model is copied, put into eval mode on the CPU in float32, its lookup layers are frozen to
    integer tables, its batch norms folded, and the rest traced with `torch.export` and turned into
    a graph. The given model stays as it is, mode and device included.

    Args:
        model: The trained model; lookup layers may be mixed with ordinary ones.
        path: The file to write.
        example_input: A tensor, or one per positional argument of `forward`; axis 0 is the batch,
            which may have any size in the file. Up to 8 samples are used for the check. Tensors of
            integers or bool (token ids, masks of attention) become int32 inputs.
        metadata: Stored in the file: anything JSON can hold.
        input_names: One per input; by default the argument names of `forward`.
        output_names: One per output; by default the keys of a returned dict, data class or named
            tuple or, of an imported model, the names in its file, else `output`, or `output_0`,
            `output_1`, ... Tensors in lists under a key are `key_0`, `key_1`, ...; what is no
            tensor, such as a decoder's cache, is left out.
        dynamic_axes: The axes that may have any size in the file, of all inputs or by input name:
            `(0, 2, 3)` for images of any height and width. Axis 0 is always among them. The
            example must have at least 2 entries on each; the file is then checked on an example of
            twice the size too. Tables of positions are as long as the model allows, or 2048.
        golden: Store samples with the engine's outputs, so that `lutra verify` can check anywhere
            that the file still gives them: as many of those of the check as take a tenth of the
            parameters or 16 KB, whichever is more. If not even one does, the file has none, and
            its metadata (`golden`) say why.
        tolerance: The largest difference from torch allowed, as a share of the largest output.
        tables: "stored" writes the tables. "compact" writes int8 weights instead, from which a
            session builds its tables: a smaller file where V < K, slower to load. The tables of
            layers of `PQ(weight_bits=8)` are the same in both; those of others change, because
            the weights are rounded before the tables are. How far the outputs for the example
            move is in the metadata (`tables`); measure the accuracy again.

    Returns:
        The graph that was written.

    Raises:
        InputError: An example or names that do not fit the model.
        UnsupportedModelError: Operators that lutra cannot run, all of them listed (modules that it
            cannot run are found first, before the model is traced); or a model that works for one
            size only of an axis that should be dynamic.
        EngineError: The engine cannot run the graph.
        LutraError: The graph computes something else than torch, the file cannot be written, or
            no lookup layer has the weights that compact tables need.

    Examples:
        >>> import torch
        >>> from lutra.train import export
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> graph = export(model, "model.lutra", torch.rand(8, 4), metadata={"seed": 0})
        >>> [node.op for node in graph.nodes]
        ['linear', 'relu']
    """
    if tables not in get_args(Tables):
        raise InputError(f"export: tables={tables!r} is not one of {list(get_args(Tables))}")
    graph, feeds, _ = export_graph(
        model,
        example_input,
        metadata=metadata,
        input_names=input_names,
        output_names=output_names,
        dynamic_axes=dynamic_axes,
        tolerance=tolerance,
        tables=tables,
    )
    graph = with_affines_along_last(graph)
    if golden:
        graph = with_golden(graph, feeds)
    save_graph(graph, path)
    return graph


def export_graph(
    model: nn.Module,
    example_input: ExampleInput,
    *,
    metadata: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: Sequence[int] | Mapping[str, Sequence[int]] = (0,),
    tolerance: float = 1e-3,
    tables: Tables = "stored",
    longest: int | None = None,
) -> tuple[Graph, dict[str, Array], Rounding]:
    """What `export` writes, checked, without golden data.

    Args:
        model: As for `export`, as the other arguments and the errors are.
        longest: Positions of tables where the model sets no limit; None for 2048.

    Returns:
        The graph, the inputs that it was checked with, and how far rounding moves its outputs.
    """
    example = tuple(tensor[:_SAMPLES] for tensor in example_tensors(example_input))
    given = return_tensors(prepare_copy(model))
    sources = sources_of(given)
    with threads_for(given, example):
        frozen = _frozen_copy(model)
        compact = compact_tables_of(frozen, sources)  # before norms go into the scales
        names = _input_names(frozen, len(example), input_names)
        axes = dynamic_axes_of(dynamic_axes, names, example)
        check_modules(frozen, example)
        known = example_of(model)
        if output_names is None and known is not None:
            output_names = known.outputs
        program = decomposed(capture(frozen, example, axes))
        wanted = outputs_of(given, example)

        @functools.cache
        def rounding() -> float:  # traces again: what was traced is folded
            again = decomposed(capture(_frozen_copy(model), example, axes))
            return rounding_share(again, example, wanted)

        fold_program(frozen, program)
        lowered = lower(program, names, output_names, _metadata(model, metadata), longest)
        graph = lowered.graph
        graph.validate()
        check = Check(example, wanted, rounding)
        check_graph(lowered, program, check, tolerance=tolerance)
        if any(axes):
            other = other_size(program, example, axes, longest)
            check_other_size(lowered, program, given, other, tolerance=tolerance, rounding=rounding)
        feeds = feeds_of(graph, example)
        if tables != "stored":
            graph = _compacted(graph, compact, feeds, check, tolerance)
    return graph, feeds, rounding


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose lookup layers are frozen and whose outputs are tensors."""
    return return_tensors(with_biases(freeze_lookup_layers(prepare_copy(model))))


def with_golden(graph: Graph, feeds: Mapping[str, Array]) -> Graph:
    """The graph with as many samples as golden data may have, or with why there are none."""
    session = Session(graph)
    room = max(_GOLDEN_BYTES, graph.parameter_bytes() // _GOLDEN_SHARE)
    one = {name: array[:1] for name, array in feeds.items()}
    outputs = session.run(None, one)
    size = sum(array.nbytes for array in (*one.values(), *outputs))
    count = min(room // size, len(next(iter(feeds.values()))))
    if count == 0:
        reason = f"one sample takes {size} bytes, and golden data {room} at most"
        return replace(
            graph, metadata={"golden": {"samples": 0, "reason": reason}, **graph.metadata}
        )
    if count > 1:
        one = {name: array[:count] for name, array in feeds.items()}
        outputs = session.run(None, one)
    return replace(graph, golden=(tuple(one.values()), tuple(outputs)))


def _metadata(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    gate = attached(model)
    entries = {"producer": _producer(), **({} if gate is None else {"speed_gate": gate})}
    return {**entries, **(given or {})}


def _compacted(
    graph: Graph,
    compact: Mapping[str, CompactTables | str],
    feeds: Mapping[str, Array],
    check: Check,
    tolerance: float,
) -> Graph:
    """The graph with compact tables, and with what they changed in its metadata."""
    graph, entry = with_compact_tables(graph, compact)
    check_engine(graph, feeds, tolerance=tolerance, rounding=check.rounding)
    moved = _moved(graph, feeds, check.expected)
    return replace(graph, metadata={"tables": {**entry, **moved}, **graph.metadata})


def _input_names(model: nn.Module, count: int, given: Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        try:
            return argument_names(model, count)
        except TypeError:  # capture says what is wrong
            return tuple(f"input_{index}" for index in range(count))
    names = tuple(given)
    if len(set(names)) != count or len(names) != count:
        raise InputError(
            f"export: input_names {list(names)} does not fit a model with {count} inputs; "
            "give one name per tensor of example_input, each once."
        )
    return names


def _moved(
    graph: Graph, feeds: Mapping[str, Any], wanted: Sequence[Any]
) -> dict[str, dict[str, float]]:
    """How far outputs are from those of torch: the largest difference as a share of the largest
    value, and the mean squared one as a share of the variance."""
    got = Session(graph).run(None, feeds)
    largest, squared = {}, {}
    for name, ours, theirs in zip(graph.outputs, got, wanted, strict=True):
        largest[name] = difference(ours, theirs)
        error = float(np.square(ours.astype(np.float64) - theirs).mean())
        squared[name] = error / max(float(theirs.var(dtype=np.float64)), 1e-30)
    return {"largest_output_difference": largest, "output_error": squared}


def freeze_lookup_layers(model: nn.Module) -> nn.Module:
    """Replace every lookup layer by its frozen form, in place.

    A lookup layer is a module whose `freeze()` returns another module, which computes with integer
    tables. A layer that is used in several places is frozen once.

    Args:
        model: The model; changed unless it is a lookup layer itself.

    Returns:
        The model, or its frozen form where it is one lookup layer.
    """
    return _freeze_tree(model, {})


def _freeze_tree(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:
        done[module] = module  # before its children, which may lead back to it
        frozen = _frozen(module)
        if frozen is None:
            for name, child in module._modules.items():  # named_children() hides repeated ones
                if child is not None:
                    module._modules[name] = _freeze_tree(child, done)
        else:
            done[module] = frozen
    return done[module]


def _frozen(module: nn.Module) -> nn.Module | None:
    freeze = getattr(module, "freeze", None)
    # Other libraries have a `freeze` that stops training and returns None or the module itself.
    if not callable(freeze) or inspect.signature(freeze).parameters:
        return None
    with torch.no_grad():
        frozen = freeze()
    if not isinstance(frozen, nn.Module) or frozen is module:
        return None
    made: nn.Module = frozen
    copy_forward_hooks(made, module)
    if isinstance(frozen, FrozenLayer) and isinstance(module, QuantizedLayer):
        frozen.show_weight(module.weight)
    return made.eval()


def _producer() -> str:
    try:
        version = importlib.metadata.version("lutra")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        version = "unknown"
    return f"lutra {version}, torch {torch.__version__}"
