"""Losses against a teacher network: its softened outputs, and the outputs of its inner layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train.batches import BatchReader
from lutra.train.finetuning.outputs import Loss, by_class, first_tensor, logits
from lutra.train.finetuning.settings import Distillation

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Targets of this class do not count, as in PyTorch's cross entropy.
IGNORED = -100


class FeatureMatch:
    """Listens to the outputs of the same layers in student and teacher while it is entered.

    Raises:
        LutraError: one of the networks lacks a layer.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: Sequence[str]) -> None:
        self._names = tuple(layers)
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        for name in layers:
            try:
                self._pairs.append((student.get_submodule(name), teacher.get_submodule(name)))
            except AttributeError:
                raise LutraError(
                    f"finetune: feature layer '{name}' is not a layer of student and teacher both"
                ) from None
        self._outputs: dict[nn.Module, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> FeatureMatch:
        for pair in self._pairs:
            for layer in pair:
                self._handles.append(layer.register_forward_hook(self._keep))
        return self

    def _keep(self, layer: nn.Module, _: Any, output: Any) -> None:
        if not any(layer in pair for pair in self._pairs):
            return  # a copy of the model has the hooks too
        found = first_tensor(output)
        if found is not None:
            self._outputs[layer] = found

    def loss(self) -> Tensor | None:
        """Sum over the layers of the relative squared difference; forgets the outputs.

        Raises:
            LutraError: a layer gave no tensor, or was not called.
        """
        total: Tensor | None = None
        for name, pair in zip(self._names, self._pairs, strict=True):
            if not all(layer in self._outputs for layer in pair):
                raise LutraError(
                    f"finetune: feature layer '{name}' gave no tensor in this step; name a layer "
                    "that student and teacher both call"
                )
            got, wanted = (self._outputs[layer].float() for layer in pair)
            term = F.mse_loss(got, wanted) / wanted.square().mean().clamp_min(1e-12)
            total = term if total is None else total + term
        self._outputs.clear()
        return total

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()


#: Of the output of the model, the targets, and the batch that they are from.
StepLoss = Callable[[Any, Any, Any], Tensor]


@contextmanager
def step_loss(
    accelerator: Accelerator, student: nn.Module, distillation: Distillation | None, loss: Loss
) -> Iterator[StepLoss]:
    """The loss of a training step, with a teacher or without."""
    if distillation is None:
        yield lambda output, targets, batch: loss(output, targets)
        return
    with Distiller(accelerator, student, distillation, loss) as distiller:
        yield distiller


class Distiller:
    """The loss of a step: (1 - weight) * loss + weight * KL to the teacher + features.

    Use it as a context: it listens to feature layers while it is entered.

    Args:
        student: the model, as it is without what accelerate wraps around it.
        loss: of the student's whole output and the targets.
    """

    def __init__(
        self, accelerator: Accelerator, student: nn.Module, what: Distillation, loss: Loss
    ) -> None:
        self._accelerator, self._what, self._loss = accelerator, what, loss
        self._reader = BatchReader(what.teacher, "finetune: data for the teacher")
        self._teacher = what.teacher.to(accelerator.device).eval()
        self._features = FeatureMatch(student, what.teacher, what.feature_layers)

    def __enter__(self) -> Distiller:
        self._features.__enter__()
        return self

    def __call__(self, output: Any, targets: Any, batch: Any) -> Tensor:
        """Loss of the student's output; runs the teacher on the batch."""
        weight, temperature = self._what.weight, self._what.temperature
        wanted = self._run_teacher(batch)
        value = logits(output).new_zeros((), dtype=torch.float32)
        if weight > 0.0:
            value = value + weight * temperature**2 * self._divergence(output, wanted, targets)
        if weight < 1.0:
            value = value + (1.0 - weight) * self._loss(output, targets)
        features = self._features.loss()
        return value if features is None else value + self._what.feature_weight * features

    def _run_teacher(self, batch: Any) -> Any:
        inputs = self._reader.training(batch, self._accelerator.device, own_loss=True)
        with torch.no_grad(), self._accelerator.autocast():
            return self._teacher(*inputs.args, **inputs.kwargs)

    def _divergence(self, output: Any, wanted: Any, targets: Any) -> Tensor:
        """KL divergence of softened outputs, a mean over the samples (of tokens: over them)."""
        softened = []
        for each in (output, wanted):
            scores = logits(each).float()
            rows = by_class(scores, each, targets)
            if rows is not scores and isinstance(targets, Tensor):
                rows = rows[targets.flatten() != IGNORED]
            softened.append(F.log_softmax(rows / self._what.temperature, 1))
        return F.kl_div(softened[0], softened[1], log_target=True, reduction="batchmean")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._features.__exit__(kind, error, trace)
