"""The whole configuration of a pre-training run, as frozen dataclasses, and its YAML form.

The text under an option is its --help line. The defaults are the released 100-epoch recipe of SimMIM's Swin-B.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from simmim_fast._arguments import check_at_least, check_rate, check_types

# Images in a batch for which the official base rates are meant.
REFERENCE_BATCH = 512
# Epochs of warm-up in the released recipes, of 100 and of 800 epochs.
LONGEST_WARMUP = 10.0


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer"""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum"""
    base_lr: float = 2e-4
    """peak learning rate for 512 images in an update; it, warmup_lr and min_lr grow in proportion to the batch"""
    lr: float | None = None
    """peak learning rate as it is, instead of base_lr; warmup_lr and min_lr are then taken as they are, too"""
    weight_decay: float = 0.05
    """weight decay of the matrices and convolutions"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    momentum: float = 0.9
    """SGD's momentum"""

    def __post_init__(self) -> None:
        check_types(OptimizerConfig, vars(self), "optimizer.")
        for name in ("base_lr", "weight_decay", "eps", "momentum"):
            check_at_least(f"optimizer.{name}", getattr(self, name), 0)
        if self.lr is not None:
            check_at_least("optimizer.lr", self.lr, 0)
        for beta in self.betas:
            check_rate("optimizer.betas", beta)

    def rate_scale(self, images: int) -> float:
        """Factor on the base rates for an update over `images` images; 1 where `lr` is given."""
        return images / REFERENCE_BATCH if self.lr is None else 1.0

    def peak_lr(self, images: int) -> float:
        """Learning rate at the end of the warm-up for an update over `images` images."""
        return self.base_lr * self.rate_scale(images) if self.lr is None else self.lr


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule, stepped at every update"""

    name: Literal["cosine", "linear", "step", "multistep"] = "cosine"
    """shape after the warm-up"""
    warmup_epochs: float | None = None
    """epochs of linear warm-up (null: a tenth of all, 10 at most)"""
    warmup_lr: float = 1e-6
    """rate at the start of the warm-up (for 512 images, unless optimizer.lr is given)"""
    min_lr: float = 1e-5
    """rate at the end of the cosine (for 512 images, unless optimizer.lr is given)"""
    warmup_prefix: bool = False
    """start the cosine after the warm-up, as the Swin repository does, and not beneath it"""
    decay_epochs: float = 30.0
    """step: epochs between two drops"""
    decay_rate: float = 0.1
    """step: factor of each drop"""
    multisteps: tuple[float, ...] = ()
    """multistep: epochs of the drops"""
    gamma: float = 0.1
    """multistep: factor of each drop"""

    def __post_init__(self) -> None:
        check_types(ScheduleConfig, vars(self), "schedule.")
        if self.warmup_epochs is not None:
            check_at_least("schedule.warmup_epochs", self.warmup_epochs, 0)
        if self.name == "step" and self.decay_epochs <= 0:
            raise ValueError(f"schedule.decay_epochs must be positive, got {self.decay_epochs}")
        if self.name == "multistep" and not self.multisteps:
            raise ValueError("schedule.multisteps must hold at least one epoch, got none")

    def warmup(self, epochs: int) -> float:
        """Epochs of warm-up in a run of `epochs`."""
        return min(epochs / 10, LONGEST_WARMUP) if self.warmup_epochs is None else self.warmup_epochs

    def check_fit(self, epochs: int) -> None:
        """Refuses a schedule that does not fit into a run of `epochs`.

        Raises:
            ValueError: the warm-up is longer than the run, or a step lies within it.
        """
        warmup = self.warmup(epochs)
        if warmup > epochs:
            raise ValueError(f"schedule.warmup_epochs must be at most epochs={epochs}, got {warmup}")
        if self.name == "multistep" and min(self.multisteps) < warmup:
            raise ValueError(
                f"schedule.multisteps must hold no epoch within the warm-up (schedule.warmup_epochs={warmup}), got "
                f"{list(self.multisteps)}"
            )


@dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run."""

    data: str
    """folder of images, with or without one subfolder per label"""
    out: str
    """folder that takes metrics.jsonl, the checkpoints and the pictures"""
    model: str = "simmim_swin_base_192"
    """preset, or encoder (swin, swinv2, vit) that model_args describes"""
    model_args: dict[str, Any] = field(default_factory=dict)
    """keywords of the model, such as {"embed_dim": 96, "depths": [2, 2, 6, 2]}; they override the preset's"""
    img_size: int | tuple[int, int] | None = None
    """side of the training images, or [height, width] (the preset's if null)"""
    mean: tuple[float, ...] | None = None
    """mean of each channel, for pixels from 0 to 1 (ImageNet's if null)"""
    std: tuple[float, ...] | None = None
    """standard deviation of each channel (ImageNet's if null)"""
    mask_patch_size: int = 32
    """side of the square cells that are hidden, in pixels"""
    mask_ratio: float = 0.6
    """share of the cells that are hidden"""
    batch_size: int = 128
    """images that go through the model at once"""
    accumulation_steps: int = 1
    """batches in one update; without dropout and stochastic depth it equals that over the one large batch"""
    epochs: int = 100
    """passes over the images"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 runs the matrix products in bfloat16 under autocast; weights and optimizer stay fp32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one"""
    workers: int | None = None
    """processes that read images (null: one for each core, 8 at most; 0: the training process itself)"""
    seed: int = 0
    """of weights, order, crops and masks"""
    clip_grad: float | None = 5.0
    """largest norm of the gradient (null: not clipped)"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """optimizer"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """learning-rate schedule"""
    print_freq: int = 100
    """updates between two lines of metrics.jsonl; the host waits for the device only then"""
    save_freq: int = 5
    """epochs between two checkpoints"""
    keep: int = 2
    """newest checkpoints that are kept"""
    compile: bool = False
    """compile the model with torch.compile"""
    cuda_graph: bool = False
    """replay the whole update as one CUDA graph, which no GPU has run yet (where there is none: eager, same results)"""

    def __post_init__(self) -> None:
        check_types(PretrainConfig, vars(self))
        for name in ("batch_size", "accumulation_steps", "epochs", "print_freq", "save_freq", "keep"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        if self.workers is not None:
            check_at_least("workers", self.workers, 0)
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be above 0 and at most 1, got {self.mask_ratio}")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be positive, or null for no clipping, got {self.clip_grad}")
        self.schedule.check_fit(self.epochs)

    @property
    def images_per_update(self) -> int:
        """Images in one optimizer update."""
        return self.batch_size * self.accumulation_steps
