"""From a trained model to one whose layers are lookups."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.calibrate import Reservoir, collect
from lutra.train.geometry import Geometry
from lutra.train.kmeans import kmeans
from lutra.train.layers import PQConv2d, PQLinear, _PQLayer, quantize_tables
from lutra.train.progress import Progress
from lutra.train.recipe import PQ, Recipe, match
from lutra.train.report import ConversionReport, LayerReport


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
) -> tuple[nn.Module, ConversionReport]:
    """Replaces layers by lookups and learns their codebooks from calibration data.

    Args:
        model: any module; it is not modified, and it need not be traceable.
        recipe: glob patterns of module paths -> `PQ(...)` or `Keep()`; the first match wins, and
            what no pattern names is kept.
        calibration_data: batches, run once in eval mode: tensors, tuples whose first entry is the
            input, or dicts of keyword arguments. A thousand samples are plenty.
        rows: sample rows per layer for k-means.
        memory_bytes: limit for all samples together.
        kmeans_steps: Lloyd steps.
        seed: of sampling and k-means.
        progress: show a progress bar; None shows it on terminals only.

    Returns:
        The converted copy, ready for fine-tuning, and a report with one entry per convolution and
        linear layer.

    Raises:
        LutraError: a pattern matches nothing, a layer cannot be replaced, or the data is unusable.
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and type(module) in (nn.Conv2d, nn.Linear)
    }
    _check_patterns(recipe, candidates, model)
    chosen: dict[str, PQ] = {}
    reports: dict[str, LayerReport] = {}
    for name, layer in candidates.items():
        method = match(recipe, name)
        kind = "conv2d" if isinstance(layer, nn.Conv2d) else "linear"
        if isinstance(method, PQ):
            try:
                Geometry.of(layer)
            except LutraError as error:
                raise LutraError(f"layer '{name}': {error}") from None
            chosen[name] = method
        reason = method.reason if not isinstance(method, PQ) else ""
        reports[name] = LayerReport(
            name, kind, False, reason, weight_bytes=4 * layer.weight.numel()
        )
    if not chosen:
        raise LutraError("the recipe replaces no layer; give at least one pattern a PQ(...)")
    layers = {name: candidates[name] for name in chosen}
    geometries = {name: Geometry.of(candidates[name]) for name in chosen}
    with Progress("calibrating", None, progress) as bar:
        samples = collect(
            model, layers, geometries, calibration_data,
            rows=rows, memory_bytes=memory_bytes, seed=seed + _rank(), progress=bar.update,
        )  # fmt: skip
    converted = copy.deepcopy(model)
    with Progress("learning codebooks", len(chosen), progress) as bar:
        for i, (name, method) in enumerate(chosen.items()):
            start = time.perf_counter()
            layer = converted.get_submodule(name)
            new: _PQLayer
            if isinstance(layer, nn.Conv2d):
                new = PQConv2d.from_float(layer, method)
            else:
                assert isinstance(layer, nn.Linear)
                new = PQLinear.from_float(layer, method)
            used = _learn(new, samples.pop(name), kmeans_steps, seed + i)
            new.train(layer.training)
            _replace(converted, name, new)
            reports[name] = _describe(reports[name], new, *used)
            bar.update(i + 1, f"{name} {time.perf_counter() - start:.1f} s")
    return converted, ConversionReport(tuple(reports.values()), seed)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _check_patterns(recipe: Recipe, candidates: dict[str, Any], model: nn.Module) -> None:
    from fnmatch import fnmatchcase

    for pattern, method in recipe.items():
        if not isinstance(method, PQ):
            continue
        if not any(fnmatchcase(name, pattern) for name in candidates):
            known = ", ".join(list(candidates)[:8]) or "none"
            raise LutraError(
                f"recipe: pattern {pattern!r} matches no convolution or linear layer of "
                f"{type(model).__name__}; its layers are: {known}{', ...' * (len(candidates) > 8)}"
            )


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, new)


def _activation_range(rows: Tensor) -> tuple[float, float]:
    """The clipping range with the least squared error on a 7-bit grid, over a few candidates."""
    flat = rows.flatten()
    if len(flat) > 1 << 20:
        flat = flat[:: len(flat) // (1 << 20) + 1]
    low, high = float(rows.min()), float(rows.max())
    reach = max(high, -low)
    if reach == 0.0:
        return 0.0, 1.0
    levels = 63 if low < 0 else 127
    best, best_error = reach, float("inf")
    for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        step = reach * share / levels
        q = (flat / step).round().clamp(-levels - 1 if low < 0 else 0, levels) * step
        error = float((q - flat).square().mean())
        if error < best_error:
            best, best_error = reach * share, error
    return (-best, best) if low < 0 else (0.0, best)


@torch.no_grad()
def _learn(
    layer: _PQLayer, samples: Reservoir, steps: int, seed: int
) -> tuple[float, float]:
    """Sets grid and codebooks; returns relative output error and the share of used centroids."""
    rows = samples.rows
    bounds = torch.tensor(_activation_range(rows))
    if _distributed():
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        low = torch.tensor(1.0 if float(rows.min()) < 0 else 0.0)
        dist.all_reduce(low, dist.ReduceOp.MAX)
        bounds[0] = -float(bounds[1]) * float(low)
    layer.set_activation_range(float(bounds[0]), float(bounds[1]))
    grid = layer.grid()
    low, high = -grid.zero * grid.scale, (grid.qmax - grid.zero) * grid.scale
    missing = layer.books * layer.dim - rows.shape[1]
    padded = torch.nn.functional.pad(rows.clamp(low, high), (0, missing))
    sub = padded.view(-1, layer.books, layer.dim).transpose(0, 1).contiguous()  # (B, n, V)
    centroids, _ = kmeans(sub, layer.method.k, steps=steps, seed=seed)
    layer.centroids.data.copy_(centroids)
    # Error and use, with the grid and the int8 tables that the engine will have.
    grid_centroids = layer.grid_centroids()
    from lutra.train.portable import encode, lookup

    flat = Geometry(rows.shape[1])
    codes = encode(
        rows[:, :, None, None].to(layer.weight.device), flat, grid, grid_centroids
    )
    tables, scale = quantize_tables(layer.tables(grid_centroids))
    got = (lookup(codes, tables).float() * scale).cpu()
    want = rows @ layer.weight.reshape(layer.outputs, -1).t().cpu()
    error = float((got - want).square().mean() / want.var().clamp_min(1e-12))
    counts = torch.zeros((layer.books, layer.method.k), device=codes.device)
    counts.scatter_add_(1, codes.long(), torch.ones(codes.shape, device=codes.device))
    if layer.method.centroids == "average":
        # As if the moving average had run on batches of this many rows.
        layer.cluster_counts.copy_(counts)
    return error, float((counts > 0).float().mean())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _describe(entry: LayerReport, layer: _PQLayer, error: float, used: float) -> LayerReport:
    from dataclasses import replace

    return replace(
        entry,
        replaced=True,
        reason="the recipe names it",
        v=layer.dim,
        k=layer.method.k,
        books=layer.books,
        table_bytes=layer.books * layer.method.k * layer.outputs,
        lookups_per_row=layer.books * layer.outputs,
        multiplies_per_row=layer.geometry.depth * layer.outputs,
        error=error,
        used=used,
    )
