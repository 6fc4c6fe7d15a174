"""Fused ops in other people's live models: the official code and its forks, Hugging Face, timm."""

from __future__ import annotations

from simmim_fast.interop.acceleration.api import Report, accelerate

__all__ = ["Report", "accelerate"]
