"""From a trained model to one whose layers are lookups or integer arithmetic."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train import distributed as collective
from lutra.train.conversion.calibrate import Reservoir, collect
from lutra.train.conversion.speed_gate import Decision, SpeedGate, attach, decide, record
from lutra.train.functions.swap import FunctionSwap
from lutra.train.geometry import Geometry
from lutra.train.layers import int8, lookup
from lutra.train.layers import pq_tree as trees
from lutra.train.layers.base import QuantizedLayer
from lutra.train.layers.int8 import Int8Conv2d, Int8Layer, Int8Linear
from lutra.train.layers.int8_embedding import Int8Embedding
from lutra.train.layers.lookup import LookupConv2d, LookupLayer, LookupLinear
from lutra.train.layers.pq import PQConv2d, PQLinear, _PQLayer, quantize_tables
from lutra.train.layers.pq_kmeans import kmeans
from lutra.train.operators import portable
from lutra.train.progress import Progress
from lutra.train.recipe import PQ, Function, Int8, Keep, Lookup, Method, Recipe, fits, match
from lutra.train.report import ConversionReport, LayerReport

_REPLACED = "the recipe names it"
_Dense = nn.Conv2d | nn.Linear | nn.Embedding


def convert(
    model: nn.Module,
    recipe: Recipe,
    calibration_data: Iterable[Any],
    *,
    rows: int = 8192,
    memory_bytes: int = 1 << 30,
    kmeans_steps: int = 25,
    seed: int = 0,
    progress: bool | None = None,
    speed_gate: bool | SpeedGate = False,
    share_encoders: bool = True,
) -> tuple[nn.Module, ConversionReport]:
    """Replaces layers by lookups, or by int8 arithmetic, and calibrates them.

    Args:
        model: any module; it is not modified, and it need not be traceable.
        recipe: glob patterns of module paths -> `PQ(...)`, `Lookup(...)`, `Int8()` or `Keep()`; the
            first match wins, and what no pattern names is kept. An embedding becomes int8 where
            `Int8()` names it and stays as it is elsewhere. Every pattern must name some layer.
            A layer that the model holds in several places is replaced in all of them.
        calibration_data: batches, run once in eval mode: tensors, tuples whose first entry is the
            input, or dicts of keyword arguments. A thousand samples are plenty. With
            torch.distributed, give every process a part of its own.
        rows: sample rows per layer for k-means.
        memory_bytes: limit for all samples together.
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

    Returns:
        The converted copy, ready for fine-tuning, and a report with one entry per convolution,
        linear layer and embedding.

    Raises:
        LutraError: a pattern matches nothing, a layer cannot be replaced, or the data is unusable.
    """
    names = _candidates(model)
    _check_recipe(recipe, names, model)
    layer_recipe = {p: m for p, m in recipe.items() if not isinstance(m, Function)}
    functions = FunctionSwap(model, recipe)
    chosen: dict[nn.Module, PQ | Int8 | Lookup] = {}
    geometries: dict[str, Geometry] = {}
    reports: dict[nn.Module, LayerReport] = {}
    embeddings: dict[_Dense, nn.Module] = {}
    for layer, aliases in names.items():
        method = match(layer_recipe, *aliases)
        if isinstance(layer, nn.Embedding):
            if isinstance(method, Int8):
                embeddings[layer] = Int8Embedding.from_float(layer)
            reports[layer] = _describe_embedding(layer, aliases[0], method, embeddings.get(layer))
            continue
        if not isinstance(method, Keep | Function):
            try:
                geometries[aliases[0]] = Geometry.of(layer, grouped=isinstance(method, Int8))
            except LutraError as error:
                raise LutraError(f"layer '{aliases[0]}': {error}") from None
            chosen[layer] = method
        reason = method.reason if isinstance(method, Keep) else _REPLACED
        kind = "conv2d" if isinstance(layer, nn.Conv2d) else "linear"
        weight_bytes = 4 * layer.weight.numel()
        reports[layer] = LayerReport(aliases[0], kind, False, reason, weight_bytes=weight_bytes)
    if not chosen and not embeddings and not functions.wanted:
        raise LutraError(
            "the recipe replaces no layer; give a pattern PQ(...), Lookup(...), Int8() or "
            "Function(...)"
        )
    layers = {names[layer][0]: layer for layer in names if layer in chosen}
    show = progress if collective.rank() == 0 else False
    samples: dict[str, Reservoir] = {}
    if layers or functions.wanted:
        with Progress("calibrating", None, show) as bar, functions.watching():
            samples = collect(
                model, layers, geometries, calibration_data,
                rows=rows, memory_bytes=memory_bytes, seed=seed + collective.rank(),
                progress=bar.update,
            )  # fmt: skip
    gate = SpeedGate() if speed_gate is True else speed_gate or None
    decisions: dict[str, Decision] = {}
    if gate is not None:
        with Progress("timing layers", len(layers), show) as bar:
            for i, (name, layer) in enumerate(layers.items()):
                probe, note = _from_float(layer, name, chosen[layer]), "dense by the recipe"
                if isinstance(probe, _PQLayer | LookupLayer):
                    decision = decide(gate, name, probe, samples[name].input_shape)
                    decisions[name], note = decision, decision.summary
                    reports[layer] = replace(reports[layer], reason=decision.reason, gate=decision)
                bar.update(i + 1, f"{name} {note}")
    leaders = _siblings(chosen, geometries, samples, names, decisions) if share_encoders else {}
    converted = copy.deepcopy(model)
    replacements: dict[nn.Module, nn.Module] = {
        converted.get_submodule(names[layer][0]): new for layer, new in embeddings.items()
    }
    learned: dict[str, _PQLayer] = {}
    with Progress("learning codebooks", len(layers), show) as bar:
        for i, (name, layer) in enumerate(layers.items()):
            method, gated = chosen[layer], decisions.get(name)
            if gated is not None and gated.choice == "float32":
                del samples[name]
                continue
            if gated is not None and gated.choice == "int8":
                method = Int8()
            start = time.perf_counter()
            old = converted.get_submodule(name)
            new = _from_float(old, name, method)
            sample = samples.pop(name).rows.to(new.weight.device)
            _fit_grid(new, sample)
            if isinstance(new, Int8Layer):
                reports[layer] = _describe_int8(reports[layer], new, sample)
            elif isinstance(new, LookupLayer):
                reports[layer] = _describe_lookup(reports[layer], new, sample)
            elif name in leaders and leaders[name] in learned:
                new.share(learned[leaders[name]])
                reports[layer] = _describe(reports[layer], new, *_settle(new, sample))
            else:
                learned[name] = new
                loss, used = _learn(new, sample, kmeans_steps, seed + i)
                reports[layer] = _describe(reports[layer], new, loss, used)
            replacements[old] = new
            bar.update(i + 1, f"{name} {time.perf_counter() - start:.1f} s")
    converted, swapped = functions.apply(_replace(converted, replacements))
    entry = None if gate is None else record(gate, decisions)
    if entry is not None:
        attach(converted, entry)
    return converted, ConversionReport(tuple(reports.values()), seed, entry, swapped)


def _siblings(
    chosen: Mapping[nn.Module, PQ | Int8 | Lookup],
    geometries: Mapping[str, Geometry],
    samples: Mapping[str, Reservoir],
    names: Mapping[Any, list[str]],
    decisions: Mapping[str, Decision],
) -> dict[str, str]:
    """For each layer the first one with the same codebooks: it reads the same tensors in the same
    way, and has the same settings. Trees suit the weights of their layer, so they stay alone."""
    first: dict[Any, str] = {}
    leaders: dict[str, str] = {}
    for layer, method in chosen.items():
        name = names[layer][0]
        gated = decisions.get(name)
        if not isinstance(method, PQ) or method.encoder != "nearest":
            continue
        if gated is not None and gated.choice in ("float32", "int8"):
            continue
        key = (method, geometries[name], tuple(samples[name].sources), samples[name].input_shape)
        leaders[name] = first.setdefault(key, name)
    return leaders


def _candidates(model: nn.Module) -> dict[_Dense, list[str]]:
    """The layers that could be replaced, and the paths under which the model holds each."""
    names: dict[_Dense, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # Subclasses may compute something else.
        if isinstance(module, _Dense) and type(module) in get_args(_Dense):
            names.setdefault(module, []).append(name)
    return names


def _check_recipe(recipe: Recipe, names: Mapping[_Dense, list[str]], model: nn.Module) -> None:
    paths = [name for aliases in names.values() for name in aliases]
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern, method in recipe.items():
        if not isinstance(method, PQ | Int8 | Lookup | Function | Keep):
            raise LutraError(
                f"recipe: pattern {pattern!r} has {method!r}; give it PQ(...), "
                "Lookup(...), Int8(), Function(...) or Keep()"
            )
        if isinstance(method, Function | Keep) and fits(pattern, *modules):
            continue
        if isinstance(method, Function):
            raise LutraError(
                f"recipe: pattern {pattern!r} matches no module of {type(model).__name__}; the "
                "model itself has the path '', and what it holds that of its attributes"
            )
        if not fits(pattern, *paths):
            known = ", ".join(f"'{path}'" for path in paths[:8]) or "none"
            raise LutraError(
                f"recipe: pattern {pattern!r} matches no convolution, linear layer or embedding of "
                f"{type(model).__name__}; its layers are: {known}{', ...' * (len(paths) > 8)}"
            )


_LAYERS: dict[type, tuple[Any, Any]] = {
    PQ: (PQConv2d, PQLinear),
    Lookup: (LookupConv2d, LookupLinear),
    Int8: (Int8Conv2d, Int8Linear),
}


def _from_float(
    layer: nn.Module, name: str, method: PQ | Int8 | Lookup
) -> _PQLayer | Int8Layer | LookupLayer:
    """The new layer of a dense one; they share their parameters, which may be tied."""
    new: _PQLayer | Int8Layer | LookupLayer
    try:
        new = _LAYERS[type(method)][isinstance(layer, nn.Linear)].from_float(layer, method)
    except LutraError as error:
        raise LutraError(f"layer '{name}': {error}") from None
    for parameter in ("weight", "bias"):
        setattr(new, parameter, getattr(layer, parameter))
    new.train(layer.training)
    return new


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts the new modules in all places where the model holds the old ones."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _activation_range(rows: Tensor, bits: int) -> tuple[float, float]:
    """The clipping range with the least squared error on the grid, over a few candidates."""
    flat = rows.flatten()
    if len(flat) > 1 << 20:
        flat = flat[:: len(flat) // (1 << 20) + 1]
    low, high = float(rows.min()), float(rows.max())
    reach = max(high, -low)
    if reach == 0.0:
        return 0.0, 1.0
    levels = max(1, 2 ** (bits - 1) - 1 if low < 0 else 2**bits - 1)
    best, best_error = reach, float("inf")
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        step = reach * share / levels
        q = (flat / step).round().clamp(-levels - 1 if low < 0 else 0, levels) * step
        error = float((q - flat).square().mean())
        if error < best_error:
            best, best_error = reach * share, error
    return (-best, best) if low < 0 else (0.0, best)


@torch.no_grad()
def _fit_grid(layer: QuantizedLayer, rows: Tensor) -> None:
    """Sets the activation grid of a layer from samples of its input."""
    low, high = _activation_range(rows, layer.method.act_bits)
    # A process whose samples are all positive must take the others' signed grid.
    reach = collective.all_reduce(torch.tensor([-low, high]), "max")
    layer.set_activation_range(-float(reach[0]), float(reach.max()))


@torch.no_grad()
def _learn(layer: _PQLayer, rows: Tensor, steps: int, seed: int) -> tuple[float, float]:
    """Sets the codebooks; returns relative output error and the share of used centroids."""
    grid = layer.grid()
    low, high = -grid.zero * grid.scale, (grid.qmax - grid.zero) * grid.scale
    missing = layer.books * layer.dim - rows.shape[1]
    padded = F.pad(rows.clamp(low, high), (0, missing))
    sub = padded.view(-1, layer.books, layer.dim).transpose(0, 1).contiguous()  # (B, n, V)
    if layer.method.encoder == "tree":
        _grow(layer, rows, sub)
    else:
        centroids, _ = kmeans(sub, layer.method.k, steps=steps, seed=seed)
        layer.centroids.copy_(centroids)
    return _settle(layer, rows)


@torch.no_grad()
def _settle(layer: _PQLayer, rows: Tensor) -> tuple[float, float]:
    """What `_learn` returns, of a layer whose codebooks are there; fits the tables of a tree."""
    error, codes = _output_error(layer, rows)
    counts = torch.zeros((layer.books, layer.method.k), device=codes.device)
    counts.scatter_add_(1, codes.long(), torch.ones(codes.shape, device=codes.device))
    collective.all_reduce(counts)
    if layer.method.centroids == "average":
        # As if the moving average had run on batches of this many rows.
        layer.cluster_counts.copy_(counts)
    return error, float((counts > 0).float().mean())


def _codes(layer: _PQLayer, rows: Tensor) -> Tensor:
    """Codes (B, n) of samples (n, D)."""
    one = Geometry(rows.shape[1])
    return portable.encode(rows[:, :, None, None], one, layer.grid(), layer.encoder())


def _output_error(layer: _PQLayer, rows: Tensor) -> tuple[float, Tensor]:
    """Relative squared error of the output, and codes (B, n), with the grid and the int8 tables
    that the engine will have."""
    codes = _codes(layer, rows)
    tables, scale = quantize_tables(layer.tables(layer.encoder()))
    got = portable.lookup(codes, tables).float() * scale
    want = rows @ layer.weight.float().reshape(layer.outputs, -1).t()
    variance = want.var(correction=0).clamp_min(1e-12)
    return collective.mean(float((got - want).square().mean() / variance)), codes


def _grow(layer: _PQLayer, rows: Tensor, sub: Tensor) -> None:
    """Sets trees, centroids and what the tables have beyond them.

    Args:
        rows: samples (n, D). sub: their clipped sub-vectors (B, n, V).
    """
    grid, device = layer.grid(), rows.device
    entries = torch.arange(layer.books * layer.dim, device=device).view(layer.books, layer.dim)
    samples = trees.Samples(
        values=sub,
        grid=portable.quantize(sub, grid).long().transpose(1, 2).contiguous(),
        metric=trees.output_metric(layer.weight_blocks().float()),
        allowed=entries < layer.geometry.depth,
        bins=grid.qmax + 1,
    )
    taps, thresholds, centroids = trees.fit(samples, layer.method.k)
    layer.centroids.copy_(centroids)
    layer.splits.copy_(entries.gather(1, taps))
    layer.thresholds.copy_(thresholds)
    codes, tables = _codes(layer, rows), layer.tables(layer.encoder())
    want = rows @ layer.weight.float().reshape(layer.outputs, -1).t()
    layer.table_residual.copy_(trees.fit_tables(codes, tables, want) - tables)


def _describe(entry: LayerReport, layer: _PQLayer, error: float, used: float) -> LayerReport:
    return replace(
        entry,
        replaced=True,
        encoder=layer.method.encoder,
        v=layer.dim,
        k=layer.method.k,
        books=layer.books,
        table_bytes=layer.books * layer.method.k * layer.outputs,
        lookups_per_row=layer.books * layer.outputs,
        multiplies_per_row=layer.geometry.depth * layer.outputs,
        error=error,
        used=used,
        method="pq",
    )


def _describe_embedding(
    layer: nn.Embedding, name: str, method: Method, new: nn.Module | None
) -> LayerReport:
    reason = method.reason if isinstance(method, Keep) else "embeddings take Int8() only"
    size = 4 * layer.weight.numel()
    entry = LayerReport(name, "embedding", False, reason, weight_bytes=size)
    if not isinstance(new, Int8Embedding):
        return entry
    return replace(
        entry, replaced=True, reason=_REPLACED, method="int8",
        error=new.error, int8_bytes=new.weight.numel(),
    )  # fmt: skip


def _describe_int8(entry: LayerReport, layer: Int8Layer, rows: Tensor) -> LayerReport:
    return replace(
        entry,
        replaced=True,
        multiplies_per_row=layer.weight.numel(),
        error=collective.mean(int8.output_error(layer, rows)),
        method="int8",
        int8_bytes=layer.weight.numel(),
    )


def _describe_lookup(entry: LayerReport, layer: LookupLayer, rows: Tensor) -> LayerReport:
    return replace(
        entry,
        replaced=True,
        table_bytes=layer.method.levels * layer.method.weights,
        index_bytes=layer.freeze().weight.numel(),
        levels=layer.method.levels,
        weights=layer.method.weights,
        lookups_per_row=layer.weight.numel(),
        multiplies_per_row=layer.weight.numel(),
        error=collective.mean(lookup.output_error(layer, rows)),
        method="lookup",
    )
