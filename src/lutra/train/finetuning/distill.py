"""Losses against a teacher network: its softened outputs, and the outputs of its inner layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lutra.errors import LutraError

if TYPE_CHECKING:
    from accelerate import Accelerator

Loss = Callable[[Tensor, Tensor], Tensor]


class FeatureMatch:
    """Listens to the outputs of the same layers in student and teacher while it is entered.

    Raises:
        LutraError: layers are named but there is no teacher, or one of the networks lacks a layer.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, layers: Sequence[str]
    ) -> None:
        if layers and teacher is None:
            raise LutraError("finetune: feature_layers needs a teacher")
        self._pairs: list[tuple[nn.Module, nn.Module]] = []
        for name in layers:
            assert teacher is not None
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

    def _keep(self, layer: nn.Module, _: Any, output: Tensor) -> None:
        self._outputs[layer] = output

    def loss(self) -> Tensor | None:
        """Sum over the layers of the relative squared difference; forgets the outputs."""
        total: Tensor | None = None
        for student, teacher in self._pairs:
            got, wanted = self._outputs[student].float(), self._outputs[teacher].float()
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


class Distiller:
    """The loss of a step: (1 - share) * loss + share * KL to the teacher + features."""

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: nn.Module | None,
        share: float,
        temperature: float,
        features: FeatureMatch,
        feature_weight: float,
        loss: Loss,
    ) -> None:
        self._accelerator, self._teacher = accelerator, teacher
        self._share, self._temperature = share, temperature
        self._features, self._feature_weight = features, feature_weight
        self._loss = loss

    def loss(
        self, outputs: Tensor, targets: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Loss of the student's outputs; runs the teacher on the same inputs."""
        if self._teacher is None:
            return self._loss(outputs, targets)
        with torch.no_grad(), self._accelerator.autocast():
            wanted = self._teacher(*args, **kwargs).float()
        value = outputs.new_zeros(())
        if self._share > 0.0:
            value = value + self._share * self._temperature**2 * F.kl_div(
                F.log_softmax(outputs / self._temperature, 1),
                F.log_softmax(wanted / self._temperature, 1),
                log_target=True,
                reduction="batchmean",
            )
        if self._share < 1.0:
            value = value + (1.0 - self._share) * self._loss(outputs, targets)
        features = self._features.loss()
        return value if features is None else value + self._feature_weight * features
