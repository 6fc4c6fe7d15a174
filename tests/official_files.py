"""The released official pre-training configurations: what they say besides the defaults."""

from __future__ import annotations

from typing import Any

TRAIN_800 = {
    "EPOCHS": 800,
    "WARMUP_EPOCHS": 10,
    "BASE_LR": 1e-4,
    "WARMUP_LR": 5e-7,
    "WEIGHT_DECAY": 0.05,
    "LR_SCHEDULER": {"NAME": "multistep", "GAMMA": 0.1, "MULTISTEPS": [700]},
}
SWIN_BASE = {"EMBED_DIM": 128, "DEPTHS": [2, 2, 18, 2], "NUM_HEADS": [4, 8, 16, 32]}
SWIN_LARGE = {"EMBED_DIM": 192, "DEPTHS": [2, 2, 18, 2], "NUM_HEADS": [6, 12, 24, 48]}
VIT_BASE = {
    "EMBED_DIM": 768,
    "DEPTH": 12,
    "NUM_HEADS": 12,
    "USE_APE": False,
    "USE_RPB": False,
    "USE_SHARED_RPB": True,
    "USE_MEAN_POOLING": False,
}


def _file(kind: str, encoder: dict[str, Any], img_size: int, drop_path_rate: float, tag: str, **model: Any) -> dict:
    return {
        "MODEL": {
            "TYPE": kind,
            "NAME": "simmim_pretrain",
            "DROP_PATH_RATE": drop_path_rate,
            kind.upper(): encoder,
            **model,
        },
        "DATA": {"IMG_SIZE": img_size, "MASK_PATCH_SIZE": 32, "MASK_RATIO": 0.6},
        "TRAIN": TRAIN_800,
        "PRINT_FREQ": 100,
        "SAVE_FREQ": 5,
        "TAG": f"simmim_pretrain__{tag}",
    }


NORM_TARGET = {"NORM_TARGET": {"ENABLE": True, "PATCH_SIZE": 47}}
FILES = {
    "simmim_swin_base_192": _file(
        "swin", {**SWIN_BASE, "WINDOW_SIZE": 6}, 192, 0.0, "swin_base__img192_window6__800ep"
    ),
    "simmim_swin_large_192": _file(
        "swin", {**SWIN_LARGE, "WINDOW_SIZE": 12}, 192, 0.0, "swin_large__img192_window12__800ep"
    ),
    "simmim_swinv2_base_192": _file(
        "swinv2", {**SWIN_BASE, "WINDOW_SIZE": 12}, 192, 0.1, "swinv2_base__img192_window12__800ep", SIMMIM=NORM_TARGET
    ),
    "simmim_vit_base_224": _file("vit", VIT_BASE, 224, 0.1, "vit_base__img224__800ep"),
}
FILES["100 epochs"] = {
    **FILES["simmim_swin_base_192"],
    "TRAIN": {
        "EPOCHS": 100,
        "WARMUP_EPOCHS": 10,
        "BASE_LR": 2e-4,
        "WARMUP_LR": 1e-6,
        "MIN_LR": 1e-5,
        "WEIGHT_DECAY": 0.05,
    },
    "TAG": "simmim_pretrain__swin_base__img192_window6__100ep",
}
