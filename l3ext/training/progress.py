"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_LINE_EVERY_S = 15.0


class TrainProgress:
    """Shows step, loss and tokens/s of a run; nothing at all with ``enabled=False``."""

    def __init__(self, *, total_steps: int, done: int, label: str, enabled: bool) -> None:
        self._total = total_steps
        self._label = label
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._done = done
        self._next_line = time.monotonic() + _LINE_EVERY_S

    def __enter__(self) -> TrainProgress:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps  {task.fields[status]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._label, total=self._total, completed=self._done, status=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        """Show that ``step`` steps are done."""
        status = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif self._enabled and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY_S
            print(f"{self._label}: step {step}/{self._total}  {status}", file=sys.stderr)
