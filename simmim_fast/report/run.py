"""The pictures of a run: its loss, and what its model makes of photographs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from simmim_fast.data import eval_transform, read_image
from simmim_fast.models import SimMIM
from simmim_fast.report.pictures import Reconstruction, draw_reconstruction, reconstruct
from simmim_fast.report.plots import plot_loss
from simmim_fast.train.build import build_masks, choose_device
from simmim_fast.train.checkpoint import CONFIG, find_checkpoint, load_checkpoint
from simmim_fast.train.config import PretrainConfig
from simmim_fast.train.metrics import read_metrics
from simmim_fast.train.options import read_config
from simmim_fast.train.run import LOSS_PLOT, METRICS


def plot_run(run: str | os.PathLike[str]) -> Path:
    """Draws loss.png into the folder of a run."""
    run = Path(run)
    return plot_loss(read_metrics(run / METRICS), run / LOSS_PLOT, title=str(run))


def reconstruct_images(
    checkpoint: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    seed: int = 0,
    device: str = "auto",
) -> Reconstruction:
    """Lets the model of a checkpoint fill in hidden cells of images, and draws the result.

    Args:
        checkpoint: Folder of a checkpoint, or of a run, whose newest one is taken.
        images: Files; each is resized to cover the model's image size and cropped at the centre.
        path: The PNG file to write, in a folder that exists.
        title: First line of the picture.
        seed: Of the masks. They hide cells as in training.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: no image, one that cannot be read, or no folder for `path`. FileNotFoundError: no checkpoint.
    """
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"out must lie in a folder that exists, got {path}")
    config = read_config(find_checkpoint(checkpoint) / CONFIG)
    model = load_checkpoint(checkpoint).to(choose_device(device))
    batch = _read_batch(images, model, config)
    mask = build_masks(config, model).batch(len(batch), generator=torch.Generator().manual_seed(seed))
    where = next(model.parameters()).device
    result = reconstruct(model, batch.to(where), mask.to(where), mean=config.mean, std=config.std)
    draw_reconstruction(result, path, title=title)
    return result


def _read_batch(images: Sequence[str | os.PathLike[str]], model: SimMIM, config: PretrainConfig) -> Tensor:
    if not images:
        raise ValueError("images must name at least one file, got none")
    transform = eval_transform(model.img_size, channels=model.in_chans, mean=config.mean, std=config.std)
    tensors = []
    for image in images:
        try:
            tensors.append(transform(read_image(image, model.in_chans)))
        except Exception as error:  # Pillow's decoders raise nearly every type on malformed files
            raise ValueError(f"images must be readable, got {image}: {type(error).__name__}: {error}") from error
    return torch.stack(tensors)
