"""The models that are measured whole: the released ones, and small ones that a CPU trains in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from simmim_fast import MaskGenerator, create_model
from simmim_fast.models import SimMIM
from simmim_fast.models.presets import PRESETS

_PREFIX = "simmim_"
_SWIN_MICRO = {
    "encoder": "swin",
    "embed_dim": 32,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 4, 8),
    "window_size": 6,
    "drop_path_rate": 0.0,
}
MODELS: dict[str, dict[str, object]] = {
    **{name.removeprefix(_PREFIX): values for name, values in PRESETS.items()},
    "swin_micro_96": {**_SWIN_MICRO, "img_size": 96},
    "swin_micro_192": {**_SWIN_MICRO, "img_size": 192},
    "vit_micro_96": {
        "encoder": "vit",
        "img_size": 96,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 2,
        "qkv_bias": True,
        "use_abs_pos_emb": False,
        "use_shared_rel_pos_bias": True,
        "use_mean_pooling": False,
    },
}


def model_name(text: str) -> str:
    """The name in `MODELS` of a model that may be called by its preset's name."""
    return text.removeprefix(_PREFIX)


def build(name: str, **overrides: object) -> SimMIM:
    """A model of `MODELS`, with some of its arguments replaced (see `create_model`); it knows what its masks hide."""
    values = {**MODELS[name], **overrides}
    model = create_model(str(values.pop("encoder")), **values)
    model.counts = masks_for(model).counts
    return model


def copy_of(name: str, state: Mapping[str, Tensor], device: str = "cpu", **overrides: object) -> SimMIM:
    """As `build`, with these parameters and buffers; none are drawn, which takes seconds of a large model.

    Args:
        name: Key of `MODELS`.
        state: Of a model of that name. Parameters that the overrides add to it are drawn.
        device: Where the model is to be.
        **overrides: As in `build`.

    Raises:
        ValueError: `state` lacks a buffer.
    """
    with torch.device("meta"):
        model = build(name, **overrides)
    model = model.to_empty(device=device)
    missing = set(model.load_state_dict(state, strict=False).missing_keys)
    added = {key: parameter for key, parameter in model.named_parameters() if key in missing}
    if missing - added.keys():
        raise ValueError(f"state must hold the buffers of {name}, lacks {', '.join(sorted(missing - added.keys()))}")
    for parameter in added.values():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def masks_for(model: SimMIM) -> MaskGenerator:
    """SimMIM's cells of 32 pixels, six in ten hidden."""
    return MaskGenerator(model.img_size, 32, model.patch_size, 0.6, encoder_stride=model.encoder_stride)


def draw_inputs(model: SimMIM, batch: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images (batch, channels, H, W), float32, and masks (batch, H / patch, W / patch) of SimMIM's cells."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, model.in_chans, *model.img_size, generator=generator)
    return images.to(device), masks_for(model).batch(batch, generator=generator).to(device)


def loss_of(model: Callable[[Tensor, Tensor], Tensor], images: Tensor, mask: Tensor, dtype: str) -> Tensor:
    """The forward; for "bf16" under autocast of the images' device."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        return model(images, mask)
