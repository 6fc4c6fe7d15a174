"""The linear head and the masked loss in plain PyTorch. The oracle.

Shapes: B batch, h and w the grid of tokens, D their channels, K listed tokens of an image, s the head's stride, H = h s
and W = w s the image.
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
    tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Predict the image by one linear layer and take the loss over its masked pixels (arXiv 2111.09886, section 3).

        sum over masked pixels of |PixelShuffle(features W' + b) - target| / (masked pixels + 1e-5) / channels

    Args:
        features: (B, h, w, D).
        weight: (s^2 channels, D): the 1 x 1 head.
        bias: (s^2 channels,).
        target: (B, channels, H, W), or uint8, which becomes (target / 255 - mean) / std.
        mask: (B, H / patch, W / patch), bool or integer: non-zero where hidden.
        patch_size: Pixels along the side of a mask entry.
        loss: "l1", "l2" or "smooth_l1".
        tokens: (B, K) integer: the tokens with a masked pixel, ascending; predict these only. Others give NaN.
        mean: (channels,), or None.
        std: (channels,), or None.

    Returns:
        Scalar: fp32, or float64 for float64.
    """
    dtype = torch.promote_types(torch.float32, features.dtype)
    if mean is not None:
        target = (target.to(dtype) / 255 - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]
    if tokens is None:
        return masked_loss(predict_pixels(features, weight, bias, target.shape[1]), target, mask, patch_size, loss)
    stride = math.isqrt(weight.shape[0] // target.shape[1])
    prediction = F.linear(_take(features.flatten(1, 2), tokens), weight, bias)
    hidden = hidden_pixels(mask, patch_size)
    pixels, masked = (_take(_pixels_of_tokens(x, stride), tokens) for x in (target, hidden))
    error = LOSSES[loss](prediction.to(dtype), pixels.to(dtype), reduction="none")
    masked = masked.repeat(1, 1, target.shape[1])
    total = torch.where(masked, error, 0).sum() / (hidden.sum().float() + EPSILON) / target.shape[1]
    return torch.where(are_masked_tokens(tokens, mask, patch_size, stride), total, math.nan)


def predict_pixels(features: Tensor, weight: Tensor, bias: Tensor, channels: int) -> Tensor:
    """Features (B, h, w, D) through the head (s^2 channels, D) to pixels (B, channels, h s, w s)."""
    batch, height, width, _ = features.shape
    stride = math.isqrt(weight.shape[0] // channels)
    outputs = F.linear(features, weight, bias).view(batch, height, width, channels, stride, stride)
    return outputs.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height * stride, width * stride)


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor, patch_size: int, loss: str = "l1") -> Tensor:
    """The loss over masked pixels of prediction and target (B, channels, H, W), mask (B, H / patch, W / patch)."""
    dtype = torch.promote_types(torch.float32, prediction.dtype)
    error = LOSSES[loss](prediction.to(dtype), target.to(dtype), reduction="none")
    hidden = hidden_pixels(mask, patch_size)
    # As officially, where the mask is an integer: the count and 1e-5 are added in fp32, whatever the dtype of the loss.
    masked_pixels = hidden.sum().float() + EPSILON
    return torch.where(hidden, error, 0).sum() / masked_pixels / target.shape[1]


def hidden_pixels(mask: Tensor, patch_size: int) -> Tensor:
    """The mask pixel by pixel: (B, 1, H, W) bool."""
    return mask.bool().repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]


def are_masked_tokens(tokens: Tensor, mask: Tensor, patch_size: int, stride: int) -> Tensor:
    """Scalar bool: whether tokens (B, K) ascend, are on the grid, and list every token with a masked pixel."""
    hidden = _pixels_of_tokens(hidden_pixels(mask, patch_size), stride).any(2)  # (B, h w)
    on_grid = ((tokens >= 0) & (tokens < hidden.shape[1])).all()
    listed = hidden.gather(1, tokens.long().clamp(0, max(hidden.shape[1] - 1, 0))).sum() == hidden.sum()
    return on_grid & (tokens.diff(dim=1) > 0).all() & listed


def _pixels_of_tokens(image: Tensor, stride: int) -> Tensor:
    """(B, channels, h s, w s) as (B, h w, channels s^2): what the outputs of the head stand for."""
    batch, channels, height, width = image.shape
    tokens = image.reshape(batch, channels, height // stride, stride, width // stride, stride)
    grid = (height // stride) * (width // stride)
    return tokens.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid, channels * stride**2)


def _take(rows: Tensor, tokens: Tensor) -> Tensor:
    """Rows (B, h w, C) at tokens (B, K); wrong tokens take some row."""
    index = tokens.long().clamp(0, max(rows.shape[1] - 1, 0))[:, :, None]
    return rows.gather(1, index.expand(-1, -1, rows.shape[2]))
