"""The official SimMIM as a contestant: a checkout of microsoft/SimMIM, whose code is imported as it is."""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial

from torch import nn

from benchmarks.models import MODELS

_ENCODERS = {"swin": ("SwinTransformerForSimMIM", 32), "vit": ("VisionTransformerForSimMIM", 16)}


def build_official(path: str | os.PathLike[str], name: str, **overrides: object) -> nn.Module:
    """A model of `MODELS` by the official code, which needs timm.

    Args:
        path: Checkout of microsoft/SimMIM. Its folder becomes importable, under the names that it has there.
        name: Key of `MODELS`.
        **overrides: Arguments of the encoder that replace its own.

    Raises:
        ValueError: microsoft/SimMIM has no such encoder, or the folder is no checkout of it.
    """
    values = {"in_chans": 3, **MODELS[name], **overrides}
    encoder = str(values.pop("encoder"))
    if encoder not in _ENCODERS:
        raise ValueError(
            f"model must have an encoder of microsoft/SimMIM ({', '.join(_ENCODERS)}), got {name}: {encoder}"
        )
    if not os.path.isfile(os.path.join(path, "models", "simmim.py")):
        raise ValueError(f"official must be a checkout of microsoft/SimMIM, with models/simmim.py; got {path}")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    module = importlib.import_module("models.simmim")
    class_name, stride = _ENCODERS[encoder]
    values["num_classes"] = 0
    if encoder == "vit":
        values["norm_layer"] = partial(nn.LayerNorm, eps=1e-6)  # models/vision_transformer.py, build_vit
    model = module.SimMIM(getattr(module, class_name)(**values), stride)
    model.img_size = (values["img_size"], values["img_size"])
    return model
