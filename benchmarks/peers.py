"""SimMIM as other libraries have it, on the parameters of a model of ours that computes the same.

Hugging Face's models for masked image modelling, timm's Swin as the encoder of our SimMIM, and the official code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Absent
from benchmarks.models import MODELS
from benchmarks.official import build_official
from simmim_fast.models import SimMIM

Call = Callable[[Tensor, Tensor], Tensor]
Tensors = Mapping[str, Tensor]
# What ours is built with so that it computes what Hugging Face's model of the kind does.
HF_OVERRIDES: dict[str, dict[str, object]] = {
    "swin": {},
    "swinv2": {"norm_target": False},
    "vit": {
        "use_abs_pos_emb": True,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": False,
        "init_values": None,
        "drop_path_rate": 0.0,
    },
}
_HF_NAMES = (
    (r"^encoder\.(mask_token|cls_token)", r"{kind}.embeddings.\1"),
    (r"^encoder\.pos_embed", "{kind}.embeddings.position_embeddings"),
    (r"^encoder\.patch_embed\.proj", "{kind}.embeddings.patch_embeddings.projection"),
    (r"^encoder\.patch_embed\.norm", "{kind}.embeddings.norm"),
    (r"^encoder\.norm\.", "{kind}.layernorm."),
    (r"^encoder\.layers", "{kind}.encoder.layers"),
    (r"^encoder\.blocks", "{kind}.layers"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
_HF_BLOCK_NAMES = (
    (r"attn\.proj", "attention.o_proj"),
    (r"attn\.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"),
)
_HF_BLOCK_NAMES_V2 = (
    (r"attn\.proj", "attention.output.dense"),
    (r"attn\.logit_scale", "attention.self.logit_scale"),
    (r"attn\.cpb_mlp", "attention.self.continuous_position_bias_mlp"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)


@dataclass(frozen=True)
class Peer:
    """A model of another library.

    Attributes:
        model: It.
        call: (images, mask) -> loss.
        renamed: What is one for each parameter of ours, such as its gradient, by the model's own names and parts.
    """

    model: nn.Module
    call: Call
    renamed: Callable[[Tensors], dict[str, Tensor]]


def hugging_face(name: str, like: SimMIM, attention: str) -> Peer:
    """Its model of the kind of `name`, with the attention "eager" or "sdpa".

    Args:
        name: Key of `MODELS`.
        like: A reference of ours that computes the same, built with `HF_OVERRIDES`, whose parameters are copied.
        attention: "eager" or "sdpa".

    Raises:
        Absent: transformers is not installed, or has no such attention for this kind.
    """
    transformers = installed("transformers")
    kind = str(MODELS[name]["encoder"])
    classes = {"swin": "SwinForMaskedImageModeling", "swinv2": "Swinv2ForMaskedImageModeling"}
    if kind == "swin" and like.img_size[0] // like.encoder_stride < MODELS[name]["window_size"]:
        raise Absent("transformers' Swin keeps bias tables for windows larger than the last grid")
    model_class = getattr(transformers, classes.get(kind, "ViTForMaskedImageModeling"))
    config = model_class.config_class(**_hf_arguments(name, kind, like))
    if attention == "sdpa" and not model_class._supports_sdpa:
        raise Absent(f"transformers has no scaled_dot_product_attention for {kind}")
    model = model_class._from_config(config, attn_implementation=attention)
    renamed = partial(_hf_renamed, kind)
    _load(model, renamed(_parameters(like)))
    return Peer(model, lambda images, mask: model(images, bool_masked_pos=mask.flatten(1)).loss, renamed)


def _hf_arguments(name: str, kind: str, like: SimMIM) -> dict[str, Any]:
    """Of the configuration's class."""
    values = MODELS[name]
    common = {"image_size": like.img_size[0], "patch_size": like.patch_size, "encoder_stride": like.encoder_stride}
    if kind == "vit":
        width = values["embed_dim"]
        sizes = {"hidden_size": width, "num_hidden_layers": values["depth"], "num_attention_heads": values["num_heads"]}
        return {**common, **sizes, "intermediate_size": 4 * width, "layer_norm_eps": 1e-6}
    lists = {key: list(values[key]) for key in ("depths", "num_heads")}
    same = {key: values[key] for key in ("embed_dim", "window_size", "drop_path_rate")}
    return {**common, **lists, **same, "pretrained_window_sizes": [0] * len(lists["depths"])}


def _hf_renamed(kind: str, ours: Tensors) -> dict[str, Tensor]:
    rules = (*_HF_NAMES, *(_HF_BLOCK_NAMES_V2 if kind == "swinv2" else _HF_BLOCK_NAMES))
    theirs = {}
    for name, value in _in_three(kind, ours):
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement.format(kind=kind), name)
        theirs[name] = value
    return theirs


