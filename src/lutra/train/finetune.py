"""Fine-tuning of a converted network, on one device or many, resumable.

The loop stands on Hugging Face accelerate: devices, mixed precision, checkpoints and
torch.distributed are its. Under `torchrun` or `accelerate launch` the same script trains on several
processes. A loop of your own works as well: lookup layers are ordinary modules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lutra.errors import LutraError
from lutra.train import checkpoint
from lutra.train.calibrate import model_inputs
from lutra.train.distill import Distiller, FeatureMatch, Loss
from lutra.train.progress import Progress
from lutra.train.seeding import seed_everything, seeded_loader

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did. `history` has an entry per evaluation: step, loss, lr, and metric if any."""

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
        epochs, steps: how long; give one of them.
        lr: learning rate of all parameters but temperatures. temperature_lr: of those (LUT-NN
            takes 100 times lr).
        warmup: steps of linear warm-up.
        loss: of (outputs, targets).
        teacher: network to distil from, for classification: its softened outputs are the targets.
        distillation: weight of the teacher's loss; 1 - distillation is that of `loss`.
        distillation_temperature: softens both outputs.
        feature_layers: module paths whose outputs are drawn to the teacher's as well, by their mean
            squared difference relative to the teacher's mean square, times `feature_weight`.
        clip_norm: largest gradient norm.
        evaluate: called with the model in eval mode every `evaluate_every` steps and at the end.
        batch_norm_batches: training batches whose statistics replace the running ones at the end
            (running averages lag behind moving codebooks).
        checkpoint_dir: where checkpoints go, every `checkpoint_every` steps and at the end; with
            `resume` a run continues from the newest, bit for bit as if it had not stopped (data
            loaders with worker processes: at epoch boundaries).
        mixed_precision: "no", "bf16" or "fp16", as accelerate takes it.
        progress: show a progress bar; None shows it on terminals only.
        accelerator: one of your own instead of a new one.

    Returns:
        Steps, seconds and history. With several processes each returns the same.

    Raises:
        LutraError: unusable settings or data, a checkpoint of other settings, a loss that is not
            finite.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    if (epochs is None) == (steps is None):
        raise LutraError(f"finetune: give epochs or steps, not both (got {epochs=}, {steps=})")
    if teacher is not None and not 0.0 <= distillation <= 1.0:
        raise LutraError(f"finetune: distillation={distillation} is not in 0..1")
    loader, sampler = seeded_loader(data, seed)
    if accelerator is None:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    seed_everything(seed)
    optimizer = torch.optim.Adam(
        _parameter_groups(model, lr, temperature_lr), weight_decay=weight_decay
    )
    run_model, run_optimizer, run_loader = accelerator.prepare(model, optimizer, loader)
    per_epoch = len(run_loader)
    total = steps if steps is not None else math.ceil((epochs or 0) * per_epoch)
    if total < 1:
        raise LutraError(f"finetune: {epochs=}, {steps=} is no training at all")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        run_optimizer.optimizer, lambda s: _cosine(s, total, warmup)
    )
    state = checkpoint.RunState(
        {"steps": total, "lr": lr, "seed": seed, "batch_size": sampler.batch_size,
         "processes": accelerator.num_processes, "batches_per_epoch": per_epoch}
    )  # fmt: skip
    accelerator.register_for_checkpointing(schedule, state)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    if folder is not None and resume:
        found = checkpoint.checkpoints(folder)
        if found:
            accelerator.load_state(str(found[-1]))
    if teacher is not None:
        teacher = teacher.to(accelerator.device).eval()

    features = FeatureMatch(accelerator.unwrap_model(run_model), teacher, feature_layers)
    distiller = Distiller(
        accelerator, teacher, distillation, distillation_temperature, features, feature_weight, loss
    )
    start = time.perf_counter()
    with features, Progress("fine-tuning", total, progress and accelerator.is_main_process) as bar:
        while state.step < total:
            sampler.epoch, sampler.skip = divmod(state.step, per_epoch)
            sampler.skip *= accelerator.num_processes
            for batch in run_loader:
                run_model.train()
                value = _step(
                    accelerator, run_model, run_optimizer, batch, distiller, clip_norm, state.step
                )
                schedule.step()
                state.step += 1
                bar.update(state.step, f"loss {value:.3f}")
                last = state.step == total
                if last and batch_norm_batches:
                    _renew_batch_norm(run_model, run_loader, batch_norm_batches, accelerator)
                if evaluate and (last or (evaluate_every and state.step % evaluate_every == 0)):
                    rate = float(schedule.get_last_lr()[0])
                    entry = {"step": float(state.step), "loss": value, "lr": rate}
                    entry["metric"] = _evaluate(accelerator.unwrap_model(run_model), evaluate)
                    state.history.append(entry)
                if folder is not None and (
                    last or (checkpoint_every and state.step % checkpoint_every == 0)
                ):
                    checkpoint.save(accelerator, folder, state.step)
                if last:
                    break
    accelerator.unwrap_model(run_model, keep_fp32_wrapper=False)  # the model is the caller's again
    return FinetuneReport(state.step, time.perf_counter() - start, tuple(state.history))


def _parameter_groups(model: nn.Module, lr: float, temperature_lr: float) -> list[dict[str, Any]]:
    temperatures, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hot = name.endswith("inverse_temperature_logit")
            (temperatures if hot else others).append(parameter)
    groups = [{"params": others, "lr": lr}, {"params": temperatures, "lr": temperature_lr}]
    return [group for group in groups if group["params"]]


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
    result = float(value.detach())
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
    """Calls back in eval mode, without disturbing the random numbers of training."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _full_precision(model):
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            return float(evaluate(model))
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """Takes off, for a while, the autocasting forward that accelerate puts over the model's own."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.__dict__["forward"] = wrapped


@torch.no_grad()
def _renew_batch_norm(
    model: nn.Module, data: Any, batches: int, accelerator: Accelerator
) -> None:
    """Replaces running statistics by the plain average over some training batches.

    Only the normalisation layers are in training mode, so nothing else moves.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    plain = accelerator.unwrap_model(model)
    with _full_precision(plain):
        for i, batch in enumerate(data):
            if i == batches:
                break
            args, kwargs = model_inputs(batch, accelerator.device)
            plain(*args, **kwargs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if accelerator.num_processes > 1 and layer.running_mean is not None:
            for statistic in (layer.running_mean, layer.running_var):
                assert statistic is not None
                statistic.copy_(accelerator.reduce(statistic, "mean"))
