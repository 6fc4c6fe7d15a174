"""Residual addition, stochastic depth, layer scale and LayerNorm in one pass: see README.md."""

from simmim_fast.ops.residual_layer_norm.api import residual_layer_norm

__all__ = ["residual_layer_norm"]
