"""The official configuration format, for the scripts of microsoft/SimMIM and microsoft/Swin-Transformer, as ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from simmim_fast.models.build import encoder_arguments
from simmim_fast.models.official_config import OfficialConfig, read_official_config


def read_official_options(path: str | os.PathLike[str], opts: Sequence[str] = ()) -> dict[str, Any]:
    """The options of `PretrainConfig` that an official `--cfg` file and its `--opts` stand for, by dotted name.

    `data` is left out where the file names none. The learning rates stay those for 512 images: our optimizer scales
    them by the images of an update, as main_simmim.py does. apex's fp16 becomes bf16, AMP_OPT_LEVEL O0 fp32.
    microsoft/SimMIM has no WARMUP_PREFIX: its cosine starts at update 0, beneath the warm-up. So the key, which is on
    by default, counts for swinv2 alone, the encoder that only microsoft/Swin-Transformer pre-trains.

    Args:
        path: Official YAML file.
        opts: Keys and values in turn, as the official `--opts`.

    Raises:
        ValueError, TypeError: an unknown key, a wrong value. OSError: the file cannot be read.
    """
    config = read_official_config(path, opts)
    target = config.MODEL.SIMMIM.NORM_TARGET
    model_args = {
        **encoder_arguments(config),
        "norm_target": target.ENABLE,
        "norm_target_patch_size": target.PATCH_SIZE,
    }
    options = {
        "out": os.path.join(config.OUTPUT or "output", config.MODEL.NAME, config.TAG),
        "model": config.MODEL.TYPE,
        "model_args": model_args,
        "img_size": model_args.pop("img_size"),
        "mask_patch_size": config.DATA.MASK_PATCH_SIZE,
        "mask_ratio": config.DATA.MASK_RATIO,
        "batch_size": config.DATA.BATCH_SIZE,
        "workers": config.DATA.NUM_WORKERS,
        "precision": "fp32" if config.AMP_OPT_LEVEL == "O0" or not config.AMP_ENABLE else "bf16",
        "seed": config.SEED,
        "print_freq": config.PRINT_FREQ,
        "save_freq": config.SAVE_FREQ,
        **_training(config),
    }
    return options | ({"data": config.DATA.DATA_PATH} if config.DATA.DATA_PATH else {})


def _training(config: OfficialConfig) -> dict[str, Any]:
    train = config.TRAIN
    return {
        "epochs": train.EPOCHS,
        "accumulation_steps": max(train.ACCUMULATION_STEPS, 1),
        "clip_grad": train.CLIP_GRAD or None,
        "optimizer.name": train.OPTIMIZER.NAME.lower(),
        "optimizer.base_lr": train.BASE_LR,
        "optimizer.weight_decay": train.WEIGHT_DECAY,
        "optimizer.betas": tuple(train.OPTIMIZER.BETAS),
        "optimizer.eps": train.OPTIMIZER.EPS,
        "optimizer.momentum": train.OPTIMIZER.MOMENTUM,
        "schedule.name": train.LR_SCHEDULER.NAME,
        "schedule.warmup_epochs": train.WARMUP_EPOCHS,
        "schedule.warmup_lr": train.WARMUP_LR,
        "schedule.min_lr": train.MIN_LR,
        "schedule.warmup_prefix": config.MODEL.TYPE == "swinv2" and train.LR_SCHEDULER.WARMUP_PREFIX,
        "schedule.decay_epochs": train.LR_SCHEDULER.DECAY_EPOCHS,
        "schedule.decay_rate": train.LR_SCHEDULER.DECAY_RATE,
        "schedule.multisteps": tuple(train.LR_SCHEDULER.MULTISTEPS),
        "schedule.gamma": train.LR_SCHEDULER.GAMMA,
    }
