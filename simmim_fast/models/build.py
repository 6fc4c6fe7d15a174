"""Models by name and by official configuration: `create_model`, `build_simmim`, `build_model`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import nn

from simmim_fast._arguments import check_choice, did_you_mean
from simmim_fast.models.official_config import OfficialConfig, read_official_config
from simmim_fast.models.presets import PRESETS
from simmim_fast.models.simmim import SimMIM
from simmim_fast.models.swin import SwinTransformer, SwinTransformerForSimMIM
from simmim_fast.models.swin_v2 import SwinTransformerV2, SwinTransformerV2ForSimMIM
from simmim_fast.models.vit import VisionTransformer, VisionTransformerForSimMIM

ENCODERS = {
    "swin": SwinTransformerForSimMIM,
    "swinv2": SwinTransformerV2ForSimMIM,
    "vit": VisionTransformerForSimMIM,
}
CLASSIFIERS = {"swin": SwinTransformer, "swinv2": SwinTransformerV2, "vit": VisionTransformer}
_EVERY = ("patch_size", "in_chans", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias")
_SWINV2 = {name.upper(): name for name in (*_EVERY, "depths", "window_size", "ape", "patch_norm")}
_VIT = {name.upper(): name for name in (*_EVERY, "depth", "init_values", "use_mean_pooling")}
# Keys of an official configuration, under MODEL.<encoder>, and the arguments that they set.
OFFICIAL_KEYS = {
    "swin": {**_SWINV2, "QK_SCALE": "qk_scale"},
    "swinv2": _SWINV2,
    "vit": {
        **_VIT,
        "USE_APE": "use_abs_pos_emb",
        "USE_RPB": "use_rel_pos_bias",
        "USE_SHARED_RPB": "use_shared_rel_pos_bias",
    },
}
SIMMIM_ARGUMENTS = ("norm_target", "norm_target_patch_size", "head", "counts", "shortcuts")


def create_model(encoder: str, **kwargs: object) -> SimMIM:
    """Build a SimMIM model.

    Args:
        encoder: "swin", "swinv2" or "vit", with that encoder's arguments as keywords; or a preset such as
            "simmim_swin_base_192", whose values keywords override (`PRESETS` lists them).
        **kwargs: Arguments of the encoder by their official names, and of `SimMIM`: `norm_target`,
            `norm_target_patch_size`, `head`, `counts`, `shortcuts`. `backend` is "auto", "reference", "native" or
            "triton"; `recompute` is "none", "pointwise" or "mlp", what the backward computes again to save memory.

    Returns:
        The model, freshly initialised, in training mode.

    Raises:
        ValueError: an unknown encoder or preset, or values that do not fit each other.
        TypeError: an unknown keyword, where the message names the nearest, or a value of the wrong type.

    Example:
        >>> model = create_model("simmim_swin_base_192")
        >>> model = create_model("vit", img_size=(96, 128), in_chans=4, patch_size=16, embed_dim=384, num_heads=6)
    """
    if encoder in PRESETS:
        kwargs = {**PRESETS[encoder], **kwargs}
        encoder = str(kwargs.pop("encoder"))
    else:
        check_choice("encoder", encoder, (*ENCODERS, *PRESETS))
    head = {name: kwargs.pop(name) for name in SIMMIM_ARGUMENTS if name in kwargs}
    _check_keywords(encoder, kwargs)
    built = ENCODERS[encoder](**_with_official_norm(encoder, kwargs))
    return SimMIM(built, built.stride, **head)


def build_simmim(config: str | Path | Mapping[str, object] | OfficialConfig) -> SimMIM:
    """Build the model of an official pre-training configuration: a path, a mapping or a yacs node.

    As the official models/build.py, whichever of the two repositories the configuration is from.

    Raises:
        ValueError: an unknown key or model type, a value of the wrong type.
    """
    config = read_official_config(config)
    target = config.MODEL.SIMMIM.NORM_TARGET
    return create_model(
        _model_type(config),
        **encoder_arguments(config),
        norm_target=target.ENABLE,
        norm_target_patch_size=target.PATCH_SIZE,
    )


def build_model(config: str | Path | Mapping[str, object] | OfficialConfig, is_pretrain: bool = True) -> nn.Module:
    """Build the model of an official configuration: SimMIM to pre-train, or the classifier to fine-tune.

    Args:
        config: A path to an official YAML file, a mapping or a yacs node.
        is_pretrain: True for `SimMIM`, False for the encoder with a classification head of MODEL.NUM_CLASSES.

    Raises:
        ValueError: an unknown key or model type, a value of the wrong type.
    """
    if is_pretrain:
        return build_simmim(config)
    config = read_official_config(config)
    kind = _model_type(config)
    arguments = {**encoder_arguments(config), "num_classes": config.MODEL.NUM_CLASSES}
    if kind == "swinv2":
        arguments["pretrained_window_sizes"] = config.MODEL.SWINV2.PRETRAINED_WINDOW_SIZES
    return CLASSIFIERS[kind](**_with_official_norm(kind, arguments))


def _model_type(config: OfficialConfig) -> str:
    check_choice("MODEL.TYPE", config.MODEL.TYPE, ENCODERS)
    return config.MODEL.TYPE


def encoder_arguments(config: OfficialConfig) -> dict[str, object]:
    """The encoder's arguments in an official configuration (`build_simmim` of both official repositories).

    Raises:
        ValueError: an unknown model type.
    """
    kind = _model_type(config)
    node = config.MODEL[kind.upper()]
    arguments = {argument: node[key] for key, argument in OFFICIAL_KEYS[kind].items()}
    if kind != "vit":
        arguments["use_checkpoint"] = config.TRAIN.USE_CHECKPOINT
    return {
        **arguments,
        "img_size": config.DATA.IMG_SIZE,
        "drop_rate": config.MODEL.DROP_RATE,
        "drop_path_rate": config.MODEL.DROP_PATH_RATE,
    }


def _with_official_norm(encoder: str, kwargs: dict[str, object]) -> dict[str, object]:
    """The official code builds ViT with norms of eps 1e-6, and Swin with PyTorch's 1e-5."""
    return {"norm_layer": partial(nn.LayerNorm, eps=1e-6), **kwargs} if encoder == "vit" else kwargs


def _check_keywords(encoder: str, kwargs: dict[str, object]) -> None:
    known = set(SIMMIM_ARGUMENTS)
    for base in ENCODERS[encoder].__mro__:
        if issubclass(base, nn.Module) and "__init__" in vars(base):
            known |= {p.name for p in inspect.signature(base.__init__).parameters.values() if p.kind not in (2, 4)}
    known -= {"self"}
    for name in kwargs:
        if name not in known:
            raise TypeError(f"{name} is no argument of the encoder {encoder!r}{did_you_mean(name, known)}")
