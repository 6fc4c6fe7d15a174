"""The masked L1 loss in plain PyTorch. The oracle."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-5


def masked_l1_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    patch_size: int,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Mean absolute error over the masked pixels.

        sum over masked pixels and channels of |prediction - target| / (masked pixels + 1e-5) / channels

    Args:
        prediction: (B, channels, H, W).
        target: (B, channels, H, W), or uint8, which becomes (target / 255 - mean) / std.
        mask: (B, H / patch, W / patch), bool or integer: non-zero where hidden.
        patch_size: Pixels along the side of a mask entry.
        mean: (channels,), or None.
        std: (channels,), or None.

    Returns:
        Scalar: fp32, or float64 for float64.
    """
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    target = target.to(dtype)
    if mean is not None:
        target = (target / 255 - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]
    hidden = mask.bool().repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]  # (B, 1, H, W)
    error = torch.where(hidden, (prediction.to(dtype) - target).abs(), 0)
    # As officially, where the mask is an integer: the count and 1e-5 are added in fp32, whatever the dtype of the loss.
    masked_pixels = hidden.sum().float() + EPSILON
    return error.sum() / masked_pixels / target.shape[1]
