"""Bias and exact GELU in one pass: see README.md."""

from simmim_fast.ops.bias_gelu.api import bias_gelu

__all__ = ["bias_gelu"]
