"""Learning-rate schedules of the official code as functions of the number of the update.

The first update runs at the schedule's start, and update s (counted from 0) at the value that the schedule has at
s - 1, since the official loop sets the rate after an update, with the number of that update. Source: lr_scheduler.py of
microsoft/SimMIM (timm 0.4.12 underneath) and of microsoft/Swin-Transformer.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from torch.optim import Optimizer

from simmim_fast.train.config import ScheduleConfig

# The official linear schedule ends at this share of the peak.
LINEAR_END = 0.01


@dataclass(frozen=True)
class Schedule:
    """A learning rate over the updates of one run; every length is in updates.

    The warm-up rises linearly from `warmup_lr`, the same for every parameter group, to the group's own peak.
    `min_lr` is also the same for every group. `warmup_prefix` starts the cosine after the warm-up, as the Swin
    repository does; otherwise it starts at update 0 beneath the warm-up, as the SimMIM repository does.
    """

    name: str
    total: int
    warmup: int = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    warmup_prefix: bool = False
    decay: int = 1
    decay_rate: float = 0.1
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    def __call__(self, update: int, peak: float) -> float:
        """Learning rate of update `update` (from 0) for a group whose rate after the warm-up is `peak`."""
        t = max(update - 1, 0)
        if t < self.warmup:
            return self.warmup_lr + t * ((peak - self.warmup_lr) / self.warmup)
        return getattr(self, f"_{self.name}")(t, peak)

    def _cosine(self, t: int, peak: float) -> float:
        start = self.warmup if self.warmup_prefix else 0
        t, length = t - start, self.total - start
        if t >= length:
            return self.min_lr
        return self.min_lr + 0.5 * (peak - self.min_lr) * (1 + math.cos(math.pi * t / length))

    def _linear(self, t: int, peak: float) -> float:
        return peak - (peak - peak * LINEAR_END) * ((t - self.warmup) / (self.total - self.warmup))

    def _step(self, t: int, peak: float) -> float:
        return peak * self.decay_rate ** (t // self.decay)

    def _multistep(self, t: int, peak: float) -> float:
        return peak * self.gamma ** bisect_right(self.milestones, t)


def build_schedule(config: ScheduleConfig, epochs: int, updates_per_epoch: int, *, scale: float = 1.0) -> Schedule:
    """Turns a configuration in epochs into a schedule in updates.

    Args:
        config: Which schedule, and its lengths in epochs.
        epochs: Epochs of the whole run.
        updates_per_epoch: Optimizer updates in one epoch.
        scale: Factor on the warm-up and the final rate: `OptimizerConfig.rate_scale`.
    """
    return Schedule(
        name=config.name,
        total=epochs * updates_per_epoch,
        warmup=int(config.warmup(epochs) * updates_per_epoch),
        warmup_lr=config.warmup_lr * scale,
        min_lr=config.min_lr * scale,
        warmup_prefix=config.warmup_prefix,
        decay=max(int(config.decay_epochs * updates_per_epoch), 1),
        decay_rate=config.decay_rate,
        milestones=tuple(epoch * updates_per_epoch for epoch in config.multisteps),
        gamma=config.gamma,
    )


def set_learning_rates(optimizer: Optimizer, schedule: Schedule, update: int) -> float:
    """Sets every group's rate for update `update` (from 0) and returns the first group's.

    A group's peak is its `initial_lr`, which holds the layer's `lr_scale` already.
    """
    for group in optimizer.param_groups:
        group["lr"] = schedule(update, group["initial_lr"])
    return optimizer.param_groups[0]["lr"]
