"""Relative-position bias tables for another window, as the official fine-tuning resizes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simmim_fast._arguments import size_pair


def resize_relative_position_bias(
    table: Tensor, source_window: int | tuple[int, int], target_window: int | tuple[int, int]
) -> Tensor:
    """Interpolates a bias table from one window size to another.

    The offsets that the source window knows are laid out over the target's range at distances 1, 1 + q, 1 + q + q², ...
    from the centre, so that the middle keeps its resolution, and a bicubic spline through them is read at the target's
    offsets. Source: ``remap_pretrained_keys_swin`` and ``_vit`` in the official ``utils.py``, whose
    ``scipy.interpolate.interp2d`` is this spline. Needs scipy.

    Args:
        table: (tokens of offsets, heads), the offsets row-major as in Swin, (2h - 1)(2w - 1) of them; rows beyond them
            (ViT's 3 of the class token) are kept as they are.
        source_window: Tokens along a side of the square window that `table` is for, or (h, w); at least 3.
        target_window: The same of the result; an axis that stays the same is not resampled.

    Returns:
        ((2h' - 1)(2w' - 1) + kept rows, heads), in the dtype and on the device of `table`, without gradient.

    Raises:
        TypeError: a window that is neither an integer nor a pair.
        ValueError: one that is too small, or a table that is not for `source_window`.
    """
    from scipy.interpolate import RectBivariateSpline

    source, target = _extents("source_window", source_window, 3), _extents("target_window", target_window, 1)
    offsets = source[0] * source[1]
    if table.ndim != 2 or table.shape[0] - offsets not in (0, 3):
        raise ValueError(
            f"table must be ({offsets}, heads), or ({offsets + 3}, heads) with class-token rows, for source_window "
            f"{source_window}, got {tuple(table.shape)}"
        )
    values = table[:offsets].detach().double().cpu().numpy().reshape(*source, -1)  # (2h-1, 2w-1, heads)
    known = [_known_offsets(*extents) for extents in zip(source, target, strict=True)]
    wanted = [np.arange(extent) - extent // 2 for extent in target]
    resized = [RectBivariateSpline(*known, values[..., head])(*wanted) for head in range(values.shape[-1])]
    rows = torch.from_numpy(np.stack(resized, axis=-1).reshape(-1, values.shape[-1])).to(table)
    return torch.cat([rows, table[offsets:].detach()])


def _extents(name: str, window: int | tuple[int, int], least: int) -> tuple[int, int]:
    """The numbers of distinct offsets along each axis, 2w - 1."""
    height, width = size_pair(name, window, least)
    return 2 * height - 1, 2 * width - 1


def _known_offsets(source: int, target: int) -> np.ndarray:
    """Where the `source` offsets lie on the axis of the `target` offsets, (source,)."""
    half = source // 2
    if source == target:
        return np.arange(-half, half + 1, dtype=float)
    distances = np.cumsum(_ratio(half, target // 2) ** np.arange(half))
    return np.concatenate([-distances[::-1], [0.0], distances])


def _ratio(terms: int, total: int) -> float:
    """The q of 1 + q + ... + q^(terms-1) = total, between 1.01 and 1.5, by the official bisection (to 1e-6)."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**terms) / (1 - ratio) > total:
            high = ratio
        else:
            low = ratio
    return ratio
