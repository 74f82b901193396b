"""What a search found: all trials, the front, and the recipe that was chosen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lutra.formatting import counted, table
from lutra.graph import Graph
from lutra.node import Array
from lutra.reporting.page import page, write_page
from lutra.runtime.session import Session
from lutra.train.recipe import Method, recipe_to_json
from lutra.train.search.budget import Budget
from lutra.train.search.candidates import FLOAT32, INT8, SearchLayer, recipe_of
from lutra.train.search.quality import Measure
from lutra.train.search.trial import Trial, front


@dataclass
class Study:
    """The result of `optimize`. `print` it for a table of the front.

    Attributes:
        trials: every recipe that was measured, the dense model and int8 everywhere among them.
        choice: the cheapest recipe within the budget; its numbers are those of the last
            measurement, beside the dense model and int8.
        reached: whether the choice is within the budget and cheaper than the dense model and int8
            everywhere.
        message: what was chosen and why, or what could not be reached, in a sentence or two.
        model: the converted model of the choice; the dense one where nothing was better.
        recipe: for `convert`; empty where the dense model is the choice.
        graph: the choice as it was exported, and as it was written where `output` was given.
        measure: name, unit, text, and the value of the dense model.
        layers: candidates of each layer.
        budget: that was given.
        settings: machine, kernels, threads and how the data were split.
        final: milliseconds and bytes of the dense model, int8 and the choice, measured together.
        peers: other runtimes on the same samples, where they were asked for.
        expected: what each candidate of each layer is believed to add to the loss.
        worst: the samples whose outputs differ most, as places in the data, with their errors.
        worst_inputs: the inputs of these samples.
        seconds: that all of it took.
    """

    trials: list[Trial]
    choice: Trial
    reached: bool
    message: str
    model: nn.Module
    measure: Measure
    layers: list[SearchLayer]
    budget: Budget
    settings: dict[str, Any]
    final: dict[str, dict[str, float]]
    expected: dict[tuple[str, str], float]
    graph: Graph
    worst: list[dict[str, Any]] = field(default_factory=list)
    worst_inputs: list[tuple[Array, ...]] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def front(self) -> list[Trial]:
        """The trials that no other is both cheaper and better than, the cheapest first, and the
        choice. Rough trials of recipes that all samples calibrated too do not count."""
        whole = [trial.choice for trial in self.trials if not trial.rough]
        own = [trial for trial in self.trials if not trial.rough or trial.choice not in whole]
        found = front(own, self.budget.target)
        missing = [t for t in own if t.choice == self.choice.choice and t not in found]
        return sorted([*found, *missing[-1:]], key=lambda t: t.cost(self.budget.target))

    @property
    def recipe(self) -> dict[str, Method]:
        """The recipe of the choice, for `convert`."""
        return recipe_of(self.layers, self.choice.choice)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what a report is made of, and what the file keeps."""
        on_front = {id(trial) for trial in self.front}
        return {
            "message": self.message,
            "reached": self.reached,
            "measure": {
                "name": self.measure.name, "unit": self.measure.unit, "text": self.measure.text,
                "dense": self.measure.dense,
            },
            "target": self.budget.target,
            "max_drop": self.budget.max_drop,
            "settings": self.settings,
            "trials": [_row(t, id(t) in on_front) for t in self.trials],
            "choice": _row(self.choice, True),
            "layers": [self._layer(layer) for layer in self.layers],
            "recipe": recipe_to_json(self.recipe),
            "final": self.final,
            "peers": self.peers,
            "worst": self.worst,
            "seconds": self.seconds,
        }  # fmt: skip

    def save_report(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Writes a page about the study: HTML that needs no network (needs the extra `report`).

        Args:
            path: the file to write.
            name: what to call the model; the name of the file, without it.

        Raises:
            LutraError: a package of the extra is not installed.
            OSError: the file cannot be written.
        """
        session = Session(self.graph, threads=self.budget.threads, isa=self.budget.isa)
        sizes = {
            value.name: array.shape
            for value, array in zip(self.graph.inputs, self.worst_inputs[0], strict=True)
        }
        text = page(
            Path(path).stem if name is None else name,
            self.graph,
            session.profile(sizes=sizes),
            study=self.to_dict(),
            inputs=self.worst_inputs,
            size=int(self.final["choice"]["bytes"]),
        )
        write_page(path, text)

    def _layer(self, layer: SearchLayer) -> dict[str, Any]:
        chosen = self.choice.choice[layer.name]
        return {
            "name": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "chosen": chosen,
            "why": why(layer, chosen, self.expected, self.budget.target),
            "error": self.choice.errors.get(layer.name),
            "ms": self.choice.layer_ms.get(layer.name),
            "bytes": layer.candidates[chosen].bytes,
            "candidates": {
                key: {
                    "ms": own.ms,
                    "bytes": own.bytes,
                    "loss": self.expected.get((layer.name, key)),
                }
                for key, own in layer.candidates.items()
                if key not in layer.dropped
            },
            "dropped": layer.dropped,
        }

    def __str__(self) -> str:
        unit = f" {self.measure.unit}" if self.measure.unit else ""
        rows = [("recipe", self.measure.name, f"drop{unit}", "ms", "x dense", "bytes")]
        for trial in self.front:
            speed = f"{1 / trial.ratio:.2f}" if trial.ratio else ""
            mark = "* " if trial.choice == self.choice.choice else "  "
            rows.append(
                (mark + trial.label, f"{trial.quality:.2f}", f"{trial.drop:.2f}",
                 f"{trial.ms:.4f}", speed, f"{trial.bytes:,}")
            )  # fmt: skip
        tried = counted(len(self.trials), "recipe")
        return f"{table(rows)}\n{tried} in {self.seconds:.0f} s\n{self.message}"


def why(
    layer: SearchLayer,
    chosen: str,
    expected: Mapping[tuple[str, str], float],
    target: str,
) -> str:
    """Why a layer became what it did, in a sentence."""

    def costs(key: str) -> str:
        own = layer.candidates[key]
        if target == "size":
            return f"{own.bytes:,} bytes"
        return "not timed alone" if own.ms is None else f"{own.ms:.4f} ms alone"

    def loss(key: str) -> str:
        value = expected.get((layer.name, key))
        return "" if value is None else f", loss {max(value, 0.0):.2g}"

    text = f"{chosen}: {costs(chosen)}{loss(chosen)}"
    others = [key for key in layer.active if key != chosen]
    if chosen in (FLOAT32, INT8):
        others = [key for key in others if key not in (FLOAT32, INT8)] or others
        if not layer.lookups and layer.dropped:
            fastest = min(layer.dropped.values(), key=len)
            return f"{text}; no lookups gain here: the nearest {fastest}"
    elif INT8 in layer.candidates:
        others = [INT8]
    listed = "; ".join(f"{key} {costs(key)}{loss(key)}" for key in others[:3])
    return f"{text}; others: {listed}" if listed else text


def _row(trial: Trial, on_front: bool) -> dict[str, Any]:
    """A trial for a report; layers only of those on the front."""
    row = trial.to_dict()
    if not on_front:
        for name in ("errors", "layer_ms", "choice"):
            row[name] = {}
    return {**row, "front": on_front}
