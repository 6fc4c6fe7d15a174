"""The official configuration format, for the scripts of microsoft/SimMIM and microsoft/Swin-Transformer, as ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from simmim_fast.models.build import OFFICIAL_KEYS, encoder_arguments
from simmim_fast.models.official_config import OfficialConfig, changed_keys, read_official_config, value_of

# Options that take the value of an official key as it stands.
SAME = {
    "mask_patch_size": "DATA.MASK_PATCH_SIZE",
    "mask_ratio": "DATA.MASK_RATIO",
    "batch_size": "DATA.BATCH_SIZE",
    "workers": "DATA.NUM_WORKERS",
    "seed": "SEED",
    "print_freq": "PRINT_FREQ",
    "save_freq": "SAVE_FREQ",
    "epochs": "TRAIN.EPOCHS",
    "optimizer.base_lr": "TRAIN.BASE_LR",
    "optimizer.weight_decay": "TRAIN.WEIGHT_DECAY",
    "optimizer.eps": "TRAIN.OPTIMIZER.EPS",
    "optimizer.momentum": "TRAIN.OPTIMIZER.MOMENTUM",
    "schedule.name": "TRAIN.LR_SCHEDULER.NAME",
    "schedule.warmup_epochs": "TRAIN.WARMUP_EPOCHS",
    "schedule.warmup_lr": "TRAIN.WARMUP_LR",
    "schedule.min_lr": "TRAIN.MIN_LR",
    "schedule.decay_epochs": "TRAIN.LR_SCHEDULER.DECAY_EPOCHS",
    "schedule.decay_rate": "TRAIN.LR_SCHEDULER.DECAY_RATE",
    "schedule.gamma": "TRAIN.LR_SCHEDULER.GAMMA",
}
# Options that a key decides, alone or with others.
DERIVED = {
    "data": "DATA.DATA_PATH",
    "out": "OUTPUT",
    "model": "MODEL.TYPE",
    "img_size": "DATA.IMG_SIZE",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "clip_grad": "TRAIN.CLIP_GRAD",
    "precision": "AMP_OPT_LEVEL",
    "optimizer.name": "TRAIN.OPTIMIZER.NAME",
    "optimizer.betas": "TRAIN.OPTIMIZER.BETAS",
    "schedule.warmup_prefix": "TRAIN.LR_SCHEDULER.WARMUP_PREFIX",
    "schedule.multisteps": "TRAIN.LR_SCHEDULER.MULTISTEPS",
    "model_args.drop_rate": "MODEL.DROP_RATE",
    "model_args.drop_path_rate": "MODEL.DROP_PATH_RATE",
    "model_args.norm_target": "MODEL.SIMMIM.NORM_TARGET.ENABLE",
    "model_args.norm_target_patch_size": "MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE",
}
# Read besides: they take part in `out` and `precision`, or are resolved before.
READ_BESIDES = ("BASE", "MODEL.NAME", "TAG", "AMP_ENABLE", "ENABLE_AMP")
# They ask for another run than the one that would start.
UNSUPPORTED = (
    *("MODEL.RESUME", "MODEL.PRETRAINED", "PRETRAINED", "TRAIN.START_EPOCH"),
    *("EVAL_MODE", "THROUGHPUT_MODE", "DATA.ZIP_MODE"),
)


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
        ValueError, TypeError: an unknown key, a wrong value, a key that asks for what the trainer cannot do.
        OSError: the file cannot be read.
    """
    config = read_official_config(path, opts)
    for key in changed_keys(config):
        if key in UNSUPPORTED:
            value = value_of(config, key)
            raise ValueError(
                f"{key} must stay at its default, as the trainer cannot do what it asks for, got {value!r}"
            )
    target, train = config.MODEL.SIMMIM.NORM_TARGET, config.TRAIN
    model_args = {
        **encoder_arguments(config),
        "norm_target": target.ENABLE,
        "norm_target_patch_size": target.PATCH_SIZE,
    }
    options = {
        **{option: value_of(config, key) for option, key in SAME.items()},
        "out": os.path.join(config.OUTPUT or "output", config.MODEL.NAME, config.TAG),
        "model": config.MODEL.TYPE,
        "img_size": model_args.pop("img_size"),
        "model_args": model_args,
        "accumulation_steps": max(train.ACCUMULATION_STEPS, 1),
        "clip_grad": train.CLIP_GRAD or None,
        "precision": "fp32" if config.AMP_OPT_LEVEL == "O0" or not config.AMP_ENABLE else "bf16",
        "optimizer.name": train.OPTIMIZER.NAME.lower(),
        "optimizer.betas": tuple(train.OPTIMIZER.BETAS),
        "schedule.warmup_prefix": config.MODEL.TYPE == "swinv2" and train.LR_SCHEDULER.WARMUP_PREFIX,
        "schedule.multisteps": tuple(train.LR_SCHEDULER.MULTISTEPS),
    }
    return options | ({"data": config.DATA.DATA_PATH} if config.DATA.DATA_PATH else {})


def official_names(path: str | os.PathLike[str], opts: Sequence[str] = ()) -> dict[str, str]:
    """The official key behind each option of `read_official_options`, by dotted name."""
    return _names(read_official_config(path, opts))


def ignored_keys(path: str | os.PathLike[str], opts: Sequence[str] = ()) -> list[str]:
    """The keys that are changed and have no bearing on pre-training, such as those of fine-tuning."""
    config = read_official_config(path, opts)
    return [key for key in changed_keys(config) if key not in {*_names(config).values(), *READ_BESIDES}]


def _names(config: OfficialConfig) -> dict[str, str]:
    kind = config.MODEL.TYPE
    encoder = {f"model_args.{name}": f"MODEL.{kind.upper()}.{key}" for key, name in OFFICIAL_KEYS[kind].items()}
    if kind != "vit":  # the official ViT has no activation checkpointing
        encoder["model_args.use_checkpoint"] = "TRAIN.USE_CHECKPOINT"
    return SAME | DERIVED | encoder
