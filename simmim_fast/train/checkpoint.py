"""Checkpoints: one folder per step, complete or absent.

    checkpoints/step-000123/
        model.safetensors   the weights, under the official state-dict keys
        config.yaml         the run's configuration: enough to build the model again
        state.json          step, epoch, seed and the versions of the packages

A checkpoint is written into a hidden folder beside its place, flushed to the disk and renamed, so that no crash leaves
half of one under its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from simmim_fast.models import SimMIM
from simmim_fast.train.build import build_model
from simmim_fast.train.config import PretrainConfig
from simmim_fast.train.options import dump_config, read_config

FOLDER = "checkpoints"
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
STATE = "state.json"


def save_checkpoint(
    out: Path, model: nn.Module, config: PretrainConfig, state: dict[str, Any], *, keep: int | None = None
) -> Path:
    """Writes `out`/checkpoints/step-<state["step"]> and removes the oldest beyond `keep`.

    Args:
        out: Folder of the run.
        model: Module whose state dict is saved, its dtypes included.
        config: Configuration that builds the model again.
        state: JSON-serialisable description of the point in training; has an integer `step`.
        keep: Number of newest checkpoints that stay; None keeps all.
    """
    place = out / FOLDER / f"step-{state['step']:06d}"
    with _written_whole(place) as folder:
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(dump_config(config))
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
    if keep is not None:
        for old in list_checkpoints(out)[:-keep]:
            shutil.rmtree(old)
    return place


def list_checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((out / FOLDER).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint at `path`, or the newest one of the run at `path`.

    Raises:
        FileNotFoundError: `path` is neither a checkpoint nor a run with one.
    """
    path = Path(path)
    found = [path] if (path / WEIGHTS).is_file() else list_checkpoints(path)
    if not found:
        raise FileNotFoundError(f"expected a checkpoint folder, or the folder of a run that has one, got {path}")
    return found[-1]


def load_checkpoint(path: str | os.PathLike[str]) -> SimMIM:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        path: Checkpoint folder, or folder of a run, whose newest checkpoint is taken.

    Raises:
        FileNotFoundError: `path` holds no checkpoint.
        RuntimeError: the weights do not fit the configuration.
    """
    path = find_checkpoint(path)
    model = build_model(read_config(path / CONFIG))
    model.load_state_dict(load_file(path / WEIGHTS))
    return model.eval()


@contextlib.contextmanager
def _written_whole(place: Path) -> Iterator[Path]:
    """A fresh folder that becomes `place`, whose older version it replaces, once the block has ended well."""
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=place.parent))
    try:
        yield folder
        for file in (*folder.iterdir(), folder):
            _flush(file)
        if place.exists():
            shutil.rmtree(place)
        os.replace(folder, place)
        _flush(place.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
