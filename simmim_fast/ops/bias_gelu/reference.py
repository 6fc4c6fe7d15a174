"""Bias and GELU in plain PyTorch. The oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias and apply the exact GELU: z Phi(z) with z = x + bias.

    Args:
        x: (..., C).
        bias: (C).

    Returns:
        (..., C) in x's dtype, computed in float32 (float64 for float64).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(dtype) + bias.to(dtype)).to(x.dtype)
