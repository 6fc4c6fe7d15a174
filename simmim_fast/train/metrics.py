"""The numbers of a run: read off the device seldom, written as metrics.jsonl, one JSON object a line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Readings:
    """Losses and gradient norms of the updates since the last reading; they stay on the device until `read`."""

    def __init__(self, images_per_update: int) -> None:
        self._images_per_update = images_per_update
        self._scalars: list[Tensor] = []
        self._start = self._last = time.perf_counter()
        self._waited = 0.0

    def waiting(self, updates: Iterable[T]) -> Iterator[T]:
        """Passes the updates on and counts the time that each one was waited for."""
        updates = iter(updates)
        while True:
            start = time.perf_counter()
            try:
                update = next(updates)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield update

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Keeps two scalars of one update."""
        self._scalars += [loss, grad_norm]

    def read(self, step: int) -> dict[str, float]:
        """Waits for the device and describes the updates since the last reading, of which `step` is the last.

        Returns:
            Means of `loss` and `grad_norm`, `images_per_second`, `data_wait` (share of the time that went by waiting
            for images), and `seconds` since the start.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; the message names the first such step.
        """
        losses, norms = torch.stack([scalar.double() for scalar in self._scalars]).cpu().view(-1, 2).unbind(1)
        first = step - len(losses) + 1
        for number, (loss, norm) in enumerate(zip(losses.tolist(), norms.tolist(), strict=True), first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(
                    f"step {number}: expected a finite loss and gradient, got loss {loss} and gradient norm {norm}"
                )
        now = time.perf_counter()
        elapsed = now - self._last
        row = {
            "loss": losses.mean().item(),
            "grad_norm": norms.mean().item(),
            "images_per_second": len(losses) * self._images_per_update / elapsed,
            "data_wait": self._waited / elapsed,
            "seconds": now - self._start,
        }
        self._scalars, self._last, self._waited = [], now, 0.0
        return row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
