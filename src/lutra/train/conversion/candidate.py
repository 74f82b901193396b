"""The layers of a model that could be replaced, the method that the recipe gives each, and the
layers that they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.conversion.fallback import only, settle
from lutra.train.conversion.kept import kept_modules, replaceable, weight_bytes
from lutra.train.conversion.prepare import PARENTS, projection_paths, wrapped_paths
from lutra.train.conversion.resume import restore
from lutra.train.conversion.speed_gate import rival
from lutra.train.geometry import Geometry
from lutra.train.layers.base import QuantizedLayer, family_of
from lutra.train.layers.forms import form_of
from lutra.train.layers.goal import Goal
from lutra.train.layers.grid_refit import fit_grid
from lutra.train.recipe import Function, Keep, Method, Recipe, fits, match
from lutra.train.report import FLOAT32, LOOKUP, Decision, LayerReport

_REPLACED = "the recipe names it"


@dataclass
class Candidate:
    """A layer of a model that could be replaced, and what became of it so far.

    Attributes:
        module: the dense layer, in the model that was given.
        name: its path, the first of several.
        method: what it becomes; None where it is kept.
        report: its entry in the report.
        noted: the fields of the report that the new layer gave.
        factors: by which the features of its input are divided.
    """

    module: nn.Module
    name: str
    method: Method | None
    report: LayerReport
    noted: Mapping[str, Any] = field(default_factory=dict)
    factors: Tensor | None = None

    def form(self) -> Any:
        """The class of the new layer."""
        assert self.method is not None
        family = family_of(self.method)
        assert family is not None  # `choose` asked for it
        form = form_of(self.module)
        assert form is not None
        return family.layers[form.dense]

    @property
    def is_calibrated(self) -> bool:
        """Whether the new layer learns from samples of its input."""
        return self.method is not None and issubclass(self.form(), QuantizedLayer)

    @property
    def geometry(self) -> Geometry:
        """The geometry of the dense layer.

        Raises:
            LutraError: the new layer cannot have it.
        """
        try:
            geometry: Geometry = self.form().geometry_of(self.module)
        except LutraError as error:
            raise LutraError(f"layer '{self.name}': {error}") from None
        return geometry

    @property
    def outputs(self) -> int:
        """Outputs of the dense layer."""
        form = form_of(self.module)
        assert form is not None
        return len(form.kernel(cast(Tensor, self.module.weight)))

    def make(self, old: nn.Module) -> QuantizedLayer:
        """The new layer of a dense one; they share their parameters, which may be tied."""
        try:
            new: QuantizedLayer = self.form().from_float(old, self.method)
        except LutraError as error:
            raise LutraError(f"layer '{self.name}': {error}") from None
        for parameter in ("weight", "bias"):
            setattr(new, parameter, getattr(old, parameter))
        if self.factors is not None:
            cast(Any, new).smooth(self.factors)
        new.train(old.training)
        return new

    def fit(
        self,
        old: nn.Module,
        rows: Tensor,
        leader: QuantizedLayer | None,
        steps: int,
        seed: int,
        fitted: Tensor,
        goal: Goal | None = None,
        keep_weight: bool = False,
    ) -> QuantizedLayer:
        """The new layer, calibrated; notes it in the report.

        Args:
            old: the dense layer.
            rows: samples of its input (n, D), for the grid and the codebooks.
            leader: a layer whose codes it shares.
            steps, seed: of the search for centroids.
            fitted: samples (m, D), for the fit to the goal.
            goal: what its outputs should be; None leaves it at its own weights.
            keep_weight: whether another module has the same weights.
        """
        new = self.make(old)
        rows = rows.to(new.weight.device)
        fit_grid(new, rows)
        if leader is None:
            new.learn(rows, steps=steps, seed=seed)
        else:
            new.share(leader)
        if goal is None:
            self._note(new.settle(rows))
            return new
        goal, fitted = goal.to(rows.device), fitted.to(rows.device)
        start = goal.error(new.of_rows(fitted))
        new.refit(fitted, goal, keep_weight=keep_weight)
        error = goal.error(new.of_rows(fitted))
        new.forget_frozen()
        self._note({**new.settle(rows), "error": error, "start_error": start})
        return new

    def again(
        self,
        old: nn.Module,
        leader: QuantizedLayer | None,
        state: Mapping[str, Tensor],
        noted: Mapping[str, Any],
    ) -> QuantizedLayer:
        """The new layer as an earlier run fitted it; notes it in the report."""
        new = self.make(old)
        if leader is not None:
            new.share(leader)
        restore(new, state)
        self._note(noted)
        return new

    def embed(self) -> nn.Module:
        """The new layer of one that needs no calibration; notes it in the report."""
        new = self.form().from_float(self.module, self.method)
        self._note(new.settle())
        made: nn.Module = new
        return made

    def keep(self, reason: str) -> None:
        """Leaves the layer as it is."""
        self.method = None
        self.report = replace(self.report, reason=reason)

    def gate(self, decision: Decision) -> None:
        """Does as the speed gate decided."""
        self.report = replace(self.report, reason=decision.reason, gate=decision)
        if decision.choice == FLOAT32:
            self.method = None
        elif decision.choice != LOOKUP:
            self.method = rival(decision.choice)

    def _note(self, fields: Mapping[str, Any]) -> None:
        self.noted = fields
        assert self.method is not None
        self.report = replace(self.report, replaced=True, method=self.method.name, **fields)


def choose(
    model: nn.Module, recipe: Recipe, folded: Mapping[str, str] | None = None
) -> list[Candidate]:
    """The layers that could be replaced, in the order of the model, and their methods.

    Args:
        model: from `prepare`.
        recipe: patterns of paths.
        folded: what computed the weights of layers that have plain ones now, by path.

    Raises:
        LutraError: a pattern matches nothing, or a layer cannot be replaced.
    """
    names = replaceable(model)
    for aliases in names.values():  # patterns that name a module name the layers in it
        for path in list(aliases):
            parent, _, part = path.rpartition(".")
            if part and isinstance(model.get_submodule(parent), PARENTS):
                aliases += [p for p in projection_paths([parent], part) if p not in aliases]
            aliases += [p for p in wrapped_paths(model, path) if p not in aliases]
    _check_recipe(recipe, names, model)
    layer_recipe = {p: m for p, m in recipe.items() if not isinstance(m, Function)}
    found = []
    for module, aliases in names.items():
        form = form_of(module)
        assert form is not None
        method, fallback = settle(match(layer_recipe, *aliases), module, form.dense)
        family = family_of(method)
        reason = method.reason if isinstance(method, Keep) else _REPLACED
        if folded and aliases[0] in folded:
            reason += f"; its weight is what {folded[aliases[0]]} computed"
        if family is not None and form.dense not in family.layers:
            reason, family = only(form.dense), None
        report = LayerReport(
            aliases[0], form.name, False, fallback or reason, weight_bytes=weight_bytes(module),
            fallback=fallback,
        )  # fmt: skip
        layer = Candidate(module, aliases[0], None if family is None else method, report)
        if layer.is_calibrated:
            _ = layer.geometry  # which says what is wrong with it
        found.append(layer)
    return found


def _check_recipe(recipe: Recipe, names: Mapping[nn.Module, list[str]], model: nn.Module) -> None:
    paths = [name for aliases in names.values() for name in aliases]
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern, method in recipe.items():
        if not isinstance(method, Method):
            raise LutraError(
                f"recipe: pattern {pattern!r} has {method!r}; give it PQ(...), "
                "Lookup(...), Int8(), LowBit(...), Function(...) or Keep()"
            )
        if isinstance(method, Function | Keep) and fits(pattern, *modules):
            continue
        if isinstance(method, Function):
            raise LutraError(
                f"recipe: pattern {pattern!r} matches no module of {type(model).__name__}; the "
                "model itself has the path '', and what it holds that of its attributes"
            )
        if not fits(pattern, *paths):
            for entry in (entry for entries in kept_modules(model, recipe) for entry in entries):
                if fits(pattern, entry.name):
                    raise LutraError(
                        f"recipe: pattern {pattern!r} names '{entry.name}' ({entry.kind}), which "
                        f"cannot be replaced: {entry.reason}"
                    )
            known = ", ".join(f"'{path}'" for path in paths[:8]) or "none"
            raise LutraError(
                f"recipe: pattern {pattern!r} matches no convolution, linear layer or embedding of "
                f"{type(model).__name__}; its layers are: {known}{', ...' * (len(paths) > 8)}"
            )
