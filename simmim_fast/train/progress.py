"""Progress on the terminal: a bar, or plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol


class Progress(Protocol):
    """Where a run reports to."""

    def advance(self) -> None:
        """One update more."""

    def report(self, row: dict[str, Any]) -> None:
        """New numbers: `step`, `epoch`, `loss`, `lr`, `images_per_second`, `seconds`."""


@contextlib.contextmanager
def open_progress(steps: int) -> Iterator[Progress]:
    """Progress over `steps` updates."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        yield LineProgress(steps)
        return
    bar = BarProgress(steps, console)
    with bar.display:
        yield bar


class LineProgress:
    """One line for each report."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def advance(self) -> None:
        """Prints nothing."""

    def report(self, row: dict[str, Any]) -> None:
        """Prints one line."""
        left = timedelta(seconds=round(row["seconds"] / row["step"] * (self._steps - row["step"])))
        print(f"step {row['step']}/{self._steps}  epoch {row['epoch']:.2f}  {_numbers(row)}  {left} left", flush=True)


class BarProgress:
    """A bar with the latest numbers beside it."""

    def __init__(self, steps: int, console: Any) -> None:
        from rich import progress

        self.display = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            progress.TextColumn("left"),
            console=console,
        )
        self._task = self.display.add_task("starting", total=steps)

    def advance(self) -> None:
        """Moves the bar."""
        self.display.advance(self._task)

    def report(self, row: dict[str, Any]) -> None:
        """Replaces the numbers."""
        self.display.update(self._task, description=_numbers(row))


def _numbers(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} images/s"