def _in_three(kind: str, ours: Tensors) -> Iterator[tuple[str, Tensor]]:
    """What belongs to q, k and v apart; a bias that only theirs has, of k, is zero, and so is its gradient."""
    place = "attention.self.{}" if kind == "swinv2" else "attention.{}_proj"
    q, k, v = (place.format(each) for each in (("query", "key", "value") if kind == "swinv2" else "qkv"))
    for name, value in ours.items():
        if ".attn.qkv." in name:
            for each, part in zip((q, k, v), value.chunk(3), strict=True):
                yield name.replace("attn.qkv", each), part
        elif name.endswith("q_bias"):
            yield name.replace("attn.q_bias", f"{q}.bias"), value
            if kind == "vit":
                yield name.replace("attn.q_bias", f"{k}.bias"), torch.zeros_like(value)
        else:
            yield name.replace("attn.v_bias", f"{v}.bias"), value


class TimmSwin(nn.Module):
    """timm's Swin as an encoder of SimMIM: mask tokens in, features of the last stage out.

    Args:
        swin: timm's model, without a head.
        like: A SimMIM of ours of the same sizes.
    """

    backend = "reference"  # the loss is plain PyTorch, too

    def __init__(self, swin: nn.Module, like: SimMIM) -> None:
        super().__init__()
        self.swin = swin
        self.mask_token = nn.Parameter(torch.zeros(swin.embed_dim))
        self.num_features = swin.num_features
        self.in_chans, self.patch_size, self.img_size = like.in_chans, like.patch_size, like.img_size

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """images (B, C, H, W), mask (B, H / patch, W / patch) to features (B, num_features, H / 32, W / 32)."""
        x = self.swin.patch_embed(images)  # (B, H / patch, W / patch, embed_dim)
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        return self.swin.norm(self.swin.layers(x)).permute(0, 3, 1, 2)

    def no_weight_decay_keywords(self) -> set[str]:
        """As in the official Swin."""
        return {"relative_position_bias_table"}


def timm_swin(name: str, like: SimMIM) -> Peer:
    """timm's Swin with fused attention inside our SimMIM; arguments as in `hugging_face`, `like` as it is by itself.

    Raises:
        Absent: timm is not installed, or the model is no Swin of the first version.
    """
    timm = installed("timm")
    if MODELS[name]["encoder"] != "swin":
        raise Absent("this contestant is written for Swin alone")
    with _fused_attention(timm):
        values = {key: value for key, value in MODELS[name].items() if key != "encoder"}
        swin = timm.create_model("swin_base_patch4_window7_224", num_classes=0, **values)
    model = SimMIM(TimmSwin(swin, like), like.encoder_stride)
    _load(model, _timm_renamed(_parameters(like)))
    return Peer(model, model, _timm_renamed)


class _fused_attention:
    """Inside, timm builds what it calls experimental: Swin on scaled_dot_product_attention."""

    def __init__(self, timm: Any) -> None:
        self.config = timm.layers.config

    def __enter__(self) -> None:
        self.before = self.config._USE_FUSED_ATTN
        self.config.set_fused_attn(True, experimental=True)

    def __exit__(self, *error: object) -> None:
        self.config._USE_FUSED_ATTN = self.before


def _timm_renamed(ours: Tensors) -> dict[str, Tensor]:
    theirs = {_timm_name(name): value for name, value in ours.items()}
    theirs["encoder.mask_token"] = theirs["encoder.mask_token"].flatten()
    return theirs


def _timm_name(name: str) -> str:
    """timm's stages begin with the downsampling that ours end with."""
    name = re.sub(r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name)
    return name if "mask_token" in name else re.sub(r"^encoder\.", "encoder.swin.", name)


def official(name: str, like: SimMIM, path: str | os.PathLike[str] | None) -> Peer:
    """The official code of a checkout; arguments as in `timm_swin`.

    Raises:
        Absent: No path was given, timm is not installed, or microsoft/SimMIM has no such encoder.
    """
    if path is None:
        raise Absent("--official names no checkout of microsoft/SimMIM")
    installed("timm")
    try:
        model = build_official(path, name)
    except ValueError as error:
        raise Absent(str(error)) from error
    _load(model, _parameters(like))
    return Peer(model, lambda images, mask: model(images, mask.long()), dict)  # as data/data_simmim.py makes masks


def installed(package: str) -> Any:
    """The package, imported.

    Raises:
        Absent: It is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise Absent(f"the package {package} is not installed")
    return importlib.import_module(package)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _load(model: nn.Module, state: Tensors) -> None:
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    left = sorted({name for name, _ in model.named_parameters()} & set(missing)) + unexpected
    if left:
        raise ValueError(f"state must hold the parameters of {type(model).__name__}; these do not match: {left}")
