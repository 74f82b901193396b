"""Checkpoints of a fine-tuning run: written whole or not at all, the newest two are kept."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutra.errors import LutraError

if TYPE_CHECKING:
    from accelerate import Accelerator

KEEP = 2
_NAME = re.compile(r"step-(\d{9})")
_TEMPORARY = "incomplete-"
_RUN = "run.json"


def _worth_saying(record: logging.LogRecord) -> bool:
    """Not accelerate's warning that shared tensors are saved once: layers may share codebooks."""
    return "Removed shared tensor" not in record.getMessage()


logging.getLogger("accelerate.utils.other").addFilter(_worth_saying)


@dataclass
class RunState:
    """Where a run stands. `settings` are JSON values: everything that decides its result.

    `epoch` and `begun`, the step at which it began, are of data whose epochs have no known length.
    """

    settings: dict[str, Any]
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    epoch: int = 0
    begun: int = 0


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def create_folder(folder: Path) -> None:
    """Makes the folder for checkpoints.

    Raises:
        LutraError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LutraError(
            f"finetune: cannot create checkpoint_dir {folder} ({error.strerror}); choose a folder "
            "that can be written"
        ) from None


def resume(accelerator: Accelerator, folder: Path, run: RunState) -> None:
    """Continues at the newest checkpoint of a folder, if there is one; see `load`."""
    found = checkpoints(folder)
    if found:
        load(accelerator, found[-1], run)


def load(accelerator: Accelerator, path: Path, run: RunState) -> None:
    """Continues at a checkpoint: sets `run` and all that `accelerator` has prepared.

    Raises:
        LutraError: the checkpoint is of other settings or of another model, or damaged. With other
            settings the model is not changed.
    """
    try:
        saved = json.loads((path / _RUN).read_text(encoding="utf-8"))
        settings, step, history = saved["settings"], int(saved["step"]), list(saved["history"])
        epoch, begun = int(saved.get("epoch", 0)), int(saved.get("begun", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LutraError(
            f"finetune: the checkpoint {path} cannot be read ({error!r}); delete it"
        ) from None
    for name, value in run.settings.items():
        if settings.get(name) != value:
            raise LutraError(
                f"finetune: the checkpoint {path} was made with {name}={settings.get(name)!r}, "
                f"this run has {name}={value!r}; use the same settings, or another checkpoint_dir"
            )
    try:
        accelerator.load_state(str(path))
    except Exception as error:  # from safetensors, pickle, torch and accelerate
        reason = str(error).partition("\n")[0]
        raise LutraError(
            f"finetune: the checkpoint {path} does not fit this model, or is damaged ({reason}); "
            "use the same model, or another checkpoint_dir"
        ) from error
    run.step, run.history = step, history
    run.epoch, run.begun = epoch, begun


def save(accelerator: Accelerator, folder: Path, run: RunState) -> None:
    """Writes a checkpoint under a temporary name, renames it and drops those that are too many.

    Raises:
        LutraError: the checkpoint cannot be written; nothing is left of it then.
    """
    target = folder / f"step-{run.step:09d}"
    temporary = folder / f"{_TEMPORARY}{run.step:09d}"
    try:
        if accelerator.is_main_process:
            for stale in folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(stale)
            temporary.mkdir(parents=True)
            (temporary / _RUN).write_text(json.dumps(vars(run)), encoding="utf-8")
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
            _prune(folder, target)
    except BaseException as error:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise LutraError(
                f"finetune: cannot write the checkpoint {target} ({error.strerror or error}); "
                "free some space, or choose another checkpoint_dir"
            ) from error
        raise
    accelerator.wait_for_everyone()


def _prune(folder: Path, newest: Path) -> None:
    """Keeps the last of a run up to `newest`; later ones are of a run that was started over."""
    found = checkpoints(folder)
    earlier = [path for path in found if path <= newest]
    for path in found:
        if path not in earlier[-KEEP:]:
            shutil.rmtree(path, ignore_errors=True)
