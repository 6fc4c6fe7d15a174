"""Patch embedding of the visible patches in plain PyTorch. The oracle, and the rules for dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(image: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype of the operands of the projection.

    What image and weight promote to (uint8 images: the weight's); under autocast its dtype, except for float64.
    """
    dtype = weight.dtype if image.dtype == torch.uint8 else torch.promote_types(image.dtype, weight.dtype)
    device_type = image.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def embedding_dtype(image: Tensor, weight: Tensor, norm_weight: Tensor | None) -> torch.dtype:
    """Dtype of projection and norm: the projection's, but float32 where autocast takes a LayerNorm to it, on CUDA."""
    dtype, device_type = compute_dtype(image, weight), image.device.type
    if norm_weight is not None and device_type == "cuda" and torch.is_autocast_enabled(device_type):
        return torch.promote_types(dtype, torch.float32)
    return dtype


def output_dtype(
    image: Tensor, weight: Tensor, norm_weight: Tensor | None, mask_token: Tensor, pos_embed: Tensor | None
) -> torch.dtype:
    """What embedding, mask token and positions promote to."""
    dtype = torch.promote_types(embedding_dtype(image, weight, norm_weight), mask_token.dtype)
    return dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)


def masked_patch_embed(
    image: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask_token: Tensor,
    pos_embed: Tensor | None = None,
    *,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Embed the visible patches of an image, put the mask token in the place of the others, add the positions.

        where(mask, mask_token, norm(weight patch + bias)) + pos_embed

    Args:
        image: (B, channels, H, W), or uint8, which becomes (image / 255 - mean) / std.
        mask: (B, H / p, W / p), bool or integer: non-zero where hidden.
        weight: (C, channels, p, p).
        bias: (C).
        norm_weight: (C), or None for no norm.
        norm_bias: (C), or None for no norm.
        mask_token: (C).
        pos_embed: (H / p, W / p, C), or None.
        eps: Added to the variance.
        mean: (channels), or None.
        std: (channels), or None.
        visible: (B, K), or None: the flat patches to embed. A patch that is neither hidden nor among them becomes NaN.

    Returns:
        (B, H / p, W / p, C) in `output_dtype`.
    """
    hidden, patch_size = mask.bool(), weight.shape[-1]
    dtype, wide = compute_dtype(image, weight), torch.promote_types(weight.dtype, torch.float32)
    embedded_dtype = embedding_dtype(image, weight, norm_weight)
    image = _visible_pixels(image, hidden, patch_size, mean, std, wide).to(dtype)
    x = F.conv2d(image, weight.to(dtype), bias.to(dtype), stride=patch_size).permute(0, 2, 3, 1)  # (B, H/p, W/p, C)
    if norm_weight is not None:
        norm_dtype = torch.promote_types(dtype, norm_weight.dtype)
        x = F.layer_norm(x.to(norm_dtype), x.shape[3:], norm_weight.to(norm_dtype), norm_bias.to(norm_dtype), eps)
    x = x.to(embedded_dtype)
    if visible is not None:
        listed = torch.zeros_like(hidden).flatten(1).scatter(1, visible.long(), True).view_as(hidden)
        x = x.masked_fill(~listed[..., None], float("nan"))
    x = torch.where(hidden[..., None], mask_token, x)
    return x if pos_embed is None else x + pos_embed


def _visible_pixels(
    image: Tensor, hidden: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The image (B, channels, H, W), normalised in `dtype` where there is a mean, and 0 in hidden patches."""
    if mean is not None:
        image = (image.to(dtype) / 255 - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]
    return image.masked_fill(hidden.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None], 0)
