"""A run before it starts: put together and checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from simmim_fast.data import ImageFolder, build_loader
from simmim_fast.masking import MaskGenerator
from simmim_fast.models import SimMIM
from simmim_fast.train.build import build_dataset, build_masks, build_model, choose_device, count_workers
from simmim_fast.train.config import PretrainConfig
from simmim_fast.train.run import RunFolder
from simmim_fast.train.stream import UpdateStream


@dataclass(frozen=True)
class Job:
    """A run that is ready to start: every argument is checked, nothing is written yet."""

    config: PretrainConfig
    folder: RunFolder
    dataset: ImageFolder
    model: SimMIM
    updates: UpdateStream


def prepare(config: PretrainConfig, *, overwrite: bool = False) -> Job:
    """Puts a run together.

    Args:
        config: The whole run.
        overwrite: Replace the run that `config.out` holds already, once this one has made its first update.

    Raises:
        ValueError, TypeError: an argument is wrong, or does not fit another one or the images.
        RuntimeError: the model cannot run on the device, with its backend.
    """
    folder = RunFolder(config, overwrite=overwrite)
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    model = build_model(config)
    masks = build_masks(config, model)
    model.counts = masks.counts
    dataset = build_dataset(config, model)
    loader = build_loader(
        dataset,
        config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        num_workers=count_workers(config),
        pin_memory=device.type == "cuda",
    )
    updates = UpdateStream(loader, masks, accumulation_steps=config.accumulation_steps, seed=config.seed, device=device)
    _try_out(model.to(device), masks, bf16=config.precision == "bf16")
    return Job(config, folder, dataset, model, updates)


@torch.no_grad()
def _try_out(model: SimMIM, masks: MaskGenerator, *, bf16: bool) -> None:
    """One image through the model, so that what cannot run here is refused before a run begins."""
    device = next(model.parameters()).device
    mask = masks.batch(1, generator=torch.Generator(device))
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        model(torch.zeros(1, model.in_chans, *model.img_size, device=device), mask)
    model.train()
