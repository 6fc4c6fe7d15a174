"""The folder of a run: made when there is something to put into it, never mixed with another run's."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

import torch
from torch import nn

import simmim_fast
from simmim_fast.train.checkpoint import FOLDER, save_checkpoint
from simmim_fast.train.config import PretrainConfig
from simmim_fast.train.options import dump_config

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
UNREADABLE = "unreadable.txt"
LOSS_PLOT = "loss.png"
PICTURE = "reconstruction.png"


class RunFolder:
    """Writes what a run leaves behind, from its first line of metrics on.

    Args:
        config: The run's configuration; `config.out` is the folder.
        overwrite: Remove the files of the run that the folder holds already, once this one has its first line.

    Raises:
        ValueError: the folder holds a run, is a file, or cannot be written into or made where it is to lie.
    """

    def __init__(self, config: PretrainConfig, *, overwrite: bool = False) -> None:
        self.path = Path(config.out)
        self._config = config
        self._metrics: TextIO | None = None
        place = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not place.is_dir():
            raise ValueError(
                f"out must be a folder, or the name of a new one, got {self.path}, where {place} is a file"
            )
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"out must lie where one may write, got {self.path}, where {place} is read-only")
        if not overwrite and any((self.path / name).exists() for name in (CONFIG, METRICS, FOLDER)):
            raise ValueError(f"out must be a folder without a run, or --overwrite be given, got {self.path}")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl, with floats of six significant digits."""
        if self._metrics is None:
            self._metrics = self._create()
        short = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        self._metrics.write(json.dumps(short) + "\n")
        self._metrics.flush()

    def save(self, model: nn.Module, *, step: int, epoch: float) -> Path:
        """Writes a checkpoint of `model` after update `step`; the newest `config.keep` stay."""
        state = {"step": step, "epoch": epoch, "seed": self._config.seed, "versions": _versions()}
        return save_checkpoint(self.path, model, self._config, state, keep=self._config.keep)

    @contextlib.contextmanager
    def open(self, unreadable: Mapping[str, str]) -> Iterator[Self]:
        """At the end of this block, however it ends, unreadable.txt is written, if there is anything to list.

        Args:
            unreadable: Reason by path of every image that could not be read, as the run fills it.
        """
        try:
            yield self
        finally:
            if self._metrics is not None:
                self._metrics.close()
                self._list_unreadable(unreadable)

    def _list_unreadable(self, unreadable: Mapping[str, str]) -> None:
        if unreadable:
            lines = [f"{path}\t{reason}\n" for path, reason in sorted(unreadable.items())]
            (self.path / UNREADABLE).write_text("".join(lines), encoding="utf-8")

    def _create(self) -> TextIO:
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, METRICS, UNREADABLE, LOSS_PLOT, PICTURE):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / FOLDER, ignore_errors=True)
        (self.path / CONFIG).write_text(dump_config(self._config), encoding="utf-8")
        return (self.path / METRICS).open("w", encoding="utf-8")


def _versions() -> dict[str, str]:
    return {"simmim_fast": simmim_fast.__version__, "torch": torch.__version__, "python": platform.python_version()}
