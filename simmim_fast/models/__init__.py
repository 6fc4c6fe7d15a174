"""The models: Swin, Swin V2 and ViT encoders, SimMIM around them, and the ways to build them."""

from simmim_fast.models.build import build_model, build_simmim, create_model
from simmim_fast.models.presets import PRESETS
from simmim_fast.models.simmim import SimMIM
from simmim_fast.models.swin import SwinTransformer, SwinTransformerForSimMIM
from simmim_fast.models.swin_v2 import SwinTransformerV2, SwinTransformerV2ForSimMIM
from simmim_fast.models.vit import VisionTransformer, VisionTransformerForSimMIM

__all__ = [
    "PRESETS",
    "SimMIM",
    "SwinTransformer",
    "SwinTransformerForSimMIM",
    "SwinTransformerV2",
    "SwinTransformerV2ForSimMIM",
    "VisionTransformer",
    "VisionTransformerForSimMIM",
    "build_model",
    "build_simmim",
    "create_model",
]
