"""SimMIM pre-training with fused kernels behind a drop-in PyTorch model."""

from simmim_fast.interop.acceleration import accelerate
from simmim_fast.masking import MaskGenerator
from simmim_fast.models import (
    PRESETS,
    SimMIM,
    SwinTransformerForSimMIM,
    SwinTransformerV2ForSimMIM,
    VisionTransformerForSimMIM,
    build_model,
    build_simmim,
    create_model,
)

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "MaskGenerator",
    "SimMIM",
    "SwinTransformerForSimMIM",
    "SwinTransformerV2ForSimMIM",
    "VisionTransformerForSimMIM",
    "accelerate",
    "build_model",
    "build_simmim",
    "create_model",
]
