"""Trials, one after the other: the dense model and int8 first, then uniform lookups, then recipes
that a mixed-integer program proposes and that measured ones correct."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import nn

from lutra.errors import LutraError
from lutra.runtime.session import Session
from lutra.train.conversion.convert import convert
from lutra.train.report import ConversionReport
from lutra.train.search.bench import Bench, EngineModel, outputs_of
from lutra.train.search.budget import Budget
from lutra.train.search.candidates import FLOAT32, INT8, SearchLayer, recipe_of
from lutra.train.search.effort import EFFORTS, Effort, Efforts, plan, whole
from lutra.train.search.predict import Belief, SumModel, Term
from lutra.train.search.proposals import cheapest, propose, spread
from lutra.train.search.quality import (
    Measure,
    Outputs,
    Own,
    choose_measure,
    own_value,
    surrogate,
)
from lutra.train.search.samples import Part, Split
from lutra.train.search.storage import Storage
from lutra.train.search.trial import DENSE, INT8_EVERYWHERE, ROUGH, Trial, best, front, good

_SECONDS: Final = 1.0  # of timing a trial
#: A conversion that is not rough keeps this share of the drop.
_WHOLE_DROP: Final = 0.85
#: The most that is left for such conversions, as a share of the budget.
_WHOLE_SHARE: Final = 0.25
#: The share of the minutes in which the samples that judge must run once.
_JUDGED_SHARE: Final = 0.03
_LEAST_JUDGED: Final = 16
#: The last measurement takes a few seconds, and runs the samples that judge.
_LAST: Final = 4.0
#: Layers of a network whose ends are left dense at first.
_DEEP: Final = 5
#: How far a measured time, loss and size may be off, as shares.
_TIME_NOISE: Final = 0.03
_LOSS_NOISE: Final = 0.1
_SIZE_NOISE: Final = 0.002
#: Notes of the storage: samples that judge, and what a conversion looks at.
_JUDGED: Final = "samples that judge"
_EFFORTS: Final = "efforts"
_BEST: Final = "best"
_OUT: Final = 1.0  # loss of outputs that have nothing to do with those of the dense model

_Made = tuple[nn.Module, ConversionReport | None]


class Search:
    """The trials of a study.

    Args:
        model: the dense model.
        data: its samples.
        layers: what is decided about.
        bench: exports, runs and times.
        budget: when to stop, and what should be small.
        storage: where trials are kept.
        evaluate: the quality of a model; None chooses a measure.
        tell: called with what is going on.
        begin: when the minutes of the budget began, by `time.perf_counter`.
        behind: seconds of them that are for what comes behind the search.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Split,
        layers: list[SearchLayer],
        bench: Bench,
        budget: Budget,
        storage: Storage,
        evaluate: Callable[[Any], float] | None,
        tell: Callable[[str], None],
        begin: float,
        behind: float = 0.0,
    ) -> None:
        self.model, self.data, self.layers, self.bench = model, data, layers, bench
        self.budget, self.storage, self._evaluate, self._tell = budget, storage, evaluate, tell
        self._begin, self._behind = begin, behind
        self.dense = bench.export(model, bench.file("dense"))
        self.judges = data.judged.count
        judged = self._judged(data.judged)
        self.data = data = replace(data, judged=judged)
        start = time.perf_counter()
        self.outputs: Outputs = outputs_of(self.dense, judged)
        self._behind += _LAST + 2.0 * (time.perf_counter() - start)
        _check_outputs(self.outputs)
        self.measure: Measure = (
            choose_measure(self.outputs, data.judged.labels)
            if evaluate is None
            else Own(self.outputs, own_value(evaluate, EngineModel(self.dense)))
        )
        self.tried = 0
        self.stopped = False
        self.efforts = whole()  # until the first conversion was timed
        self._made: dict[str, tuple[dict[str, str], _Made]] = {}

    # ---- trials ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Tries recipes until the budget is used up, none is left, or Ctrl-C is pressed."""
        self._base()
        try:
            self._search()
            self._refine()
        except KeyboardInterrupt:  # there is an answer already; a second one ends all
            self.stopped = True

    def _search(self) -> None:
        """All trials behind the base."""
        for label, choice in self._uniform():
            if not self._may_go_on():
                return
            if not self._known(choice):
                self._claimed(label, choice)
        number = 0
        while self._may_go_on():
            made = self.proposal(number)
            if made is None:
                return
            self._claimed(*made)
            number += 1

    def _may_go_on(self) -> bool:
        """Whether another trial fits into the budget."""
        if self.budget.trials is not None and self.tried >= self.budget.trials:
            return False
        trials = self.storage.trials()
        own = [t for t in trials if t.rough == self.rough and t.label != DENSE]
        int8 = next(t.seconds for t in trials if t.label == INT8_EVERYWHERE)
        longest = max((trial.seconds for trial in own), default=int8 * _share(self.efforts))
        # The chosen recipe is converted once more.
        again = min(int8, _WHOLE_SHARE * 60.0 * self.budget.minutes) if self.rough else 0.0
        return self._left() > longest + again

    def _left(self) -> float:
        """Seconds of the budget, without those for what comes behind the search."""
        total = 60.0 * self.budget.minutes
        return total - self._behind - (time.perf_counter() - self._begin)

    @property
    def rough(self) -> bool:
        """Whether fewer samples calibrate trials than the choice."""
        return self.efforts.rough

    def _judged(self, part: Part) -> Part:
        """The samples that judge: as many of them as the dense model runs in reasonable time."""
        most = self.storage.notes(_JUDGED)
        if most is None:
            some = part.thinned(_LEAST_JUDGED)
            start = time.perf_counter()
            outputs_of(self.dense, some)
            each = (time.perf_counter() - start) / some.count
            most = part.count
            if self.budget.minutes:
                fits = int(_JUDGED_SHARE * 60.0 * self.budget.minutes / max(each, 1e-9))
                most = min(most, max(_LEAST_JUDGED, fits))
            self.storage.note(_JUDGED, most)
        return part.thinned(most)

    def _plan(self) -> None:
        """Times a conversion with few samples, and decides how many there are to be."""
        known = self.storage.notes(_EFFORTS)
        if known is not None:
            self.efforts = Efforts.from_dict(known)
            return
        count = self.data.calibration.count
        if self.budget.minutes and count > EFFORTS[0].samples:
            self._tell("timing a conversion")
            choice = {layer.name: INT8 for layer in self.layers}
            start = time.perf_counter()
            try:
                made = self._converted(choice, EFFORTS[0])
            except LutraError:  # the trial says so
                return
            taken = time.perf_counter() - start
            self.efforts = plan(taken, count, max(0.0, self._left()))
            if self.efforts.fine == EFFORTS[0]:
                self._made[INT8_EVERYWHERE] = choice, made
        self.storage.note(_EFFORTS, self.efforts.to_dict())

    def _known(self, choice: Mapping[str, str]) -> bool:
        """Whether a recipe was measured, or is in flight elsewhere."""
        same = [trial.choice == choice for trial in self.storage.trials()]
        return any(same) or dict(choice) in self.storage.running()

    def _base(self) -> None:
        """The dense model, and int8 wherever it can be: what all others are compared with."""
        self.dense_ms = 0.0
        for label, key in ((DENSE, FLOAT32), (INT8_EVERYWHERE, INT8)):
            choice = dict.fromkeys((layer.name for layer in self.layers), key)
            found = [t for t in self.storage.trials() if t.label == label]
            trial = found[0] if found else self._try(label, choice, self.storage.start(choice))
            if label == DENSE:
                self.dense_ms = trial.ms
                self._plan()
        self.tried = 0

    def _refine(self) -> None:
        """Where trials were rough, measures recipes as they may be chosen: from the cheapest that
        may be within the budget on, until one is."""
        if not self.rough:
            return
        target, kept = self.budget.target, _WHOLE_DROP
        longest = next(t.seconds for t in self.storage.trials() if t.label == INT8_EVERYWHERE)
        while self._left() > longest:
            trials = good(self.storage.trials())
            whole = [trial for trial in trials if not trial.rough]
            found = best(whole, target, self.max_drop)
            assert found is not None  # the dense model loses nothing
            known = [trial.choice for trial in whole]
            candidates = [
                trial
                for trial in front([t for t in trials if t.rough], target)
                if trial.choice not in known
                and kept * trial.drop <= self.max_drop
                and trial.cost(target) < found.cost(target)
            ]
            if not candidates:
                return
            rough = candidates[0]
            label, number = rough.label.removesuffix(ROUGH), self.storage.start(rough.choice)
            trial = self._try(label, rough.choice, number)
            longest = max(longest, trial.seconds)
            if not trial.failed and rough.drop > 0:
                kept = min(1.0, max(0.1, trial.drop / rough.drop))

    def _uniform(self) -> list[tuple[str, dict[str, str]]]:
        """Recipes with the same lookups in all layers that can have them, the most exact first.

        Of networks of some depth the first and the last layer stay dense: they lose most.
        """
        inner = self.layers[1:-1] if len(self.layers) >= _DEEP else self.layers
        names = {layer.name for layer in inner}
        keys = dict.fromkeys(key for layer in inner for key in layer.lookups)
        made = []
        for key in _by_exactness(list(keys)):
            choice = {
                layer.name: key if key in layer.active and layer.name in names
                else layer.fastest_dense
                for layer in self.layers
            }  # fmt: skip
            made.append((f"{key} wherever it may gain", choice))
        fastest = {}
        for layer in self.layers:
            costs = {key: self._alone(layer, key) for key in layer.active}
            fastest[layer.name] = min(costs, key=lambda key: costs[key])
        return [*made, ("the cheapest alone of each layer", fastest)]

    def _alone(self, layer: SearchLayer, key: str) -> float:
        """What a candidate costs by itself."""
        own = layer.candidates[key]
        if self.budget.target == "size":
            return own.bytes
        return 0.0 if own.ms is None else own.ms

    def _claimed(self, label: str, choice: Mapping[str, str]) -> None:
        """Measures a recipe, unless another process is at it."""
        number = self.storage.claim(choice)
        if number is not None:
            self._try(label, choice, number, self.rough)

    def _try(
        self, label: str, choice: Mapping[str, str], number: int, rough: bool = False
    ) -> Trial:
        """Measures a recipe, and keeps what came of it."""
        label += ROUGH if rough else ""
        self._tell(f"trial {len(self.storage.trials()) + 1}: {label}")
        start = time.perf_counter()
        made: _Made | None = None
        try:
            made = self.convert(choice, rough)
            trial = self.judge(label, choice, *made)
        except LutraError as error:
            if label == DENSE:
                raise
            trial = Trial(label, dict(choice), failed=str(error))
        seconds = time.perf_counter() - start
        trial = replace(trial, seconds=seconds, rough=rough)
        self.storage.finish(number, trial)
        if made is not None and made[1] is not None and not rough and not trial.failed:
            self._remember(trial, made)
        self.tried += 1
        return trial

    def convert(
        self, choice: Mapping[str, str], rough: bool = False
    ) -> tuple[nn.Module, ConversionReport | None]:
        """The model with a recipe, with the effort of the choice or of trials: the same bits in
        every call."""
        if not recipe_of(self.layers, choice):
            return self.model, None
        if not rough:
            for known, made in self._made.values():
                if known == dict(choice):
                    return made
        return self._converted(choice, self.efforts.coarse if rough else self.efforts.fine)

    def _converted(self, choice: Mapping[str, str], effort: Effort) -> _Made:
        part = self.data.calibration.thinned(effort.samples)
        return convert(
            self.model, recipe_of(self.layers, choice), [(batch,) for batch in part.batches],
            rows=effort.rows, seed=self.budget.seed, progress=False,
        )  # fmt: skip

    def _remember(self, trial: Trial, made: _Made) -> None:
        """Keeps a model and its file where it is int8 everywhere, or the best so far."""
        whole = [t for t in self.storage.trials() if not t.rough]
        for name, wanted in (
            (INT8_EVERYWHERE, trial.label == INT8_EVERYWHERE),
            (_BEST, best(whole, self.budget.target, self.max_drop) == trial),
        ):
            if wanted:
                self._made[name] = dict(trial.choice), made
                shutil.copyfile(self.bench.file("trial"), self.bench.file(name))

    def file_of(self, choice: Mapping[str, str]) -> Path | None:
        """The file of a recipe as it may be chosen; None where it is not kept."""
        paths = [self.bench.file(name) for name, (own, _) in self._made.items() if own == choice]
        return next((path for path in paths if path.exists()), None)

    def judge(
        self,
        label: str,
        choice: Mapping[str, str],
        model: nn.Module,
        report: ConversionReport | None,
        finetuned: bool = False,
    ) -> Trial:
        """Measures a model as a file in the engine.

        Raises:
            LutraError: it cannot be exported, or what it gives is not finite.
        """
        path = self.bench.file("trial")
        session = self.dense if model is self.model else self.bench.export(model, path)
        file = self.bench.file("dense") if model is self.model else path
        outputs = outputs_of(session, self.data.judged)
        _check_outputs(outputs)
        ratio, own = self._ratio(session)
        names = [layer.name for layer in self.layers]
        errors = {}
        if report is not None:
            errors = {e.name: e.error for e in report.layers if e.error is not None}
        quality = self.quality(session, outputs)
        return Trial(
            label, dict(choice), quality, self.measure.drop(quality),
            surrogate(outputs, self.outputs), self.dense_ms * ratio if self.dense_ms else own,
            ratio, file.stat().st_size, errors, self.bench.layer_times(session, names),
            finetuned=finetuned,
        )  # fmt: skip

    def quality(self, session: Session, outputs: Outputs) -> float:
        """Of a file, whose outputs for the samples that judge are known."""
        if self._evaluate is not None:
            return own_value(self._evaluate, EngineModel(session))
        return self.measure.quality(outputs)

    def _ratio(self, session: Session) -> tuple[float, float]:
        """The time of a file over that of the dense one, and its milliseconds."""
        if session is self.dense:
            return 1.0, float(np.median(self.bench.times({"dense": session}, _SECONDS)["dense"]))
        times = self.bench.times({"dense": self.dense, "own": session}, _SECONDS)
        ratios = np.array(times["own"]) / np.array(times["dense"])
        return float(np.median(ratios)), float(np.median(times["own"]))

    # ---- proposals ------------------------------------------------------------------------------

    def proposal(self, number: int) -> tuple[str, dict[str, str]] | None:
        """The next recipe to try, with a label; None where none is left.

        Every third proposal is by a draw from what is believed, so that candidates of which little
        is known get their turn.

        Args:
            number: of proposals before it.
        """
        trials = good(self.storage.trials())
        losses = self.loss_model(trials)
        costs = self.cost_model(trials, losses.terms())
        rng = np.random.default_rng([self.budget.seed, len(trials), number])
        terms = losses.terms(rng if number % 3 == 2 else None)
        loss_of = {term: max(0.0, value) for term, value in terms.items()}
        cost_of = costs.terms()
        constant, least = costs.constant, cheapest(cost_of)
        target = self.budget.target
        within = best(trials, target, self.max_drop)
        top = max(t.cost(target) for t in trials if t.label in (DENSE, INT8_EVERYWHERE))
        top = top if within is None or number % 2 else within.cost(target)
        tried = [dict(t.choice) for t in self.storage.trials()] + self.storage.running()
        for attempt in range(4):
            share = spread(number // 2 + attempt)
            # near what is best already, most recipes; the others along the whole front
            share = share if number % 2 else share**0.5
            limit = least + share * max(0.0, top - constant - least)
            choice = propose(loss_of, cost_of, limit, tried)
            if choice is not None:
                whole = f"{constant + limit:.4g} ms"
                if target == "size":
                    whole = f"{int(constant + limit)} bytes"
                return f"the least predicted loss within {whole}", choice
        choice = propose(loss_of, cost_of, sum(map(abs, cost_of.values())), tried)
        return None if choice is None else ("the least predicted loss of all", choice)

    @property
    def max_drop(self) -> float:
        """The budget of quality."""
        return 1.0 if self.budget.max_drop is None else self.budget.max_drop

    def loss_model(self, trials: list[Trial]) -> SumModel:
        """What each candidate adds to the loss: at first the errors of the layers share that of
        the uniform conversion that they are from; then all trials correct it."""
        if any(trial.rough for trial in trials):  # losses by all samples are others
            base = (DENSE, INT8_EVERYWHERE)
            trials = [trial for trial in trials if trial.rough or trial.label in base]
        known: dict[Term, list[float]] = {}
        for trial in trials:
            total = sum(max(error, 0.0) for error in trial.errors.values())
            for name, error in trial.errors.items():
                if name in trial.choice and total > 0:
                    share = min(trial.loss, _OUT) * max(error, 0.0) / total
                    known.setdefault((name, trial.choice[name]), []).append(share)
        prior: dict[Term, Belief] = {}
        for layer in self.layers:
            for key in layer.candidates:
                if key == FLOAT32:
                    prior[layer.name, key] = Belief(0.0, 0.0)
                elif (layer.name, key) in known:
                    mean = float(np.median(known[layer.name, key]))
                    prior[layer.name, key] = Belief(mean, mean + 1e-6)
                elif key == INT8:  # of layers without an error, such as embeddings
                    prior[layer.name, key] = Belief(1e-5, 1e-5)
        model = SumModel(prior, Belief(0.0, 0.0))
        seen = [t for t in trials if all((n, k) in prior for n, k in t.choice.items())]
        model.observe(
            [t.choice for t in seen],
            [
                Belief(min(t.loss, _OUT), _LOSS_NOISE * min(t.loss, _OUT) + 1e-6)
                for t in seen
                if t.loss >= 0
            ],
        )
        return model

    def cost_model(self, trials: list[Trial], terms: Container[Term]) -> SumModel:
        """What each candidate costs in the network, beside a constant for all else.

        Args:
            trials: that were measured.
            terms: the candidates to know it of.
        """
        size = self.budget.target == "size"
        inside: dict[Term, list[float]] = {}
        for trial in trials:
            for name, value in trial.layer_ms.items():
                inside.setdefault((name, trial.choice[name]), []).append(value)
        prior = {}
        for layer in self.layers:
            for key, own in layer.candidates.items():
                term = (layer.name, key)
                if term not in terms:
                    continue
                if size:
                    prior[term] = Belief(own.bytes, 0.05 * own.bytes + 64)
                    continue
                value = float(np.median(inside[term])) if term in inside else own.ms or 0.0
                share = 0.2 if term in inside else 0.5
                prior[term] = Belief(value, share * value + 1e-6)
        dense = next(t for t in trials if t.label == DENSE)
        whole = dense.cost(self.budget.target)
        rest = whole - sum(prior[term].mean for term in dense.choice.items() if term in prior)
        model = SumModel(prior, Belief(rest, 0.3 * whole))
        noise = _SIZE_NOISE if size else _TIME_NOISE
        values = [t.cost(self.budget.target) for t in trials]
        model.observe([t.choice for t in trials], [Belief(v, noise * v) for v in values])
        return model

    # ---- what came of it ------------------------------------------------------------------------

    def front(self) -> list[Trial]:
        """The trials that no other beats."""
        return front(self.storage.trials(), self.budget.target)


def _share(efforts: Efforts) -> float:
    """What a rough conversion takes of another, about."""
    return math.sqrt(efforts.coarse.samples / efforts.fine.samples)


def _by_exactness(keys: list[str]) -> list[str]:
    """4-bit lookups, then nearest centroids, trees and 2-bit lookups."""
    return sorted(
        keys, key=lambda key: (key.startswith("lookup 4"), "tree" in key, not key.startswith("l"))
    )


def _check_outputs(outputs: Outputs) -> None:
    for batch in outputs:
        for array in batch:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise LutraError(
                    "optimize: the outputs for the samples that judge hold NaN or infinity; check "
                    "the model and the data"
                )
