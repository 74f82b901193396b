"""Fine-tuning of a converted network, on one device or many, resumable.

The loop stands on Hugging Face accelerate: devices, mixed precision, checkpoints and
torch.distributed are its. Under `torchrun` or `accelerate launch` the same script trains on several
processes. A loop of your own works as well: lookup layers are ordinary modules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lutra.errors import LutraError
from lutra.train import distributed as collective
from lutra.train.conversion.calibrate import model_inputs
from lutra.train.finetuning import checkpoint
from lutra.train.finetuning.accelerate import accelerator_for, unmarked, unwrapped
from lutra.train.finetuning.distill import Distiller, FeatureMatch, Loss
from lutra.train.finetuning.seeding import MODEL_STREAM, seed_everything, seeded_loader
from lutra.train.layers.lookup import LookupLayer
from lutra.train.layers.lookup_table import Response
from lutra.train.layers.pq_reconstruction import reconstruction_loss
from lutra.train.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    lr: float = 1e-3,
    temperature_lr: float = 0.1,
    table_lr: float | None = None,
    warmup: int = 0,
    weight_decay: float = 0.0,
    loss: Loss = F.cross_entropy,
    teacher: nn.Module | None = None,
    distillation: float = 1.0,
    distillation_temperature: float = 4.0,
    feature_layers: Sequence[str] = (),
    feature_weight: float = 1.0,
    clip_norm: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    evaluate_every: int | None = None,
    batch_norm_batches: int = 0,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    mixed_precision: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
    accelerator: Accelerator | None = None,
) -> FinetuneReport:
    """Trains all parameters of `model` in place: Adam, cosine schedule to zero.

    Args:
        model: a converted model.
        data: batches (inputs, targets) over a map-style data set; its order and random numbers are
            reseeded from `seed`, epoch and batch, so that a resumed run sees the same.
        epochs: passes over the data; give these or `steps`.
        steps: training steps, one for each batch.
        lr: learning rate of all parameters but temperatures.
        temperature_lr: learning rate of temperatures (LUT-NN takes 100 times lr).
        table_lr: learning rate of the tables and scales of lookup layers; None takes lr. Where lr
            is small (1e-4), they need more.
        warmup: steps of linear warm-up.
        weight_decay: of all parameters but the tables and scales of lookup layers.
        loss: of (outputs, targets).
        teacher: network to distil from, for classification: its softened outputs are the targets.
        distillation: weight of the teacher's loss; 1 - distillation is that of `loss`.
        distillation_temperature: softens both outputs.
        feature_layers: module paths whose outputs are drawn to the teacher's as well, by their mean
            squared difference relative to the teacher's mean square, times `feature_weight`.
        clip_norm: largest gradient norm.
        evaluate: called with the model in eval mode and full precision every `evaluate_every` steps
            and at the end; in every process, and the metric is the mean of what they return.
        batch_norm_batches: training batches whose statistics replace the running ones at the end
            (running averages lag behind moving codebooks).
        checkpoint_dir: where checkpoints go, every `checkpoint_every` steps and at the end; with
            `resume` a run continues from the newest, bit for bit as if it had not stopped (data
            loaders with worker processes: at epoch boundaries). Without, it starts over and
            replaces what is there.
        mixed_precision: "no", "bf16" or "fp16", as accelerate takes it. The parameters stay float32
            and the lookups exact.
        progress: show a progress bar; None shows it on terminals only.
        accelerator: one of your own instead of a new one.

    Returns:
        Steps, seconds and history. With several processes each returns the same.

    Raises:
        LutraError: unusable settings or data, a checkpoint of other settings, a loss that is not
            finite.

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
    if teacher is not None and not 0.0 <= distillation <= 1.0:
        raise LutraError(f"finetune: distillation={distillation} is not in 0..1")
    if seed < 0:
        raise LutraError(f"finetune: seed={seed} is negative; give 0 or more")
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    if folder is not None:
        checkpoint.create_folder(folder)
    loader, sampler = seeded_loader(data, seed)
    table_lr = lr if table_lr is None else table_lr
    groups = _parameter_groups(model, lr, temperature_lr, table_lr, weight_decay)
    with accelerator_for(accelerator, mixed_precision) as accelerator, unmarked(model, teacher):
        seed_everything(seed)
        optimizer = torch.optim.Adam(groups)
        run_model, run_optimizer, run_loader = accelerator.prepare(model, optimizer, loader)
        per_epoch = len(run_loader)
        total = steps if steps is not None else math.ceil((epochs or 0) * per_epoch)
        if total < 1 or per_epoch < 1:
            raise LutraError(
                f"finetune: {epochs=}, {steps=} with {per_epoch} batches per epoch is no training "
                "at all"
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            run_optimizer.optimizer, lambda s: _cosine(s, total, warmup)
        )
        accelerator.register_for_checkpointing(schedule)
        run = checkpoint.RunState(
            {
                "steps": total,
                "lr": lr,
                "temperature_lr": temperature_lr,
                "table_lr": table_lr,
                "warmup": warmup,
                "weight_decay": weight_decay,
                "distillation": None if teacher is None else distillation,
                "distillation_temperature": None if teacher is None else distillation_temperature,
                "feature_layers": list(feature_layers),
                "feature_weight": feature_weight,
                "clip_norm": clip_norm,
                "batch_norm_batches": batch_norm_batches,
                "mixed_precision": str(accelerator.mixed_precision),
                "seed": seed,
                "batch_size": sampler.batch_size,
                "batches_per_epoch": per_epoch,
                "processes": accelerator.num_processes,
            }
        )
        found = checkpoint.checkpoints(folder) if folder is not None and resume else []
        if found:
            checkpoint.load(accelerator, found[-1], run)
        if teacher is not None:
            teacher = teacher.to(accelerator.device).eval()
        features = FeatureMatch(accelerator.unwrap_model(run_model), teacher, feature_layers)
        distiller = Distiller(
            accelerator, teacher, distillation, distillation_temperature, features,
            feature_weight, loss,
        )  # fmt: skip
        start = time.perf_counter()
        show = progress if accelerator.is_main_process else False
        with features, Progress("fine-tuning", total, show) as bar:
            while run.step < total:
                sampler.epoch, done = divmod(run.step, per_epoch)
                batches = accelerator.skip_first_batches(run_loader, done) if done else run_loader
                seed_everything(seed, sampler.epoch)
                for index, batch in enumerate(batches, done):
                    # For dropout and the like; a stream of its own, as batches are drawn ahead.
                    seed_everything(
                        seed, sampler.epoch, index + 1, accelerator.process_index, MODEL_STREAM
                    )
                    run_model.train()
                    _anneal(model, run.step / total)
                    value = _step(
                        accelerator, run_model, run_optimizer, batch, distiller, clip_norm, run.step
                    )
                    schedule.step()
                    run.step += 1
                    bar.update(run.step, f"loss {value:.3f}")
                    last = run.step == total
                    _anneal(model, run.step / total)
                    evaluated = last or _due(run.step, evaluate_every)
                    saved = folder is not None and (last or _due(run.step, checkpoint_every))
                    if last and batch_norm_batches:
                        _renew_batch_norm(run_model, run_loader, batch_norm_batches, accelerator)
                    if evaluated or saved:
                        _average_batch_norm(run_model)
                    if evaluated:
                        rate = float(schedule.get_last_lr()[0])
                        entry = {"step": float(run.step), "loss": value, "lr": rate}
                        if evaluate is not None:
                            current = accelerator.unwrap_model(run_model)
                            entry["metric"] = _evaluate(current, evaluate)
                        run.history.append(entry)
                    if saved:
                        assert folder is not None
                        checkpoint.save(accelerator, folder, run)
                    if last:
                        break
        return FinetuneReport(run.step, time.perf_counter() - start, tuple(run.history))


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % (every or 1) == 0


