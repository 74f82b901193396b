"""Checkpoints of a fine-tuning run: written whole or not at all, the newest two are kept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutra.errors import LutraError

if TYPE_CHECKING:
    from accelerate import Accelerator

KEEP = 2
_NAME = re.compile(r"step-(\d{9})$")


class RunState:
    """Where a run stands; saved and loaded with the checkpoint."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.step = 0
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings, "step": self.step, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.settings.items():
            saved = state["settings"].get(name)
            if saved != value:
                raise LutraError(
                    f"finetune: the checkpoint was made with {name}={saved!r}, this run has "
                    f"{name}={value!r}; use the same settings, or another checkpoint_dir"
                )
        self.step = int(state["step"])
        self.history = [dict(entry) for entry in state["history"]]


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.iterdir() if _NAME.search(p.name)] if folder.is_dir() else []
    return sorted(found)


def save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Writes checkpoint `step` under a temporary name, renames it and drops the oldest."""
    target, temporary = folder / f"step-{step:09d}", folder / f"incomplete-{step:09d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
