"""The linear head and the masked loss in plain PyTorch. The oracle.

Shapes: B batch, h and w the grid of tokens, D their channels, s the head's stride, H = h s and W = w s the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
EPSILON = 1e-5


def linear_masked_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    patch_size: int,
    loss: str = "l1",
) -> Tensor:
    """Predict the image by one linear layer and take the loss over its masked pixels (arXiv 2111.09886, section 3).

        sum over masked pixels of |PixelShuffle(features W' + b) - target| / (masked pixels + 1e-5) / channels

    Args:
        features: (B, h, w, D).
        weight: (s^2 channels, D): the 1 x 1 head.
        bias: (s^2 channels,).
        target: (B, channels, H, W).
        mask: (B, H / patch, W / patch), bool or integer: non-zero where hidden.
        patch_size: Pixels along the side of a mask entry.
        loss: "l1", "l2" or "smooth_l1".

    Returns:
        Scalar: fp32, or float64 for float64.
    """
    return masked_loss(predict_pixels(features, weight, bias, target.shape[1]), target, mask, patch_size, loss)


def predict_pixels(features: Tensor, weight: Tensor, bias: Tensor, channels: int) -> Tensor:
    """Features (B, h, w, D) through the head (s^2 channels, D) to pixels (B, channels, h s, w s)."""
    stride = math.isqrt(weight.shape[0] // channels)
    return F.pixel_shuffle(F.linear(features, weight, bias).permute(0, 3, 1, 2), stride)


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor, patch_size: int, loss: str = "l1") -> Tensor:
    """The loss over masked pixels of prediction and target (B, channels, H, W), mask (B, H / patch, W / patch)."""
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    error = LOSSES[loss](prediction.to(dtype), target.to(dtype), reduction="none")
    hidden = mask.bool().repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]  # (B, 1, H, W)
    # As officially, where the mask is an integer: the count and 1e-5 are added in fp32, whatever the dtype of the loss.
    masked_pixels = hidden.sum().float() + EPSILON
    return torch.where(hidden, error, 0).sum() / masked_pixels / target.shape[1]