def _anneal(model: nn.Module, progress: float) -> None:
    """Sets the temperature of every response table."""
    for module in model.modules():
        if isinstance(module, Response):
            module.anneal(progress)


def _parameter_groups(
    model: nn.Module, lr: float, temperature_lr: float, table_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    spared = {
        parameter
        for layer in model.modules()
        if isinstance(layer, LookupLayer)
        for parameter in layer.table_parameters()
    }
    temperatures: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hot = name.endswith("inverse_temperature_logit")
            (temperatures if hot else tables if parameter in spared else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": temperatures, "lr": temperature_lr, "weight_decay": weight_decay},
        {"params": tables, "lr": table_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise LutraError("finetune: no parameter of the model requires a gradient")
    return groups


def _cosine(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    batch: Any,
    distiller: Distiller,
    clip_norm: float | None,
    step: int,
) -> float:
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise LutraError("finetune: a batch must be a tuple (inputs, targets)")
    args, kwargs = model_inputs(batch, accelerator.device)
    targets = batch[1].to(accelerator.device)
    value = distiller.loss(model(*args, **kwargs).float(), targets, args, kwargs)
    reconstruction = reconstruction_loss(model)
    if reconstruction is not None:
        value = value + reconstruction
    result = collective.mean(float(value.detach()))
    if not math.isfinite(result):
        raise LutraError(
            f"finetune: the loss is {result} at step {step + 1}; lower lr, or set clip_norm"
        )
    accelerator.backward(value)
    if clip_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return result


def _evaluate(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    """Calls back in eval mode; the mean over the processes, each of which calls back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), unwrapped(model):
            return collective.mean(float(evaluate(model)))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def _average_batch_norm(model: nn.Module) -> None:
    """Makes running statistics, which every process gathers alone, the same everywhere.

    Their averages move linearly, so that it does not matter how often this is done.
    """
    if not collective.active():
        return
    processes = torch.distributed.get_world_size()
    for layer in _batch_norms(model):
        for statistic in (layer.running_mean, layer.running_var):
            if statistic is not None:
                collective.all_reduce(statistic).div_(processes)


@torch.no_grad()
def _renew_batch_norm(model: nn.Module, data: Any, batches: int, accelerator: Accelerator) -> None:
    """Replaces running statistics by the plain average over some training batches.

    Only the normalisation layers are in training mode, so nothing else moves.
    """
    layers = _batch_norms(model)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    plain = accelerator.unwrap_model(model)
    with unwrapped(plain):
        for i, batch in enumerate(data):
            if i == batches:
                break
            args, kwargs = model_inputs(batch, accelerator.device)
            plain(*args, **kwargs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
