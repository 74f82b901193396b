"""A progress bar on terminals, and nothing elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress:
    """`with Progress("training", 100) as bar: bar.update(done, "loss 0.3")`.

    Args:
        title: what is going on.
        total: steps in all; None if unknown.
        show: None shows the bar if standard error is a terminal.
    """

    def __init__(self, title: str, total: int | None, show: bool | None = None) -> None:
        self._title, self._total = title, total
        self._show = sys.stderr.isatty() if show is None else show
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, note="")
        return self

    def update(self, done: int, note: str = "") -> None:
        """Tells how many steps are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
