"""Residual addition and LayerNorm in plain PyTorch. The oracle, and the rules for dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stream_dtype(x: Tensor, delta: Tensor | None) -> torch.dtype:
    """Dtype of the residual stream: what x and delta promote to, as in x + delta."""
    return x.dtype if delta is None else torch.promote_types(x.dtype, delta.dtype)


def norm_dtype(x: Tensor, delta: Tensor | None) -> torch.dtype:
    """Dtype of the norm's output, an operand of the next product: delta's, or x's where there is no delta.

    Under autocast float32 becomes the autocast dtype, as that product would make it.
    """
    dtype, device_type = (x if delta is None else delta).dtype, x.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def residual_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    delta_bias: Tensor | None = None,
    norm: str = "output",
) -> Tensor | tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, and normalise the sum ("output") or the branch ("delta").

        "output":  y = x + keep gamma (delta + delta_bias), LN(y)
        "delta":   x + keep LN(delta + delta_bias)

    Args:
        x: (B, ..., C), the stream.
        delta: (B, ..., C), the branch; None with "output": y is x.
        weight: (C), factor of the norm.
        bias: (C), its offset.
        eps: Added to the variance.
        gamma: (C), layer scale, or None.
        keep: (B), 0 or 1 / (1 - p), or None.
        delta_bias: (C), added to the branch first, or None.
        norm: What is normalised.

    Returns:
        y in `stream_dtype` and LN(y) in `norm_dtype`, or one sum in `stream_dtype`. All is computed in float32 (float64
        for float64); LN is of y as it is rounded.
    """
    dtype = stream_dtype(x, delta)
    wide = torch.promote_types(dtype, torch.float32)

    def normalised(value: Tensor) -> Tensor:
        return F.layer_norm(value.to(wide), value.shape[-1:], weight.to(wide), bias.to(wide), eps)

    if delta is None:
        return x, normalised(x).to(norm_dtype(x, delta))
    branch = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)
    branch = normalised(branch) if norm == "delta" else branch
    if gamma is not None:
        branch = branch * gamma.to(wide)
    if keep is not None:
        branch = branch * keep.to(wide).view(-1, *[1] * (x.ndim - 1))
    y = (x.to(wide) + branch).to(dtype)
    return y if norm == "delta" else (y, normalised(y).to(norm_dtype(x, delta)))
