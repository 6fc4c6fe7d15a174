"""Pre-training, from top to bottom."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
from torch import nn

from simmim_fast.train.config import PretrainConfig
from simmim_fast.train.graph import GraphedStep, Update
from simmim_fast.train.interrupt import Interrupt
from simmim_fast.train.job import Job, prepare
from simmim_fast.train.metrics import Readings
from simmim_fast.train.optim import build_optimizer, pretrain_groups
from simmim_fast.train.progress import open_progress
from simmim_fast.train.schedule import build_schedule, set_learning_rates
from simmim_fast.train.step import train_step


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
    update = _build_update(torch.compile(job.model) if config.compile else job.model, optimizer, config)
    readings, interrupt = Readings(images), Interrupt()

    with interrupt.listening(), open_progress(len(updates)) as progress, job.folder.open(updates.unreadable) as folder:
        for step, micro_batches in enumerate(readings.waiting(updates), start=1):
            lr = set_learning_rates(optimizer, schedule, step - 1)
            readings.add(*update(micro_batches))
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


def _build_update(model: nn.Module, optimizer: torch.optim.Optimizer, config: PretrainConfig) -> Update:
    """The function that makes one update of its micro-batches."""
    if not config.cuda_graph:
        options = {"clip_grad": config.clip_grad, "bf16": config.precision == "bf16"}
        return lambda micro_batches: train_step(model, optimizer, micro_batches, **options)
    step = GraphedStep(model, optimizer, clip_grad=config.clip_grad, precision=config.precision)
    return lambda micro_batches: step(*chain.from_iterable(micro_batches))
