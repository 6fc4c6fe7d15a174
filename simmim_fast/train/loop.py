"""Pre-training, from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from simmim_fast.train.config import PretrainConfig
from simmim_fast.train.interrupt import Interrupt
from simmim_fast.train.job import Job, prepare
from simmim_fast.train.metrics import Readings
from simmim_fast.train.optim import build_optimizer, pretrain_groups
from simmim_fast.train.progress import open_progress
from simmim_fast.train.schedule import build_schedule, set_learning_rates
from simmim_fast.train.stream import MicroBatch

# The loss divides by the number of masked pixels plus this (official models/simmim.py).
LOSS_EPS = 1e-5


def pretrain(config: PretrainConfig, *, overwrite: bool = False) -> Path:
    """Pre-trains a model on a folder of images and returns its last checkpoint.

    Args:
        config: The whole run.
        overwrite: Replace the run that `config.out` holds already.

    Raises:
        ValueError, TypeError: something in `config` is wrong; nothing was written.
        FloatingPointError: a loss or a gradient was not finite.
        KeyboardInterrupt: Ctrl-C was pressed; the update was completed and a checkpoint written.
    """
    return train(prepare(config, overwrite=overwrite))


def train(job: Job) -> Path:
    """Runs what `prepare` has put together; see `pretrain`."""
    config, updates = job.config, job.updates
    images = config.images_per_update
    rate_scale = config.optimizer.rate_scale(images)
    optimizer = build_optimizer(pretrain_groups(job.model), config.optimizer, config.optimizer.peak_lr(images))
    schedule = build_schedule(config.schedule, config.epochs, updates.per_epoch, scale=rate_scale)
    model = torch.compile(job.model) if config.compile else job.model
    readings, interrupt = Readings(images), Interrupt()

    with interrupt.listening(), open_progress(len(updates)) as progress, job.folder.open(updates.unreadable) as folder:
        for step, micro_batches in enumerate(readings.waiting(updates), start=1):
            lr = set_learning_rates(optimizer, schedule, step - 1)
            scalars = train_step(model, optimizer, micro_batches, config.clip_grad, bf16=config.precision == "bf16")
            readings.add(*scalars)
            progress.advance()

            stopping = interrupt.requested or step == len(updates)
            saving = stopping or step % (config.save_freq * updates.per_epoch) == 0
            if saving or step == 1 or step % config.print_freq == 0:
                measured = readings.read(step)  # the one place where the host waits for the device
                row = {"step": step, "epoch": step / updates.per_epoch, "lr": lr, **measured}
                folder.write({**row, "unreadable": len(updates.unreadable)})
                progress.report(row)
            if saving:
                checkpoint = folder.save(job.model, step=step, epoch=row["epoch"])
            if stopping:
                break
    if interrupt.requested:
        raise KeyboardInterrupt(f"stopped by Ctrl-C after update {step} of {len(updates)}; checkpoint: {checkpoint}")
    return checkpoint


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    clip_grad: float | None = None,
    *,
    bf16: bool = False,
) -> tuple[Tensor, Tensor]:
    """One update, equal to that over all micro-batches at once where the model draws nothing at random.

    The model averages over the masked pixels of its micro-batch; weighted by their share of all masked pixels of the
    update, the losses, and so the gradients, add up to those of the one large batch. Stochastic depth and dropout draw
    anew for each micro-batch: with them the two differ by chance.

    Args:
        model: Called as `model(images, mask)`; returns the mean over the masked pixels and channels.
        optimizer: Its parameters are updated.
        micro_batches: Pairs of images (B, C, H, W), copied to the mask's device, and masks (B, H / patch, W / patch).
        clip_grad: Largest norm of the whole gradient; None does not clip.
        bf16: Run the model under bfloat16 autocast.

    Returns:
        Loss, and gradient norm before clipping: scalars on the device, which is not waited for.
    """
    optimizer.zero_grad()
    masked_pixels = [_masked_pixels(images, mask) for images, mask in micro_batches]
    all_masked_pixels = sum(masked_pixels)
    losses = []
    for (images, mask), pixels in zip(micro_batches, masked_pixels, strict=True):
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=bf16):
            loss = model(images.to(mask.device, non_blocking=True), mask)
        loss = loss * ((pixels + LOSS_EPS) / (all_masked_pixels + LOSS_EPS)).to(loss.dtype)
        loss.backward()
        losses.append(loss.detach())
    grad_norm = _clip(optimizer, clip_grad)
    optimizer.step()
    return torch.stack(losses).sum(), grad_norm


def _masked_pixels(images: Tensor, mask: Tensor) -> Tensor:
    """Number of pixels under the mask, a float64 scalar on the mask's device."""
    pixels_per_cell = images.shape[-2:].numel() // mask.shape[-2:].numel()
    return mask.ne(0).sum().double() * pixels_per_cell


def _clip(optimizer: torch.optim.Optimizer, largest: float | None) -> Tensor:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if largest is None:
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return nn.utils.clip_grad_norm_(parameters, largest)
