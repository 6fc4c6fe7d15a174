"""Weights in and out (official checkpoints, bias tables for other windows); fused ops in other people's live models."""

from __future__ import annotations

from simmim_fast.interop.acceleration import Report, accelerate
from simmim_fast.interop.bias_tables import resize_relative_position_bias
from simmim_fast.interop.official import load_official
from simmim_fast.interop.unpickle import InertRecord, UnsafePickleError, read_checkpoint

__all__ = [
    "InertRecord",
    "Report",
    "UnsafePickleError",
    "accelerate",
    "load_official",
    "read_checkpoint",
    "resize_relative_position_bias",
]
