"""From a configuration to the parts of a run: device, model, masks, images."""

from __future__ import annotations

import os

import torch

from simmim_fast._arguments import renamed
from simmim_fast.data import ImageFolder, pretrain_transform
from simmim_fast.masking import MaskGenerator
from simmim_fast.models import SimMIM, create_model
from simmim_fast.train.config import PretrainConfig

MOST_WORKERS = 8


def choose_device(name: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda".

    Raises:
        ValueError: "cuda" where torch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto on this machine, where torch sees no GPU, got cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def build_model(config: PretrainConfig) -> SimMIM:
    """The model, freshly initialised. Errors are those of `create_model`."""
    img_size = {} if config.img_size is None else {"img_size": config.img_size}
    names = {name: f"model_args.{name}" for name in config.model_args if name not in img_size}
    with renamed({**names, "encoder": "model"}):
        return create_model(config.model, **{**config.model_args, **img_size})


def build_masks(config: PretrainConfig, model: SimMIM) -> MaskGenerator:
    """The masks that fit the model. Errors are those of `MaskGenerator`."""
    with renamed({"input_size": "img_size"}):
        return MaskGenerator(
            model.img_size,
            config.mask_patch_size,
            model.patch_size,
            config.mask_ratio,
            encoder_stride=model.encoder_stride,
        )


def build_dataset(config: PretrainConfig, model: SimMIM) -> ImageFolder:
    """The folder of images, cropped at random to the model's size. Errors are those of `ImageFolder`."""
    transform = pretrain_transform(model.img_size, channels=model.in_chans, mean=config.mean, std=config.std)
    with renamed({"root": "data", "channels": "model_args.in_chans"}):
        return ImageFolder(config.data, transform, channels=model.in_chans)


def count_workers(config: PretrainConfig) -> int:
    """Processes that read images: as configured, or one for each core, `MOST_WORKERS` at most."""
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)
