"""From a trained model to one whose layers are lookups or integer arithmetic."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train import distributed
from lutra.train.conversion.auto import resolve
from lutra.train.conversion.calibrate import Reservoir, collect
from lutra.train.conversion.candidate import Candidate, choose
from lutra.train.conversion.check import check_calls
from lutra.train.conversion.equalize import equalize as equalized
from lutra.train.conversion.kept import kept_modules
from lutra.train.conversion.prepare import (
    CalibrationData,
    leave_fast_path,
    lost_hook,
    prepare,
    replace_modules,
    tied_parameters,
)
from lutra.train.conversion.replay import Replay
from lutra.train.conversion.resume import FinishedLayers, digest
from lutra.train.conversion.sequential import Batches, Targets, norms_behind
from lutra.train.conversion.smooth import smoothing_factors
from lutra.train.conversion.speed_gate import SpeedGate, attach, decide, record
from lutra.train.conversion.spill import Spill
from lutra.train.functions.swap import FunctionSwap
from lutra.train.layers.base import QuantizedLayer, family_of
from lutra.train.layers.dropin import copy_model, move_hooks
from lutra.train.layers.folded_norm import fold_behind
from lutra.train.progress import Progress
from lutra.train.recipe import Method, Recipe, recipe_to_json
from lutra.train.report import ConversionReport, Decision
from lutra.train.threads import threads_for_rows

#: Whether layers are fitted to the dense network one after the other, or each for itself.
Calibration = Literal["sequential", "parallel"]
_MORE_ROWS = 4  # rows that weights and tables are fitted on, relative to those of codebooks


def convert(
    model: nn.Module,
    recipe: Recipe | Literal["auto"],
    calibration_data: Iterable[Any],
    *,
    rows: int = 8192,
    memory_bytes: int = 1 << 30,
    kmeans_steps: int = 25,
    seed: int = 0,
    progress: bool | None = None,
    speed_gate: bool | SpeedGate = False,
    share_encoders: bool = True,
    calibration: Calibration = "sequential",
    equalize: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, ConversionReport]:
    """Replaces layers by lookups, or by int8 arithmetic, and calibrates them.

    Args:
        model: any module; it is not modified, and it need not be traceable. A compiled model is
            taken without its compilation, one in float16 or bfloat16 is converted to float32; the
            report says so.
        recipe: glob patterns of module paths -> `PQ(...)`, `Lookup(...)`, `Int8()` or `Keep()`; the
            first match wins, and what no pattern names is kept. An embedding becomes int8 where
            `Int8()` names it and stays as it is elsewhere. Every pattern must name some layer.
            A layer that the model holds in several places is replaced in all of them. A pattern
            that names an `nn.MultiheadAttention` names its projections (`q_proj`, `k_proj`,
            `v_proj`, `out_proj`), and `Int8()` for an `nn.GRU` or `nn.LSTM` its matrices (`ih_l0`,
            `hh_l0`, ...); weights that are computed, as by weight norm, are folded.
            "auto" is `lutra.train.auto_recipe(model)`.
        calibration_data: batches, run in eval mode: tensors, tuples of positional arguments,
            or mappings of keyword arguments. A tuple gives `forward` as many entries as it takes;
            a last one with one number for each sample is taken as targets and left out, unless
            `forward` requires it (`lutra.train.batches.BatchReader` has the rule). A thousand
            samples are plenty. With torch.distributed, give every process a part of its own.
        rows: sample rows per layer for grids and codebooks. Sequential calibration fits weights
            and tables on four times as many, where memory allows.
        memory_bytes: limit for all samples of inputs together. Sequential calibration keeps the
            batches, and the outputs of the dense network for the rows that it fits; what of them is
            beyond this limit lies in a temporary file. Batches of a list are in memory anyway.
        kmeans_steps: Lloyd steps.
        seed: of sampling and k-means.
        progress: show a progress bar; None shows it on terminals only.
        speed_gate: replace a layer only where lookups are faster in the engine, on this machine, at
            the layer's input shape; `SpeedGate(...)` says with how many threads and against what.
            The others stay dense, in float32 or int8, whichever is faster. Times and decisions are
            in the report, and go into the metadata of a file that is exported from the converted
            model.
        share_encoders: let PQ layers that read the same tensor in the same way (q, k and v of an
            attention) share one set of codebooks, so that the engine makes the codes once. They
            then hold the same parameters.
        calibration: "sequential" fits each layer, in the order of the model, on the inputs that the
            layers converted before it give, to the outputs of the dense network: weights or free
            tables by ridge regression, biases by their mean. It keeps the batches, and runs the
            model once more for each layer. "parallel" calibrates every layer for itself.
        equalize: let factors for each channel move between layers that become `Int8` or `Lookup`
            where that lowers the error of their outputs on the calibration data, so that all
            channels use their grid well. It needs a thousand rows of a layer at least, and helps
            where other inputs are like them; measure. The outputs of inner modules are scaled
            then, and no targets for `finetune(feature_layers=...)`.
        checkpoint: a folder that keeps the layers that are finished. The same call with the same
            model, data and settings goes on behind them after a stop, and gives the same bits. Only
            sequential calibration has it, on one process, and without the speed gate, whose
            timings differ from run to run.

    Returns:
        The converted copy, ready for fine-tuning, and a report of every module that has a weight.

    Raises:
        LutraError: a pattern matches nothing, a layer cannot be replaced, the data is unusable, or
            code of the model goes past a new layer, as it reads its weight without calling it.

    Examples:
        >>> import torch
        >>> from lutra.train import PQ, Int8, convert
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        ... )
        >>> batches = [torch.rand(64, 16) for _ in range(4)]
        >>> lookup, report = convert(model, {"0": Int8(), "*": PQ(v=4)}, batches)
        >>> type(lookup[2]).__name__
        'PQLinear'
        >>> [(layer.name, layer.method) for layer in report.layers]
        [('0', 'int8'), ('2', 'pq')]
    """
    show = progress if distributed.rank() == 0 else False
    recipe = resolve(model, recipe)
    ready = prepare(model, recipe, _makes_layers)
    model, recipe = ready.model, ready.recipe
    layers = choose(model, recipe, ready.folded)
    kept, small = kept_modules(model, recipe)
    data = CalibrationData(calibration_data, ready.was_half)
    functions = FunctionSwap(model, recipe)
    if calibration not in get_args(Calibration):
        raise LutraError(
            f"convert: calibration={calibration!r} is not one of {list(get_args(Calibration))}"
        )
    sequential = calibration == "sequential"
    if equalize and not sequential:
        raise LutraError(
            "convert: equalize=True goes with calibration='sequential', which keeps the data"
        )
    if checkpoint is not None and (not sequential or speed_gate or distributed.active()):
        raise LutraError(
            f"convert: checkpoint={str(checkpoint)!r} goes with calibration='sequential', one "
            "process and no speed gate; leave it out, or name the layers in the recipe that the "
            "gate chose"
        )
    store = Spill(memory_bytes)
    batches = data.kept(store) if sequential else data
    calibrated = {layer.name: layer for layer in layers if layer.is_calibrated}
    if not any(layer.method for layer in layers) and not functions.wanted:
        raise LutraError(
            "the recipe replaces no layer; give a pattern PQ(...), Lookup(...), Int8() or "
            "Function(...)"
        )
    samples: dict[str, Reservoir] = {}
    if calibrated or functions.wanted:
        with Progress("calibrating", None, show) as bar, functions.watching():
            samples = collect(
                model,
                {name: layer.module for name, layer in calibrated.items()},
                {name: layer.geometry for name, layer in calibrated.items()},
                batches,
                rows=rows, memory_bytes=memory_bytes, seed=seed + distributed.rank(),
                progress=bar.update,
            )  # fmt: skip
    if calibrated:
        _keep_unreached(calibrated, samples)
    gate = SpeedGate() if speed_gate is True else speed_gate or None
    decisions = {} if gate is None else _gate(gate, calibrated, samples, show)
    targets = None
    chosen = {name: layer for name, layer in calibrated.items() if layer.method is not None}
    notes = list(ready.notes)
    scaled: Mapping[str, float] = {}
    if equalize and chosen:
        methods = {name: layer.method for name, layer in chosen.items() if layer.method is not None}
        sampled = {name: samples[name].rows for name in chosen}
        model, scaled = equalized(model, methods, sampled, list(batches))
        for layer in layers:
            layer.module = model.get_submodule(layer.name)
        if scaled:
            notes.append(
                "ranges of channels were made alike: the outputs of "
                f"{', '.join(sorted(scaled))} are scaled, channel by channel"
            )
    if chosen and not scaled:  # else samples are those of other weights
        factors = smoothing_factors(
            model,
            {name: layer.module for name, layer in chosen.items()},
            {name: layer.method for name, layer in chosen.items() if layer.method is not None},
            {name: samples[name].rows for name in chosen},
            {name: _read(samples[name]) for name in chosen},
        )
        for name, own in factors.items():
            chosen[name].factors = own
        if factors:
            notes.append(
                f"features of the inputs of {', '.join(sorted(factors))} are divided by factors, "
                "as some are much larger than others"
            )
    if sequential and chosen:
        most = _fitted_rows(rows, memory_bytes, chosen.values())
        targets = Targets(Batches(list(batches), most, seed), store, Replay(memory_bytes))
        targets.collect(model, {name: layer.module for name, layer in chosen.items()})
        # What the speed gate keeps is noted behind the others.
        calibrated = {name: calibrated[name] for name in (*targets.order, *calibrated)}
    norms: dict[str, nn.Module] = {}
    if chosen and data.first is not None:
        norms = norms_behind(
            model, {name: layer.module for name, layer in chosen.items()}, data.first
        )
    places = {module: name for name, module in model.named_modules()}
    leaders = _leaders(calibrated, samples) if share_encoders else {}
    finished = None
    if checkpoint is not None:
        settings = {
            "recipe": recipe_to_json(recipe), "model": digest(model.state_dict()),
            "data": digest(batches), "rows": rows, "memory_bytes": memory_bytes,
            "kmeans_steps": kmeans_steps, "seed": seed, "share_encoders": share_encoders,
            "equalize": equalize,
        }  # fmt: skip
        finished = FinishedLayers(checkpoint, settings)
    converted = copy_model(model)
    paths = {module: name for name, module in converted.named_modules()}
    replacements: dict[nn.Module, nn.Module] = {
        converted.get_submodule(layer.name): layer.embed()
        for layer in layers
        if layer.method is not None and not layer.is_calibrated
    }
    for old, stand_in in replacements.items():
        notes += [lost_hook(kind, paths[old]) for kind in move_hooks(stand_in, old)]
    with Progress("learning codebooks", len(calibrated), show) as bar:
        fitted: dict[str, QuantizedLayer] = {}
        shared = tied_parameters(converted)
        for i, (name, layer) in enumerate(calibrated.items()):
            sample, start = samples.pop(name), time.perf_counter()
            if layer.method is None:  # the speed gate keeps it
                continue
            old = converted.get_submodule(name)
            leader = fitted.get(leaders.get(name, ""))
            known = None if finished is None else finished.load(name)
            if known is not None:
                new = layer.again(old, leader, *known)
            else:
                rows_in, wanted = sample.rows, None
                if targets is not None:
                    rows_in, wanted = targets.rows(
                        converted, name, old, layer.geometry, _pending(calibrated, fitted)
                    )
                tied, learned = id(old.weight) in shared, spread(rows_in, rows)
                with threads_for_rows(rows_in.numel()):
                    new = layer.fit(
                        old, learned, leader, kmeans_steps, seed + i, rows_in, wanted, tied
                    )
                if finished is not None:
                    finished.save(name, new, old, layer.noted)
            fitted[name] = new
            notes += [lost_hook(kind, name) for kind in move_hooks(new, old)]
            new_ones: dict[nn.Module, nn.Module] = {old: new}
            if name in norms:
                norm = converted.get_submodule(places[norms[name]])
                folded = fold_behind(norm, new)
                if folded is not None:
                    new_ones[norm] = folded
                    notes += [lost_hook(k, places[norms[name]]) for k in move_hooks(folded, norm)]
            if targets is None:
                replacements.update(new_ones)
            else:
                converted = replace_modules(converted, new_ones)
            bar.update(i + 1, f"{name} {time.perf_counter() - start:.1f} s")
    converted = replace_modules(converted, replacements)
    leave_fast_path(converted)
    if fitted and data.first is not None:
        pairs = {n: (calibrated[n].module, new) for n, new in fitted.items()}
        check_calls(model, converted, pairs, data.first)
    converted, swapped = functions.apply(converted)
    entry = None if gate is None else record(gate, decisions)
    if entry is not None:
        attach(converted, entry)
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    reports = sorted((*(a.report for a in layers), *kept), key=lambda entry: order[entry.name])
    report = ConversionReport(tuple(reports), seed, entry, swapped, tuple(small), tuple(notes))
    return converted, report


def _pending(layers: Mapping[str, Candidate], fitted: Collection[str]) -> list[str]:
    """The layers that will be replaced and are not yet."""
    return [name for name, e in layers.items() if e.method is not None and name not in fitted]


def spread(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly from all."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most) * len(rows) // most]


def _fitted_rows(rows: int, memory_bytes: int, layers: Iterable[Candidate]) -> int:
    """Rows of a layer that sequential calibration fits to the dense network.

    The inputs of one layer are there at a time, and the outputs of all.
    """
    shapes = [(layer.geometry.depth, layer.outputs) for layer in layers]
    depth = max(depth for depth, _ in shapes) + sum(outputs for _, outputs in shapes)
    return max(rows, min(_MORE_ROWS * rows, memory_bytes // (4 * depth)))


def _makes_layers(method: Any) -> bool:
    return isinstance(method, Method) and family_of(method) is not None


def _keep_unreached(layers: dict[str, Candidate], samples: Mapping[str, Reservoir]) -> None:
    """Takes out the layers that no batch reached, which stay as they are.

    Raises:
        LutraError: no layer is reached at all, or a layer is reached in other processes only.
    """
    seen = torch.tensor([samples[name].seen for name in layers])
    anywhere = distributed.all_reduce(seen.clone()).tolist()
    missed = [name for name, count in zip(layers, seen.tolist(), strict=True) if not count]
    elsewhere = [name for name, count in zip(layers, anywhere, strict=True) if count]
    for name in missed:
        if name in elsewhere or len(missed) == len(layers):
            raise LutraError(
                f"calibration: layer '{name}' got no input from the batches; keep it in the "
                "recipe, or give data that reach it"
            )
        layers.pop(name).keep("no batch of the calibration data reaches it")


def _gate(
    gate: SpeedGate,
    layers: Mapping[str, Candidate],
    samples: Mapping[str, Reservoir],
    show: bool | None,
) -> dict[str, Decision]:
    """Asks the speed gate about every layer, and does as it says."""
    decisions: dict[str, Decision] = {}
    with Progress("timing layers", len(layers), show) as bar:
        for i, (name, layer) in enumerate(layers.items()):
            note = "dense by the recipe"
            family = None if layer.method is None else family_of(layer.method)
            if family is not None and not family.is_rival:
                shape = samples[name].input_shape
                decisions[name] = decide(gate, name, layer.make(layer.module), shape)
                note = decisions[name].summary
            bar.update(i + 1, f"{name} {note}")
    for name, decision in decisions.items():
        layers[name].gate(decision)
    return decisions


def _leaders(layers: Mapping[str, Candidate], samples: Mapping[str, Reservoir]) -> dict[str, str]:
    """For each layer that can share codes the first one with the same: it reads the same tensors in
    the same way, and has the same settings."""
    first: dict[Any, str] = {}
    leaders: dict[str, str] = {}
    for name, layer in layers.items():
        own = None if layer.method is None else layer.form().sharing_key(layer.method)
        if own is not None:
            key = (own, layer.geometry, _read(samples[name]))
            leaders[name] = first.setdefault(key, name)
    return leaders


def _read(sample: Reservoir) -> Hashable:
    """Which tensors a layer has read."""
    return tuple(sample.sources), sample.input_shape
