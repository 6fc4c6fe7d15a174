"""Attention inside shifted windows: see README.md."""

from simmim_fast.ops.shifted_window_attention.api import shifted_window_attention

__all__ = ["shifted_window_attention"]
