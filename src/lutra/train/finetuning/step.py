"""One training step: forward pass, loss, backward pass, optimiser."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lutra.errors import LutraError
from lutra.train import distributed as collective
from lutra.train.batches import BatchReader, TrainingBatch
from lutra.train.finetuning.batches import Position
from lutra.train.finetuning.distill import StepLoss
from lutra.train.finetuning.faults import bad_input, broken_layer, reached_layer
from lutra.train.finetuning.optimizer import (
    codebook_parameters,
    quantized_layers,
    weight_parameters,
)
from lutra.train.layers.finite import FiniteCheck, NotFiniteError
from lutra.train.layers.pq_reconstruction import reconstruction_loss

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainingStep:
    """Trains a model by a batch.

    NaN and infinity in the inputs of the batch, or on their way into a quantised layer, stop the
    run. On a CPU they do so before anything has moved. On a GPU, which should not wait, and with
    several processes, which must do the same, they are looked for after the forward pass.

    Args:
        model, prepared: the model as it is, and as accelerate prepared it.
        reader: reads batches for the model.
        own_loss: whether the user wrote the loss.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        prepared: nn.Module,
        optimizer: Any,
        loss: StepLoss,
        *,
        reader: BatchReader,
        own_loss: bool,
        clip_norm: float | None,
    ) -> None:
        self._accelerator, self._optimizer = accelerator, optimizer
        self._model, self._prepared = model, prepared
        self._reader, self._loss, self._own_loss = reader, loss, own_loss
        self._clip_norm = clip_norm
        self._early = accelerator.device.type == "cpu" and not collective.active()
        self._holds, self._held = (False, False), list[nn.Parameter]()
        self.check = FiniteCheck(model, wait=not self._early)

    def __enter__(self) -> TrainingStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.check.remove()
        self.hold()

    def hold(self, *, codebooks: bool = False, weights: bool = False) -> None:
        """What stays as it is in the steps that follow: codebooks; what a dense model has too."""
        if (codebooks, weights) == self._holds:
            return
        self._holds = codebooks, weights
        layers = quantized_layers(self._model)
        self._held = codebook_parameters(layers) if codebooks else []
        if weights:
            self._held += weight_parameters(self._model, layers)
        for layer in layers:
            layer.hold_codebooks(codebooks)

    def __call__(self, batch: Any, position: Position) -> float:
        """The loss, a mean over the processes.

        Raises:
            LutraError: inputs, or the loss, are not finite.
        """
        inputs = self._reader.training(batch, self._accelerator.device, own_loss=self._own_loss)
        if self._early:
            self._refuse(self._fault_of_inputs(inputs), position)
        try:
            output = self._prepared(*inputs.args, **inputs.kwargs)
        except NotFiniteError as error:
            self._refuse(str(error), position)
            raise
        value = self._total_loss(output, inputs.targets, batch)
        fault = None if self._early else self._fault(inputs)
        own = math.nan if fault else float(value.detach())
        result = collective.mean(own)
        self._refuse(fault, position)
        if math.isfinite(own) and not math.isfinite(result):
            self._refuse(
                "another process has inputs or a loss that are not finite; see its error", position
            )
        if not math.isfinite(result):
            self._refuse_loss(result, inputs, position)
        self._move(value)
        return result

    def _total_loss(self, output: Any, targets: Any, batch: Any) -> Tensor:
        if isinstance(output, Tensor):
            output = output.float()
        value = self._loss(output, targets, batch)
        reconstruction = reconstruction_loss(self._model)
        return value if reconstruction is None else value + reconstruction

    def _move(self, value: Tensor) -> None:
        self._accelerator.backward(value)
        if self._clip_norm is not None:
            self._accelerator.clip_grad_norm_(self._prepared.parameters(), self._clip_norm)
        for parameter in self._held:
            parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _fault(self, inputs: TrainingBatch) -> str | None:
        """What was not finite in the forward pass that has been."""
        try:
            self.check.verify()
        except NotFiniteError as error:
            return self._fault_of_inputs(inputs) or str(error)
        return self._fault_of_inputs(inputs)

    def _fault_of_inputs(self, inputs: TrainingBatch) -> str | None:
        fault = bad_input(inputs)
        if fault is None:
            return None
        layer = reached_layer(self._model, inputs)
        reached = "" if layer is None else f", and it reaches layer '{layer}'"
        return f"{fault}{reached}; repair the data, or leave such samples out"

    def _refuse(self, fault: str | None, position: Position) -> None:
        if fault is not None:
            raise LutraError(f"finetune: {position}: {fault}") from None

    def _refuse_loss(self, result: float, inputs: TrainingBatch, position: Position) -> None:
        source = ""
        # Layers that talk to other processes cannot run in one alone.
        if not collective.active():
            with self.check.paused():
                found = broken_layer(self._model, inputs, self._accelerator)
            if found is not None:
                source = f", where the output of layer '{found[0]}' is the first with {found[1]}"
        raise LutraError(
            f"finetune: the loss is {result} at step {position.step + 1}; lower lr, or set "
            f"clip_norm; it was batch {position.batch + 1} of epoch {position.epoch + 1}{source}"
        )
