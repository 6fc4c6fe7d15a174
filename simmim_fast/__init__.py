"""SimMIM pre-training with fused kernels behind a drop-in PyTorch model."""

from typing import Any

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
    "GraphedStep",
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


def __getattr__(name: str) -> Any:
    """The trainer's public names are imported when they are asked for: it needs more than torch."""
    if name == "GraphedStep":
        from simmim_fast.train.graph import GraphedStep

        return GraphedStep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
