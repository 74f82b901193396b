"""Function tables for a whole model: what it calls is found while data runs, then swapped.

Two kinds of places are swapped. Modules that are a function, a softmax or a norm themselves become
modules of `lutra.train.functions.modules`, whatever library they are from: an activation is known
by the values that it computes. In all others the functions that `forward` calls are swapped (see
`lutra.train.functions.calls`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.functions import KNOWN, Histogram, Piecewise, fit
from lutra.train import distributed as collective
from lutra.train.functions.calls import Call, Watching, swap_class
from lutra.train.functions.modules import (
    TableAttention,
    TableFunction,
    TableLayerNorm,
    TableNorm,
    TableRMSNorm,
    TableSoftmax,
)
from lutra.train.functions.relu_net import fit_relu_net
from lutra.train.recipe import Function, Keep, Recipe, fits, match
from lutra.train.report import FunctionReport

_COMPOSITE = ("softmax", "attention", "layer_norm", "rms_norm")
_SAMPLES = 1 << 16  # of a call, for the density; range and finiteness are of all
_PROBE = torch.linspace(-9.0, 9.0, 257)


@dataclass
class _Site:
    """A function that a module computes or calls.

    Attributes:
        name: Path of the module.
        function: Name of the function.
        method: From the recipe.
        whole: Whether the module is the function, and not only calls it.
        inputs: What it was called with.
    """

    name: str
    function: str
    method: Function
    whole: bool
    inputs: Histogram = field(default_factory=Histogram)


class FunctionSwap:
    """Finds the functions of a model and swaps them for tables.

    Use `watching()` around runs of the model, then `apply` to a copy of it.

    Args:
        model: The model with exact functions.
        recipe: Patterns; those of layers are left out here.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._model = model
        recipe = {p: m for p, m in recipe.items() if isinstance(m, Function | Keep)}
        self._methods: dict[nn.Module, Function | None] = {}
        self._names: dict[nn.Module, str] = {}
        parents: dict[nn.Module, nn.Module] = {}
        aliases: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            aliases.setdefault(module, []).append(name)
            for child in module.children():
                parents.setdefault(child, module)
        for module, names in aliases.items():
            found = match(recipe, *names)
            if isinstance(found, Keep) and not _named(recipe, names) and module in parents:
                self._methods[module] = self._methods[parents[module]]  # as what it is in
            else:
                self._methods[module] = found if isinstance(found, Function) else None
            self._names[module] = names[0]
        self._parents = parents
        self._sites: dict[tuple[nn.Module, str], _Site] = {}
        self._called: set[nn.Module] = set()
        self._stack: list[nn.Module] = []
        self._whole: dict[nn.Module, str | None] = {}
        self._trying = False

    @property
    def wanted(self) -> bool:
        """Whether the recipe asks for any table."""
        return any(method is not None for method in self._methods.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes what the model calls while it runs."""
        if not self.wanted:
            yield
            return
        handles = []
        for module in self._names:
            handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        try:
            with Watching(self._note):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.append(module)
        if module not in self._whole:
            self._trying = True  # what it calls meanwhile does not count
            self._whole[module] = what_is(module) if self._methods[module] else None
            self._trying = False
        function = self._whole[module]
        if function is not None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor):
                self._add(module, function, x, whole=True)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()

    def _note(self, call: Call) -> None:
        if self._trying:
            return
        module = self._stack[-1] if self._stack else self._model
        self._called.add(module)
        if self._whole.get(module) is None and self._methods[module] is not None:
            self._add(module, call.function, call.x, whole=False)

    def _add(self, module: nn.Module, function: str, x: Tensor, *, whole: bool) -> None:
        method = self._methods[module]
        assert method is not None
        if function not in method.functions:
            return
        key = (module, function)
        if key not in self._sites:
            self._sites[key] = _Site(self._names[module], function, method, whole)
        if not method.calibrate or function in _COMPOSITE or not x.numel():
            return
        with torch.no_grad():
            flat = x.detach().flatten().float()
            low, high = (float(end) for end in flat.aminmax())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise LutraError(
                    f"calibration: the input of {function} in '{self._names[module]}' holds NaN "
                    "or infinity; check the model and the calibration data"
                )
            sample = flat[:: max(1, len(flat) // _SAMPLES)].cpu().numpy()
        inputs = self._sites[key].inputs
        inputs.add(sample)
        inputs.low, inputs.high = min(inputs.low, low), max(inputs.high, high)

    def apply(self, converted: nn.Module) -> tuple[nn.Module, tuple[FunctionReport, ...]]:
        """Swaps the functions of a copy of the model whose modules have the same paths.

        Returns:
            The copy, or what takes its place, and what was done.

        Raises:
            LutraError: The recipe has tables, but the model called no function that has one.
        """
        if not self.wanted:
            return converted, ()
        if not self._sites:
            raise LutraError(
                "the recipe asks for function tables, but the model calls no function that has "
                f"one; they are {', '.join([*KNOWN, *_COMPOSITE])}"
            )
        reports: list[FunctionReport] = []
        replaced: dict[nn.Module, nn.Module] = {}
        for (_, function), site in self._sites.items():
            old = converted.get_submodule(site.name)
            new, report = self._table(old, site)
            reports.append(report)
            if site.whole:
                replaced[old] = new.to(_device(self._model)).train(old.training)
            else:
                swap_class(old, {function: new.to(_device(self._model))})
        # Modules that call functions and keep them, inside of others that have tables.
        for module in self._called:
            parent = self._parents.get(module)
            outer = self._methods[parent] if parent is not None else None
            if self._methods[module] is None and outer is not None:
                swap_class(converted.get_submodule(self._names[module]), {})
        for parent in list(converted.modules()):
            for name, child in parent._modules.items():
                if child is not None and child in replaced:
                    parent._modules[name] = replaced[child]
        return replaced.get(converted, converted), tuple(reports)

    def _table(self, old: nn.Module, site: _Site) -> tuple[nn.Module, FunctionReport]:
        entries, function = site.method.entries, site.function
        report = FunctionReport(site.name, function, entries, site.method.method)
        if function == "softmax":
            dim = getattr(old, "dim", -1) if site.whole else -1
            return TableSoftmax(dim, entries), report
        if function == "attention":
            return TableAttention(entries), report
        if function == "layer_norm" and isinstance(old, nn.LayerNorm) and site.whole:
            return TableLayerNorm.from_exact(old, entries), report
        if function == "rms_norm" and site.whole:
            return TableRMSNorm.from_exact(old, _eps_of(old), entries), report
        if function in _COMPOSITE:
            return TableNorm(function == "layer_norm", entries), report
        inputs = _together(site.inputs) if site.method.calibrate else None
        table = fit_table(function, site.method, inputs)
        error = table.errors(KNOWN[function], _inside(table, function))
        if inputs is not None and not inputs.empty:
            report = FunctionReport(
                site.name, function, entries, site.method.method,
                low=inputs.low, high=inputs.high, error=error.largest,
            )  # fmt: skip
        else:
            report = FunctionReport(
                site.name, function, entries, site.method.method, error=error.largest
            )
        return TableFunction(table), report


def fit_table(function: str, method: Function, inputs: Histogram | None) -> Piecewise:
    """The table of a function by the method of a recipe.

    Args:
        function: A name of `lutra.functions.KNOWN`.
        method: How.
        inputs: Inputs that were seen, or None.
    """
    if method.method == "relu_net":
        return fit_relu_net(function, entries=method.entries, histogram=inputs)
    return fit(function, entries=method.entries, method=method.method, histogram=inputs)


def _inside(table: Piecewise, function: str) -> Any:
    """Where errors of a table are looked for: over all floats where it has asymptotes."""
    x = table.probes()
    exact = KNOWN[function]
    if exact.left is None:
        x = x[x >= table.breakpoint[0]]
    if exact.right is None:
        x = x[x <= table.breakpoint[-1]]
    return x


def _named(recipe: Recipe, names: list[str]) -> bool:
    """Whether a pattern names a module, and it is not kept for lack of one."""
    return any(fits(pattern, *names) for pattern in recipe)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _together(inputs: Histogram) -> Histogram:
    """The histogram of all processes."""
    counts = collective.all_reduce(torch.from_numpy(inputs.counts))
    reach = collective.all_reduce(torch.tensor([-inputs.low, inputs.high]).double(), "max")
    whole = Histogram()
    whole.counts = counts.numpy()
    whole.low, whole.high = -float(reach[0]), float(reach[1])
    return whole


# ---- modules that are functions -----------------------------------------------------------------


def what_is(module: nn.Module) -> str | None:
    """The function that a module is, or None: by its class, or by what it computes.

    A module without parameters, buffers and submodules is tried on numbers and compared with the
    functions that are known; a norm of another library is compared with that of torch.
    """
    if type(module) is nn.Softmax:
        return "softmax" if module.dim is not None else None
    if type(module) is nn.LayerNorm:
        return "layer_norm" if len(module.normalized_shape) == 1 else None
    if type(module).__name__.endswith("RMSNorm"):
        return "rms_norm" if _is_rms_norm(module) else None
    plain = not any(True for _ in module.children()) and not module.state_dict()
    if not plain or next(module.parameters(), None) is not None:
        return None
    return _activation(module)


def _activation(module: nn.Module) -> str | None:
    forward = type(module).forward
    if forward is nn.Module.forward or isinstance(module, nn.Dropout | nn.Identity | nn.ReLU):
        return None
    try:
        with torch.no_grad():
            y = forward(module, _PROBE.clone())
    except Exception:  # it takes something else than one tensor of any shape
        return None
    if not isinstance(y, Tensor) or y.shape != _PROBE.shape or not y.is_floating_point():
        return None
    made = y.double().cpu().numpy()
    for name in _ACTIVATIONS:
        if np.abs(made - KNOWN[name](_PROBE.numpy())).max() < 1e-5:
            return name
    return None


_ACTIVATIONS = tuple(name for name, fn in KNOWN.items() if fn.left is not None and fn.right)


def _eps_of(norm: nn.Module) -> float:
    for name in ("eps", "variance_epsilon"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    return float(torch.finfo(torch.float32).eps)


def _is_rms_norm(norm: nn.Module) -> bool:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or len(list(norm.parameters())) != 1:
        return False
    with torch.no_grad():
        x = torch.linspace(-2.0, 3.0, 2 * len(weight), device=weight.device).view(2, -1)
        x = x.to(weight.dtype)
        try:
            y = type(norm).forward(norm, x)
        except Exception:
            return False
        want = F.rms_norm(x, weight.shape, weight, _eps_of(norm))
        return isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, want, atol=1e-5)
