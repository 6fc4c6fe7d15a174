"""What the head regresses: raw pixels, or pixels normalised by their surroundings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_targets(images: Tensor, window: int) -> Tensor:
    """Normalise each pixel by the mean and deviation of the window around it, channel by channel.

    Official Swin V2 pre-training, models/simmim.py `norm_targets`. At the border the window is cut, not padded.

    Args:
        images: (B, C, H, W), float.
        window: Side of the window in pixels, odd.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: if the window is even or not positive.
    """
    mean, deviation = local_statistics(images, window)
    return (images - mean) / deviation


def local_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the window around each pixel, channel by channel; see `norm_targets`.

    Args:
        images: (B, C, H, W), float.
        window: Side of the window in pixels, odd.

    Returns:
        Mean, and square root of the unbiased variance + 1e-6: each (B, C, H, W).

    Raises:
        ValueError: if the window is even or not positive.
    """
    check_target_window(window)
    mean, mean_square = (
        F.avg_pool2d(x, window, stride=1, padding=window // 2, count_include_pad=False) for x in (images, images**2)
    )
    ones = torch.ones_like(images)
    count = F.avg_pool2d(ones, window, stride=1, padding=window // 2, count_include_pad=True) * window**2
    variance = ((mean_square - mean**2) * (count / (count - 1))).clamp(min=0)
    return mean, (variance + 1e-6) ** 0.5


def check_target_window(window: int) -> None:
    """Refuse a window that has no centre.

    Raises:
        ValueError: if the window is even or not positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"norm_target_patch_size must be odd and positive, got {window}")
