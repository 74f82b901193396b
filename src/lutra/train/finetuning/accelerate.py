"""Hugging Face accelerate for the time of one run, leaving nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from lutra.errors import LutraError

if TYPE_CHECKING:
    from accelerate import Accelerator

# What accelerate sets on the model itself. Left there, it would keep the model in mixed precision
# and keep a second run from preparing it.
_MARKS = ("forward", "_original_forward", "_is_accelerate_prepared")


@contextmanager
def accelerator_for(
    given: Accelerator | None, mixed_precision: str | None
) -> Iterator[Accelerator]:
    """The user's accelerator, or a new one.

    A process has one accelerator state. It is cleared after the run, so that the next run may use
    another precision, unless it was there before.

    Raises:
        LutraError: the precision is unknown, cannot be had here, or the process has another.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs

    if given is not None:
        if mixed_precision not in (None, given.mixed_precision):
            raise LutraError(
                f"finetune: mixed_precision={mixed_precision!r} contradicts that of the given "
                f"accelerator, {given.mixed_precision!r}; leave mixed_precision out"
            )
        yield given
        return
    found = is_initialized()
    if found and mixed_precision not in (None, AcceleratorState().mixed_precision):
        raise LutraError(
            f"finetune: mixed_precision={mixed_precision!r} differs from that of the accelerator "
            f"this process already has, {AcceleratorState().mixed_precision!r}; leave it out, or "
            "make that accelerator with the same"
        )
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            # Each process reads an iterable data set itself: batches may be of any structure.
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
            # Lookup layers and `finetune` keep the buffers of all processes equal.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except (ValueError, ImportError) as error:
        if not found:
            AcceleratorState._reset_state()
        reason = str(error).partition("\n")[0]
        raise LutraError(f"finetune: mixed_precision={mixed_precision!r}: {reason}") from None
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        if not found:
            AcceleratorState._reset_state()


@contextmanager
def unmarked(*models: nn.Module | None) -> Iterator[None]:
    """Restores the mode of every module, and what accelerate changes on the models, at the end."""
    known = [model for model in models if model is not None]
    modes = {module: module.training for model in known for module in model.modules()}
    before = [{name: value for name, value in vars(m).items() if name in _MARKS} for m in known]
    try:
        yield
    finally:
        for model, marks in zip(known, before, strict=True):
            for name in _MARKS:
                vars(model).pop(name, None)
            vars(model).update(marks)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Takes off, for a while, what accelerate put on a model: it computes in full precision."""
    marks = {name: vars(model).pop(name) for name in _MARKS if name in vars(model)}
    original = marks.get("_original_forward", marks.get("forward"))
    if original is not None and getattr(original, "__func__", None) is not type(model).forward:
        vars(model)["forward"] = original  # the user's own, set on the instance
    try:
        yield
    finally:
        vars(model).update(marks)
