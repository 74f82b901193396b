"""Fine-tuning of a converted network, on one device or many, resumable.

The loop stands on Hugging Face accelerate: devices, mixed precision, checkpoints and
torch.distributed are its. Under `torchrun` or `accelerate launch` the same script trains on several
processes. A loop of your own works as well: lookup layers are ordinary modules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lutra.errors import LutraError
from lutra.train import distributed as collective
from lutra.train.batches import BatchReader
from lutra.train.finetuning import checkpoint
from lutra.train.finetuning.accelerate import accelerator_for, unmarked, unwrapped
from lutra.train.finetuning.average import Average
from lutra.train.finetuning.batch_norm import (
    average_batch_norm,
    freeze_batch_norm,
    renew_batch_norm,
)
from lutra.train.finetuning.batches import training_batches
from lutra.train.finetuning.distill import step_loss
from lutra.train.finetuning.optimizer import parameter_groups, quantized_layers
from lutra.train.finetuning.outputs import Loss, default_loss
from lutra.train.finetuning.seeding import Order, seed_everything, seeded_loader
from lutra.train.finetuning.settings import (
    Checkpoints,
    Distillation,
    Keywords,
    Schedule,
    Settings,
)
from lutra.train.finetuning.step import TrainingStep
from lutra.train.modes import evaluating
from lutra.train.progress import Progress
from lutra.train.threads import StepThreads

if TYPE_CHECKING:
    from accelerate import Accelerator
    from typing_extensions import Unpack


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did. `history` has an entry per evaluation: step, loss, lr, and metric if any.

    With several processes loss and metric are means over them.
    """

    steps: int
    seconds: float
    history: tuple[dict[str, float], ...]


