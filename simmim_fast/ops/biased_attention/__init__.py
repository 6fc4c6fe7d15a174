"""Attention over all tokens with an additive bias: see README.md."""

from simmim_fast.ops.biased_attention.api import biased_attention

__all__ = ["biased_attention"]
