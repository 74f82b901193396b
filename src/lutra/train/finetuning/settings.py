"""What a fine-tuning run is told: how fast it learns, from whom, and where it keeps its state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from lutra.errors import LutraError


@dataclass(frozen=True)
class Schedule:
    """Learning rates, and what steadies a run. All rates follow a cosine to zero.

    Attributes:
        lr: learning rate of all parameters without one of their own.
        warmup: steps in which the rates rise linearly.
        weight_decay: of all parameters but the tables and scales of lookup layers.
        temperature_lr: learning rate of the temperatures of soft gradients (LUT-NN takes 100 times
            `lr`).
        table_lr: learning rate of the tables and scales of lookup layers; None takes `lr`. Where
            `lr` is small (1e-4), they need more.
        clip_norm: largest norm of the gradient of all parameters together; None does not clip.
        codebook_lr: learning rate of codebooks; None takes `lr`. Transformers want 1e-3 here and
            `lr=3e-5` for their weights.
        average: decay of an exponential average of the parameters (0.999 is usual). Evaluations see
            the average, and the model has it at the end. None keeps the parameters of the last
            step. Running statistics of batch norms are averaged with them; `batch_norm_batches` of
            `finetune` measure them for the average itself.
        frozen_batch_norm: share of the run, from its start, in which batch norms use their running
            statistics and do not renew them (0..1).
        frozen_codebooks: share of the run, up to its end, in which codebooks do not move (0..1).
        frozen_weights: share of the run, from its start, in which nothing moves but codebooks,
            tables and their scales (0..1): the second of LUTBoost's three stages (LUT-DLA,
            arXiv 2501.10658). With the replaced layers as `feature_layers` it is trained as there.

    Raises:
        LutraError: a number is negative or not finite, a share above 1, `clip_norm` zero, or
            `average` 1 or more.
    """

    lr: float = 1e-3
    warmup: int = 0
    weight_decay: float = 0.0
    temperature_lr: float = 0.1
    table_lr: float | None = None
    clip_norm: float | None = None
    codebook_lr: float | None = None
    average: float | None = None
    frozen_batch_norm: float = 0.0
    frozen_codebooks: float = 0.0
    frozen_weights: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0.0 <= value < math.inf:
                raise LutraError(f"finetune: {name}={value} is not a number of 0 or more")
        for name in ("frozen_batch_norm", "frozen_codebooks", "frozen_weights"):
            if getattr(self, name) > 1.0:
                raise LutraError(
                    f"finetune: {name}={getattr(self, name)} is a share of the run; give 0..1"
                )
        if self.average is not None and self.average >= 1.0:
            raise LutraError(
                f"finetune: average={self.average} would never move; give a decay below 1, for "
                "example 0.999"
            )
        if self.clip_norm == 0.0:
            raise LutraError(
                "finetune: clip_norm=0 leaves no gradient; give a positive norm, or None for no "
                "limit"
            )

    @property
    def rate_of_tables(self) -> float:
        """The learning rate of tables and scales."""
        return self.lr if self.table_lr is None else self.table_lr

    def factor(self, step: int, total: int) -> float:
        """What the rates are multiplied by at a step of a run of `total` steps."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, total - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Distillation:
    """A network to learn from: its softened outputs, and the outputs of its inner layers.

    Attributes:
        teacher: a network for the same batches; its classes are those of the model.
        weight: share of the teacher's loss, 0..1; the other loss has the rest. At 1 no targets are
            needed.
        temperature: softens the outputs of both.
        feature_layers: module paths, the same in both networks, whose outputs are drawn to the
            teacher's by their mean squared difference relative to the teacher's mean square.
        feature_weight: what the sum over these layers is multiplied by.

    Raises:
        LutraError: a number out of range.
    """

    teacher: nn.Module
    weight: float = 1.0
    temperature: float = 4.0
    feature_layers: Sequence[str] = ()
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise LutraError(f"finetune: distillation={self.weight} is not in 0..1")
        if not 0.0 < self.temperature < math.inf:
            raise LutraError(
                f"finetune: distillation_temperature={self.temperature} is not a positive number"
            )
        if isinstance(self.feature_layers, str):
            raise LutraError(
                f"finetune: feature_layers='{self.feature_layers}' is one string; give a sequence "
                "of module paths"
            )


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps its state, and how often; the newest two are kept.

    Attributes:
        folder: made if it is not there.
        every: steps between two; None writes one at the end only.
        resume: whether to continue from the newest, bit for bit as if the run had not stopped (data
            loaders with worker processes: at epoch boundaries). If not, the run starts over and
            replaces what is there.

    Raises:
        LutraError: `every` is negative.
    """

    folder: str | Path
    every: int | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise LutraError(
                f"finetune: checkpoint_every={self.every} is negative; give steps, or None for one "
                "at the end"
            )


class Keywords(TypedDict, total=False):
    """Fields of `Schedule`, `Distillation` and `Checkpoints` as keywords of `finetune`."""

    lr: float
    codebook_lr: float | None
    warmup: int
    weight_decay: float
    temperature_lr: float
    table_lr: float | None
    clip_norm: float | None
    average: float | None
    frozen_batch_norm: float
    frozen_codebooks: float
    frozen_weights: float
    teacher: nn.Module | None
    distillation_temperature: float
    feature_layers: Sequence[str]
    feature_weight: float
    checkpoint_dir: str | Path | None
    checkpoint_every: int | None
    resume: bool


# Keywords of `finetune` and the fields that they are.
_OF_SCHEDULE = {name: name for name in Schedule.__dataclass_fields__}
_OF_DISTILLATION = {
    "teacher": "teacher",
    "distillation_temperature": "temperature",
    "feature_layers": "feature_layers",
    "feature_weight": "feature_weight",
}
_OF_CHECKPOINTS = {"checkpoint_dir": "folder", "checkpoint_every": "every", "resume": "resume"}


@dataclass(frozen=True)
class Settings:
    """Schedule, distillation and checkpoints, in whatever form they were given."""

    schedule: Schedule
    distillation: Distillation | None
    checkpoints: Checkpoints | None

    def to_json(self) -> dict[str, Any]:
        """JSON values: what a checkpoint keeps of the schedule and the distillation."""
        found = self.distillation
        return {
            **vars(self.schedule),
            "table_lr": self.schedule.rate_of_tables,
            # None where unused: checkpoints that lack these settings then fit.
            "frozen_batch_norm": self.schedule.frozen_batch_norm or None,
            "frozen_codebooks": self.schedule.frozen_codebooks or None,
            "frozen_weights": self.schedule.frozen_weights or None,
            "distillation": None if found is None else found.weight,
            "distillation_temperature": None if found is None else found.temperature,
            "feature_layers": [] if found is None else list(found.feature_layers),
            "feature_weight": 1.0 if found is None else found.feature_weight,
        }

    @classmethod
    def of(
        cls,
        schedule: Schedule | None,
        distillation: Distillation | float | None,
        checkpoints: Checkpoints | None,
        keywords: Mapping[str, Any],
    ) -> Settings:
        """Joins the objects with keywords for single fields.

        Args:
            distillation: also the weight alone, for the keyword `teacher`.

        Raises:
            TypeError: a keyword is unknown.
            LutraError: a field is out of range, or given twice.
        """
        unknown = set(keywords) - {*_OF_SCHEDULE, *_OF_DISTILLATION, *_OF_CHECKPOINTS}
        if unknown:
            raise TypeError(f"finetune() got an unexpected keyword argument '{min(unknown)}'")
        rates = _fields(keywords, _OF_SCHEDULE, "schedule", schedule)
        lessons = _fields(keywords, _OF_DISTILLATION, "distillation", distillation)
        places = _fields(keywords, _OF_CHECKPOINTS, "checkpoints", checkpoints)
        if not isinstance(distillation, Distillation):
            distillation = _distillation(1.0 if distillation is None else distillation, lessons)
        if checkpoints is None and places.get("folder") is not None:
            checkpoints = Checkpoints(**places)
        return cls(schedule or Schedule(**rates), distillation, checkpoints)


def _fields(
    keywords: Mapping[str, Any], names: Mapping[str, str], holder: str, given: object
) -> dict[str, Any]:
    """The fields of one object among the keywords; none may be there if the object is given."""
    found = [name for name in keywords if name in names]
    if found and isinstance(given, Schedule | Distillation | Checkpoints):
        kind = type(given).__name__
        raise LutraError(
            f"finetune: {found[0]} and {holder}={kind}(...) are both given; give "
            f"{kind}({names[found[0]]}=...) alone"
        )
    return {names[name]: keywords[name] for name in found}


def _distillation(weight: float, fields: Mapping[str, Any]) -> Distillation | None:
    """A distillation by keywords; None without a teacher."""
    if fields.get("teacher") is not None:
        return Distillation(weight=weight, **fields)
    if fields.get("feature_layers"):
        raise LutraError("finetune: feature_layers needs a teacher")
    return None
