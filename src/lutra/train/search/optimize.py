"""Anybody's trained model, an accuracy budget, one call."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import nn

from lutra.errors import LutraError
from lutra.format import save_graph
from lutra.graph import Graph
from lutra.node import Array
from lutra.runtime.cpu import choose_isa, cpu_info
from lutra.runtime.session import Session
from lutra.train.conversion.resume import digest
from lutra.train.exporting.export import with_golden
from lutra.train.exporting.parity import feeds_of
from lutra.train.progress import Progress
from lutra.train.recipe import recipe_to_json
from lutra.train.search.bench import Bench, outputs_of
from lutra.train.search.budget import DEFAULT_DROP, Budget
from lutra.train.search.candidates import find_layers
from lutra.train.search.finetuned import teach
from lutra.train.search.proposals import need_solver
from lutra.train.search.quality import Outputs, Top1
from lutra.train.search.samples import Split, split
from lutra.train.search.search import Search
from lutra.train.search.storage import open_storage
from lutra.train.search.study import Study
from lutra.train.search.trial import DENSE, INT8_EVERYWHERE, Trial, best, good

_LAYER_TIMES: Final = "times of layers"
_SECONDS: Final = 2.0  # of the last measurement
#: Fine-tuning starts from a recipe that may lose so many times the budget before it.
_RECOVERED: Final = 4.0
#: A choice is slower than int8 where the medians differ by more than this share.
_SAME_TIME: Final = 0.01
_WORST: Final = 8
#: What is left for other runtimes: so many seconds, and at most this share of the minutes.
_PEERS_SECONDS: Final = 40.0
_PEERS_SHARE: Final = 0.15
#: A search that took longer than its minutes by more than this share says so.
_OVERRUN: Final = 0.15
_DEFAULT: Final = Budget()

#: Measures another runtime: of the samples that judge a function from outputs to quality and drop.
Peers = Callable[[Split, Callable[[Outputs], tuple[float, float]]], list[dict[str, Any]]]


def optimize(
    model: nn.Module,
    data: Any,
    evaluate: Callable[[nn.Module], float] | None = None,
    budget: Budget = _DEFAULT,
    *,
    labels: Any = None,
    names: Sequence[str] | None = None,
    storage: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    metadata: dict[str, Any] | None = None,
    peers: Peers | None = None,
    progress: bool | None = None,
) -> Study:
    """Finds the fastest or smallest recipe for a model within a budget of quality.

    Recipes are tried as wholes: converted with sequential calibration, exported, and measured in
    the engine, on samples that no calibration sees. The dense model and int8 everywhere come first,
    so that there always is an answer; then lookups of one kind everywhere; then what a
    mixed-integer program proposes, whose terms all trials before correct.

    Args:
        model: a trained module that `convert` and `export` take; it is not modified.
        data: a tensor or array (N, ...) of the first input; a mapping with one for each argument;
            or batches, as `convert` takes them. Some hundred samples are needed, a thousand are
            plenty. Three quarters, at most 1,024, calibrate; others judge, at most 4,096.
        evaluate: the quality of a model, higher is better. It is called with a module that runs the
            file in the engine, and takes and gives tensors; the budget must then name `max_drop`.
            None chooses a measure: accuracy where there are labels; else the agreement with the
            dense model, of its largest scores, its images, or its outputs as vectors.
        budget: quality, time and machine.
        labels: a class for each sample in the order of the data, or a target of the output's shape;
            None takes what stands in the batches behind the arguments, if anything does.
        names: what the report calls the samples, such as their files or texts, in the order of the
            data; None calls them by their number.
        storage: a file that keeps finished trials, so that the search goes on after a stop, and
            several processes can work on it (needs the extra `search`). None keeps them in memory.
        output: the `.lutra` file to write the choice to; None writes none.
        metadata: further entries for the metadata of that file.
        peers: measures other runtimes, see `lutra.train.search.peers`.
        progress: show a progress bar; None shows it on terminals only.

    Returns:
        The study: trials, front, choice and converted model.

    Raises:
        LutraError: the data, labels, budget or storage cannot be used, or the model can be neither
            converted nor exported. A budget that nothing reaches is no error: `Study.message` says
            what is nearest.

    Examples:
        >>> import torch
        >>> from lutra.train import Budget, optimize
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5)
        ... )
        >>> study = optimize(model, torch.rand(64, 32), budget=Budget(minutes=0))
        >>> [trial.label for trial in study.trials], study.measure.name
        (['dense', 'int8 everywhere'], 'agreement')
    """
    begin = time.perf_counter()
    _check(model, evaluate, budget, output, peers)
    need_solver()
    max_drop = DEFAULT_DROP if budget.max_drop is None else budget.max_drop
    budget = Budget(**{**vars(budget), "max_drop": max_drop})
    parts = split(model, data, labels, budget.seed)
    if names is not None and (isinstance(names, str) or len(names) != parts.given):
        raise LutraError(
            f"optimize: names has {len(names)} entries for {parts.given} samples; give one for each"
        )
    with (
        tempfile.TemporaryDirectory(prefix="lutra-") as folder,
        Progress("searching", None, progress) as bar,
    ):
        settings = _settings(model, parts, budget, evaluate)
        kept = open_storage(storage, settings)
        times = kept.notes(_LAYER_TIMES) or {}
        bar.update(0, "timing layers")
        layers = find_layers(model, parts, budget, times)
        others = kept.notes(_LAYER_TIMES)
        if others is not None and others != times:  # processes that begin at once choose alike
            times = {**times, **others}
            layers = find_layers(model, parts, budget, times)
        kept.note(_LAYER_TIMES, times)
        bench = Bench(model, parts, budget, Path(folder))
        done = len(kept.trials())

        def tell(what: str) -> None:
            bar.update(len(kept.trials()) - done, what)

        behind = 0.0 if peers is None else min(_PEERS_SHARE * 60.0 * budget.minutes, _PEERS_SECONDS)
        search = Search(model, parts, layers, bench, budget, kept, evaluate, tell, begin, behind)
        search.run()
        tell("the choice")
        return _Finish(search, settings, output, metadata, peers, begin, names).study()


class _Finish:
    """From trials to a choice that is fine-tuned, written and measured once more."""

    def __init__(
        self,
        search: Search,
        settings: dict[str, Any],
        output: str | os.PathLike[str] | None,
        metadata: dict[str, Any] | None,
        peers: Peers | None,
        begin: float,
        names: Sequence[str] | None,
    ) -> None:
        self.search, self.settings, self.output = search, settings, output
        self.metadata, self.peers, self.begin = metadata or {}, peers, begin
        self.names = names
        self.trials = search.storage.trials()
        self.notes = ["The search was stopped before its time."] if search.stopped else []
        if isinstance(search.measure, Top1) and search.measure.doubt:
            self.notes.append(search.measure.doubt)

    def study(self) -> Study:
        """The result."""
        search, budget = self.search, self.search.budget
        chosen = self._best()
        assert chosen is not None  # the dense model loses nothing
        model = None
        if budget.finetune_minutes > 0:
            tuned = self._finetuned()
            if tuned is not None:
                chosen, model = tuned
        if model is None:
            model, _ = search.convert(chosen.choice)
        session = self._export(model, chosen)
        final = self._measured(session, chosen)
        chosen, model, session, final = self._not_slower(chosen, model, session, final)
        # All times by the same measure: the dense model as it was measured last.
        dense_ms = final["dense"]["ms"]
        self.trials = [replace(trial, ms=trial.ratio * dense_ms) for trial in self.trials]
        worst, inputs = self._worst(session)
        study = Study(
            trials=self.trials,
            choice=chosen,
            reached=False,
            message="",
            model=model,
            measure=search.measure,
            layers=search.layers,
            budget=budget,
            settings=self.settings,
            final=final,
            expected=search.loss_model(good(self.trials)).terms(),
            graph=session.graph,
            worst=worst,
            worst_inputs=inputs,
        )
        study.reached, study.message = self._message(study)
        if self.peers is not None:
            study.peers = self.peers(search.data, self._judged)
            study.message = " ".join([study.message, *_faster_peers(study)])
        study.seconds = time.perf_counter() - self.begin
        study.message = " ".join([study.message, *self._effort(study.seconds)])
        if self.output is not None:
            study.graph = self._write(session.graph, study)
        return study

    def _effort(self, seconds: float) -> list[str]:
        """What was left out because the minutes are few, and how much longer it took."""
        search, budget = self.search, self.search.budget
        said = []
        fine, count = search.efforts.fine, search.data.calibration.count
        if fine.samples < count:
            said.append(
                f"Conversion takes long for {budget.minutes:g} minutes, so {fine.samples} of the "
                f"{count} samples calibrated; with more minutes recipes may lose less."
            )
        whole = int(search.judges)
        if search.data.judged.count < whole:
            said.append(
                f"{search.data.judged.count} of {whole} samples judged, for the same reason."
            )
        allowed = 60.0 * (budget.minutes + budget.finetune_minutes)
        if budget.minutes and seconds > (1.0 + _OVERRUN) * allowed:
            said.append(
                f"All of it took {seconds / 60:.1f} minutes: what has to be measured in any case "
                "did not fit."
            )
        return said

    def _best(self) -> Trial | None:
        """The cheapest recipe within the budget, of those that all samples calibrated."""
        whole = [trial for trial in self.trials if not trial.rough]
        return best(whole, self.search.budget.target, self.search.max_drop)

    def _judged(self, outputs: Outputs) -> tuple[float, float]:
        """Quality and drop of the outputs of another runtime."""
        quality = self.search.measure.quality(outputs)
        return quality, self.search.measure.drop(quality)

    def _export(self, model: nn.Module, chosen: Trial) -> Session:
        """The choice as a file, which may be that of its trial."""
        bench = self.search.bench
        path = bench.file("choice")
        known = None if chosen.finetuned else self.search.file_of(chosen.choice)
        if model is self.search.model:
            known = bench.file("dense")
        if known is None:
            return bench.export(model, path)
        shutil.copyfile(known, path)
        return bench.session(path)

    def _finetuned(self) -> tuple[Trial, nn.Module] | None:
        """A cheaper recipe than the budget allows without training, fine-tuned into it; the choice
        without training where that does not do; None where nothing is to be trained."""
        search, budget = self.search, self.search.budget
        plain = self._best()
        start = best(self.trials, budget.target, _RECOVERED * search.max_drop)
        assert plain is not None
        assert start is not None
        model, report = search.convert(start.choice)
        if model is search.model:
            return None
        steps, seconds = teach(
            model, search.model, search.data.calibration, search.measure,
            budget.finetune_minutes, budget.seed,
        )  # fmt: skip
        trial = search.judge(
            f"{start.label}, fine-tuned", start.choice, model, report, finetuned=True
        )
        trial = replace(trial, seconds=seconds)
        self.trials = [*self.trials, trial]
        unit = search.measure.unit
        self.notes.append(
            f"Fine-tuning of '{start.label}', {steps} steps in {seconds / 60:.1f} minutes with the "
            f"dense model as teacher, took its drop from {start.drop:.2f} to {trial.drop:.2f} "
            f"{unit}".rstrip()
            + "."
        )
        better = best([plain, trial], budget.target, search.max_drop)
        if better is not trial and not (
            start is plain and trial.drop <= plain.drop
        ):  # the same recipe, at the same cost but for noise
            return None
        return trial, model

    def _measured(self, session: Session, chosen: Trial) -> dict[str, dict[str, float]]:
        """The dense model, int8 and the choice, timed together."""
        search, bench = self.search, self.search.bench
        sessions = {"dense": search.dense, "choice": session}
        files = {"dense": "dense", "choice": "choice", "int8": "int8"}
        int8 = self._int8()
        if chosen.choice == self._dense().choice:
            del sessions["choice"]
            files["choice"] = "dense"
        if int8 is not None and int8.choice != chosen.choice:
            known = search.file_of(int8.choice)
            path = bench.file("int8") if known is None else known
            files["int8"] = path.stem
            if known is None and not path.exists():
                bench.export(search.convert(int8.choice)[0], path)
            sessions["int8"] = bench.session(path)
        times = bench.times(sessions, _SECONDS)
        times.setdefault("choice", times["dense"])
        if int8 is not None and "int8" not in sessions:
            times["int8"] = times["choice"]
            files["int8"] = "choice"
        dense = np.array(times["dense"])
        final: dict[str, dict[str, float]] = {}
        for name, values in times.items():
            low, high = np.percentile(values, [10, 90])
            ratio = float(np.median(np.array(values) / dense))
            final[name] = {
                "ms": ratio * float(np.median(dense)),
                "low_ms": float(low),
                "high_ms": float(high),
                "ratio": ratio,
                "bytes": float(bench.file(files[name]).stat().st_size),
                "rounds": float(len(values)),
            }
        return final

    def _int8(self) -> Trial | None:
        return next((t for t in good(self.trials) if t.label == INT8_EVERYWHERE), None)

    def _not_slower(
        self, chosen: Trial, model: nn.Module, session: Session, final: dict[str, dict[str, float]]
    ) -> tuple[Trial, nn.Module, Session, dict[str, dict[str, float]]]:
        """The choice, or int8 or the dense model where these are within the budget and turn out to
        be faster when all are measured together."""
        search, key = self.search, "ms" if self.search.budget.target == "latency" else "bytes"
        rivals = [t for t in (self._dense(), self._int8()) if t is not None]
        for trial, name in zip(rivals, ("dense", "int8"), strict=False):
            mine, other = final["choice"][key], final[name][key]
            within = trial.drop <= search.max_drop and trial.choice != chosen.choice
            cheaper = other * (1 + _SAME_TIME) < mine
            same = other <= mine * (1 + _SAME_TIME) and trial.loss <= chosen.loss
            if within and (cheaper or same):
                how = "was cheaper than" if cheaper else "cost no more, and was as good as,"
                self.notes.append(
                    f"Measured together, {trial.label} {how} '{chosen.label}', and is the choice."
                )
                model, _ = search.convert(trial.choice)
                session = self._export(model, trial)
                chosen = trial
                final = self._measured(session, chosen)
        values = final["choice"]
        measured = {
            **chosen.to_dict(), "ms": values["ms"], "ratio": values["ratio"],
            "bytes": int(values["bytes"]),
        }  # fmt: skip
        return Trial(**measured), model, session, final

    def _dense(self) -> Trial:
        return next(t for t in self.trials if t.label == DENSE)

    def _message(self, study: Study) -> tuple[bool, str]:
        """Whether the choice is better than the dense model and int8, and a sentence about it."""
        search, chosen, final = self.search, study.choice, study.final
        target = search.budget.target
        key = "ms" if target == "latency" else "bytes"
        unit = f" {search.measure.unit}".rstrip()
        limit_unit = unit.rstrip("s") if search.max_drop == 1 else unit
        within = [
            name
            for name, trial in (("dense", self._dense()), ("int8", self._int8()))
            if trial is not None and trial.drop <= search.max_drop and name in final
        ]
        rival = min(within, key=lambda name: final[name][key])
        gain = final[rival][key] / final["choice"][key]
        names = {"dense": "the dense model", "int8": "int8 everywhere"}
        limit = f"a drop of at most {search.max_drop:g}{limit_unit}"
        numbers = (
            f"{search.measure.name} {chosen.quality:.2f}, drop {chosen.drop:.2f}{unit}, "
            f"{final['choice']['ms']:.4f} ms ({1 / final['choice']['ratio']:.2f}x the dense "
            f"model), {int(final['choice']['bytes']):,} bytes"
        )
        what = "faster" if target == "latency" else "smaller"
        reached = gain > 1 + _SAME_TIME
        if reached:
            text = (
                f"Within {limit}, '{chosen.label}' is {gain:.2f}x as {_adjective(target)} as "
                f"{names[rival]}, the best without lookups: {numbers}."
            )
        else:
            text = (
                f"Nothing {what} than {names[rival]} was found within {limit}; the best is "
                f"'{chosen.label}': {numbers}."
            )
            cheaper = chosen.cost(target) * (1 - _SAME_TIME)
            beyond = [
                t
                for t in good(self.trials)
                if t.cost(target) < cheaper and t.drop > search.max_drop
            ]
            if beyond:
                near = min(beyond, key=lambda t: (t.drop, t.cost(target)))
                cost = f"{near.ms:.4f} ms" if target == "latency" else f"{near.bytes:,} bytes"
                text += (
                    f" The nearest beyond it is '{near.label}': drop {near.drop:.2f}{unit} at "
                    f"{cost}."
                )
        return reached, " ".join([text, *self.notes])

    def _worst(self, session: Session) -> tuple[list[dict[str, Any]], list[tuple[Array, ...]]]:
        """The samples whose outputs differ most: their places in the data, and their inputs."""
        search, part = self.search, self.search.data.judged
        outputs = outputs_of(session, part)
        badness = search.measure.badness(outputs)
        places = [int(place) for place in np.argsort(-badness, kind="stable")[:_WORST]]
        classes: list[Array | None] = [None, None]
        if isinstance(search.measure, Top1):
            classes = [
                np.concatenate([batch[0].argmax(1) for batch in own])
                for own in (outputs, search.outputs)
            ]
        mine, dense = classes
        entries = [
            {
                "index": int(part.index[place]),
                "name": None if self.names is None else str(self.names[int(part.index[place])]),
                "error": float(badness[place]),
                "choice": None if mine is None else int(mine[place]),
                "dense": None if dense is None else int(dense[place]),
            }
            for place in places
        ]
        return entries, [part.sample(place) for place in places]

    def _write(self, graph: Graph, study: Study) -> Graph:
        """Writes the choice with golden data, and with the study in its metadata."""
        assert self.output is not None
        graph = with_golden(graph, feeds_of(graph, self.search.bench.example))
        entries = {
            **graph.metadata,
            "recipe": {"method": "optimize", "patterns": recipe_to_json(study.recipe)},
            "seed": study.budget.seed,
            "study": study.to_dict(),
            **self.metadata,
        }
        graph = replace(graph, metadata=entries)
        save_graph(graph, self.output)
        return graph


def _faster_peers(study: Study) -> list[str]:
    """A sentence about the fastest runtime within the budget that is faster than the choice."""
    most, chosen = study.budget.max_drop or 0.0, study.choice
    within = [peer for peer in study.peers if peer["drop"] <= most and peer["ms"] < chosen.ms]
    if not within:
        return []
    best_peer = min(within, key=lambda peer: float(peer["ms"]))
    return [
        f"{best_peer['name']} is faster here: {best_peer['ms']:.4f} ms, drop "
        f"{best_peer['drop']:.2f}."
    ]


def _adjective(target: str) -> str:
    return "fast" if target == "latency" else "small"


def _check(
    model: Any,
    evaluate: Any,
    budget: Any,
    output: Any,
    peers: Any,
) -> None:
    if not isinstance(model, nn.Module):
        raise LutraError(
            f"optimize: the model is a {type(model).__name__}; give a torch.nn.Module, such as "
            "load_onnx(path) returns"
        )
    if not isinstance(budget, Budget):
        raise LutraError(f"optimize: budget is a {type(budget).__name__}; give Budget(...)")
    if evaluate is not None and not callable(evaluate):
        raise LutraError(
            f"optimize: evaluate is a {type(evaluate).__name__}; give a function that takes a "
            "model and returns a number"
        )
    if evaluate is not None and budget.max_drop is None:
        raise LutraError(
            "optimize: with an evaluate of your own the budget must say, in its unit, what may be "
            "lost; give Budget(max_drop=...)"
        )
    if evaluate is not None and peers is not None:
        raise LutraError(
            "optimize: evaluate takes a model, and peers give outputs only; leave one of them out"
        )
    if output is not None and not Path(output).resolve().parent.is_dir():
        raise LutraError(
            f"optimize: output={os.fspath(output)!r}: the folder "
            f"{str(Path(output).resolve().parent)!r} does not exist"
        )


def _settings(model: nn.Module, data: Split, budget: Budget, evaluate: Any) -> dict[str, Any]:
    """What decides the meaning of trials: studies with the same may be continued."""
    parts = (data.calibration, data.judged)
    labels = None if data.judged.labels is None else data.judged.labels.tolist()
    return {
        "model": digest(model.state_dict()),
        "data": digest([part.batches for part in parts], labels),
        "split": data.text,
        "measure": "evaluate" if evaluate is not None else "by the outputs",
        "target": budget.target,
        "machine": cpu_info()["model"],
        "isa": choose_isa(budget.isa),
        "threads": budget.threads,
        "seed": budget.seed,
    }