def finetune(
    model: nn.Module,
    data: DataLoader[Any],
    *,
    epochs: float | None = None,
    steps: int | None = None,
    schedule: Schedule | None = None,
    loss: Loss = F.cross_entropy,
    distillation: Distillation | float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    evaluate_every: int | None = None,
    batch_norm_batches: int = 0,
    checkpoints: Checkpoints | None = None,
    mixed_precision: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
    accelerator: Accelerator | None = None,
    **keywords: Unpack[Keywords],
) -> FinetuneReport:
    """Trains all parameters of `model` in place: Adam, cosine schedule to zero.

    Where a step is small, PyTorch computes it with one thread, which is faster.

    NaN or infinity in the inputs of a batch, or on its way into a quantised layer, which would make
    a number of it, stops the run. The error names the batch and the layer.

    Args:
        model: a converted model.
        data: batches. Tuples `(inputs, targets)`, or with several inputs `(a, b, targets)`: the
            last entry is the target, and with it those that `forward` does not take. Or mappings,
            dicts and those of transformers: arguments by name, and targets in `labels`; a model
            that takes `labels` gets them as well. Without `labels` the whole mapping is the target.
            `lutra.train.batches.BatchReader` has the rules. Order and random numbers are reseeded
            from `seed`, epoch and batch, so that a resumed run sees the same. An iterable data set
            needs `steps`; it must begin in the same way each time.
        epochs: passes over the data; give these or `steps`.
        steps: training steps, one for each batch.
        schedule: learning rates, warm-up, weight decay and clipping.
        loss: of the whole output and the targets. Left at its default, it is the loss that the
            model returns if it returns one, as transformers do for `labels`, and the cross entropy
            of the output's scores if not. Scores are a tensor, the output's `logits`, or its first
            tensor; classes are on axis 1, or on the last one where the targets say so.
        distillation: a teacher to learn from. It is for classification: its softened scores are
            targets.
        evaluate: called with the model in eval mode and full precision every `evaluate_every` steps
            and at the end; in every process, and the metric is the mean of what they return.
        batch_norm_batches: training batches whose statistics replace the running ones at the end
            (running averages lag behind moving codebooks).
        checkpoints: where the run keeps its state, and whether it continues from there.
        mixed_precision: "no", "bf16" or "fp16", as accelerate takes it. The parameters stay float32
            and the lookups exact.
        progress: show a progress bar; None shows it on terminals only.
        accelerator: one of your own instead of a new one.
        keywords: the fields of `Schedule` by their names, and those of the others as `teacher`,
            `distillation` (the weight), `distillation_temperature`, `feature_layers`,
            `feature_weight`, `checkpoint_dir`, `checkpoint_every` and `resume`.

    Returns:
        Steps, seconds and history. With several processes each returns the same.

    Raises:
        LutraError: unusable settings or data, a checkpoint of other settings, inputs or a loss that
            are not finite.

    Examples:
        >>> import torch
        >>> from lutra.train import finetune
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> x = torch.rand(64, 4)
        >>> data = DataLoader(TensorDataset(x, (x[:, 0] > 0.5).long()), batch_size=16)
        >>> model = torch.nn.Linear(4, 2)  # or what `convert` returned
        >>> finetune(model, data, epochs=2, lr=1e-2).steps
        8
    """
    if (epochs is None) == (steps is None):
        raise LutraError(f"finetune: give either epochs or steps (got {epochs=}, {steps=})")
    settings = Settings.of(schedule, distillation, checkpoints, keywords)
    if seed < 0:
        raise LutraError(f"finetune: seed={seed} is negative; give 0 or more")
    places = settings.checkpoints
    folder = None if places is None else Path(places.folder)
    if folder is not None:
        checkpoint.create_folder(folder)
    own_loss = loss is not F.cross_entropy
    loader, order = seeded_loader(data, seed)
    groups = parameter_groups(model, settings.schedule)
    teacher = None if settings.distillation is None else settings.distillation.teacher
    with accelerator_for(accelerator, mixed_precision) as accelerator, unmarked(model, teacher):
        seed_everything(seed)
        reader = BatchReader(model, "finetune: data")
        prepared, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(groups), loader)
        order.measure(loader, accelerator.num_processes)
        total = _total(epochs, steps, order)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer.optimizer, lambda step: settings.schedule.factor(step, total)
        )
        average = Average(model, settings.schedule.average)
        accelerator.register_for_checkpointing(rates)
        if settings.schedule.average is not None:
            accelerator.register_for_checkpointing(average)
        run = checkpoint.RunState(
            {
                **settings.to_json(),
                "steps": total,
                "batch_norm_batches": batch_norm_batches,
                "mixed_precision": str(accelerator.mixed_precision),
                "seed": seed,
                "batch_size": order.batch_size,
                "batches_per_epoch": order.length,
                "processes": accelerator.num_processes,
            }
        )
        if places is not None and places.resume:
            checkpoint.resume(accelerator, Path(places.folder), run)
        start = time.perf_counter()
        show = progress if accelerator.is_main_process else False
        with (
            step_loss(
                accelerator, model, settings.distillation, loss if own_loss else default_loss
            ) as losses,
            TrainingStep(
                accelerator, model, prepared, optimizer, losses,
                reader=reader, own_loss=own_loss, clip_norm=settings.schedule.clip_norm,
            ) as step,
            Progress("fine-tuning", total, show) as bar,
            StepThreads(model) as threads,
        ):  # fmt: skip
            for batch, position in training_batches(accelerator, loader, order, run, total, seed):
                threads.fit(batch)
                prepared.train()
                done, schedule = run.step / total, settings.schedule
                if done < schedule.frozen_batch_norm:
                    freeze_batch_norm(model)
                step.hold(
                    codebooks=done >= 1.0 - schedule.frozen_codebooks,
                    weights=done < schedule.frozen_weights,
                )
                _anneal(model, done)
                value = step(batch, position)
                rates.step()
                average.update()
                run.step += 1
                bar.update(run.step, f"loss {value:.3f}")
                _anneal(model, run.step / total)
                last = run.step == total
                evaluated = last or _due(run.step, evaluate_every)
                saved = places is not None and (last or _due(run.step, places.every))
                if not (evaluated or saved):
                    continue
                with step.check.paused():
                    if last:
                        average.settle()
                    if last and batch_norm_batches:
                        renew_batch_norm(
                            model, loader, batch_norm_batches, reader, accelerator.device
                        )
                    average_batch_norm(model)
                    if evaluated:
                        entry = {"step": float(run.step), "loss": value}
                        entry["lr"] = float(rates.get_last_lr()[0])
                        if evaluate is not None:
                            with average.applied():
                                entry["metric"] = _evaluate(model, evaluate)
                        run.history.append(entry)
                    if saved and folder is not None:
                        checkpoint.save(accelerator, folder, run)
        return FinetuneReport(run.step, time.perf_counter() - start, tuple(run.history))


def _total(epochs: float | None, steps: int | None, order: Order) -> int:
    """Steps of a run."""
    if order.length is None and epochs is not None:
        raise LutraError(
            f"finetune: {epochs=}, but an iterable data set has no known length; give steps"
        )
    total = steps if steps is not None else math.ceil((epochs or 0) * (order.length or 0))
    if total < 1 or order.length == 0:
        raise LutraError(
            f"finetune: {epochs=}, {steps=} with {order.length} batches per epoch is no training "
            "at all"
        )
    return total


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % (every or 1) == 0


def _anneal(model: nn.Module, progress: float) -> None:
    for layer in quantized_layers(model):
        layer.anneal(progress)


def _evaluate(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    """Calls back in eval mode; the mean over the processes, each of which calls back."""
    with evaluating(model), torch.no_grad(), unwrapped(model):
        return collective.mean(float(evaluate(model)))
