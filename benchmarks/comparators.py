"""What else one could train: MAE, BEiT, supervised classification. Another method each, so never a ratio of speed-up.

They answer what an image costs beside SimMIM. Sizes are those of the model they stand beside, at the same image size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Absent
from benchmarks.models import MODELS, masks_for
from benchmarks.peers import Call, installed
from simmim_fast.models import SimMIM

CLASSES = 1000
VISUAL_WORDS = 8192  # of BEiT's tokenizer
MAE_DECODER_HEAD = 32  # channels of a head of its decoder, as released
COMPILED = "_compiled"


def mae(name: str, like: SimMIM) -> tuple[nn.Module, Call]:
    """ViTMAEForPreTraining (arXiv 2111.06377): three in four patches dropped, a decoder of eight blocks."""
    transformers, sizes = installed("transformers"), _vit_sizes(name, like)
    width = 2 * sizes["hidden_size"] // 3 // MAE_DECODER_HEAD * MAE_DECODER_HEAD  # 512 for a base
    decoder = {
        "decoder_hidden_size": width,
        "decoder_num_attention_heads": width // MAE_DECODER_HEAD,
        "decoder_intermediate_size": 4 * width,
    }
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes, **decoder, norm_pix_loss=True))
    return model, lambda images, mask: model(images).loss


def beit(name: str, like: SimMIM) -> tuple[nn.Module, Call]:
    """BeitForMaskedImageModeling (arXiv 2106.08254), its visual words given: its tokenizer costs more on top."""
    transformers, sizes = installed("transformers"), _vit_sizes(name, like)
    form = {"use_mask_token": True, "use_shared_relative_position_bias": True, "vocab_size": VISUAL_WORDS}
    config = transformers.BeitConfig(**sizes, **form, drop_path_rate=MODELS[name].get("drop_path_rate", 0.0))
    model = transformers.BeitForMaskedImageModeling(config)
    masked = like.img_size[0] // like.patch_size * (like.img_size[1] // like.patch_size) - masks_for(like).counts[0]
    words = _Labels(VISUAL_WORDS)

    def call(images: Tensor, mask: Tensor) -> Tensor:
        labels = words.on(images.device, masked * len(images))
        return model(images, bool_masked_pos=mask.flatten(1), labels=labels).loss

    return model, call


def supervised(name: str, like: SimMIM) -> tuple[nn.Module, Call]:
    """timm's classifier of the same sizes, fused where timm fuses by itself, under cross-entropy."""
    timm, values = installed("timm"), MODELS[name]
    if values["encoder"] == "swin":
        same = {key: value for key, value in values.items() if key != "encoder"}
        model = timm.create_model("swin_base_patch4_window7_224", num_classes=CLASSES, **same)
    else:
        same = {key: values[key] for key in ("img_size", "embed_dim", "depth", "num_heads")}
        model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES, **same)
    classes = _Labels(CLASSES)
    return model, lambda images, mask: F.cross_entropy(model(images), classes.on(images.device, len(images)))


class _Labels:
    """Random labels, drawn once and then kept on the device.

    Args:
        count: Of labels to draw from.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.drawn = torch.empty(0, dtype=torch.long)

    def on(self, device: torch.device, size: int) -> Tensor:
        """(size,) int64."""
        if len(self.drawn) != size or self.drawn.device != device:
            self.drawn = torch.randint(self.count, (size,), generator=torch.Generator().manual_seed(0)).to(device)
        return self.drawn


def _vit_sizes(name: str, like: SimMIM) -> dict[str, Any]:
    values = MODELS[name]
    return {
        "image_size": like.img_size[0],
        "patch_size": like.patch_size,
        "hidden_size": values["embed_dim"],
        "num_hidden_layers": values["depth"],
        "num_attention_heads": values["num_heads"],
        "intermediate_size": 4 * values["embed_dim"],
    }


_METHODS: Mapping[str, tuple[tuple[str, ...], Callable[[str, SimMIM], tuple[nn.Module, Call]]]] = {
    "mae": (("vit",), mae),
    "beit": (("vit",), beit),
    "supervised": (("swin", "vit"), supervised),
}
COMPARATORS = tuple(name + suffix for name in _METHODS for suffix in ("", COMPILED))


def comparator(contestant: str, name: str, like: SimMIM) -> tuple[nn.Module, Call]:
    """The model of another method, and (images, mask) -> its loss, compiled where the name says so.

    Raises:
        Absent: The library is not installed, or the method has no such encoder.
    """
    encoders, build = _METHODS[contestant.removesuffix(COMPILED)]
    if MODELS[name]["encoder"] not in encoders:
        raise Absent(f"it is written for {' and '.join(encoders)} alone")
    model, call = build(name, like)
    if contestant.endswith(COMPILED):
        model.compile(dynamic=False)
    return model, call
