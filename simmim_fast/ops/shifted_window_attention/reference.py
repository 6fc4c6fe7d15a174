"""Shifted-window attention in plain PyTorch: roll, partition, attend, reverse, roll back. The oracle.

Shapes: B batch, H and W the token grid, h heads of D channels (C = h D), G windows per image, N tokens per window.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim_fast.ops._queries import query_rows

MAX_LOGIT_SCALE = math.log(100.0)
MIN_NORM = 1e-12
BETWEEN_REGIONS = -100.0


def shifted_window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    num_heads: int,
    *,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    pad_value: Tensor | None = None,
    queries: Tensor | None = None,
    position_index: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head self-attention inside shifted windows, with a relative-position bias.

        softmax(scale q k' + bias + mask) v,  or with `logit_scale`  softmax(exp(logit_scale) cos(q, k) + bias + mask) v

    Args:
        qkv: (B, H, W, 3C) as the linear layer writes it: q, k, v, each head by head.
        bias_table: ((2 wh - 1)(2 ww - 1), heads), one row for each offset between two tokens.
        window_size: Height and width of a window in tokens.
        shift: Rows and columns by which the grid is rolled up and left before it is cut into windows.
        num_heads: Heads.
        scale: Factor of the logits; D ** -0.5 by default, unused with `logit_scale`.
        logit_scale: (heads,) SwinV2's cosine form (arXiv 2111.09883, section 3.3), clamped at log 100.
        pad_value: (3C,) what tokens carry that pad the grid at the bottom and right to whole windows; 0 by default.
        queries: (B, K) integer, flat indices y W + x of the tokens whose outputs are wanted; all by default.
        position_index: `relative_position_index(window_size)`, where the caller keeps it.
        attn_mask: `shift_mask(...)`, where the caller keeps it.
        dropout: Rate at which attention weights are dropped.

    Returns:
        (B, H, W, C), or (B, K, C) with `queries`, in qkv's dtype.

    Raises:
        ValueError: On the CPU: a query is no token, or a token is named twice.
    """
    height, width = qkv.shape[1:3]
    qkv = pad_to_windows(qkv, window_size, pad_value)
    bias, mask = bias_and_mask(bias_table, tuple(qkv.shape[1:3]), window_size, shift, position_index, attn_mask)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.dropout(_weights(_similarity(q, k, scale, logit_scale) + bias, mask), dropout, dropout > 0)
        return weights.to(v.dtype) @ v

    out = in_windows(attend, qkv, window_size, shift, num_heads)[:, :height, :width]
    return out if queries is None else query_rows(out.flatten(1, 2), queries)


def bias_and_mask(
    bias_table: Tensor,
    grid: tuple[int, int],
    window_size: tuple[int, int],
    shift: tuple[int, int],
    position_index: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What the logits of a padded grid's windows get: a bias (h, N, N), and a mask (G, N, N) where they are shifted.

    `position_index` and `attn_mask` as in `shifted_window_attention`.
    """
    if position_index is None:
        position_index = relative_position_index(window_size).to(bias_table.device)
    if attn_mask is None and any(shift):
        attn_mask = shift_mask(grid, window_size, shift).to(bias_table.device)
    return bias_table[position_index].permute(2, 0, 1), attn_mask


def in_windows(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    qkv: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    num_heads: int,
) -> Tensor:
    """An attention of q, k and v (B G, h, N, D), done in the shifted windows of qkv (B, H, W, 3C): (B, H, W, C)."""
    grid = tuple(qkv.shape[1:3])
    qkv = torch.roll(qkv, shifts=(-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else qkv
    q, k, v = partition(qkv, window_size).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = reverse(attend(q, k, v).transpose(1, 2).flatten(2), window_size, grid)
    return torch.roll(out, shifts=shift, dims=(1, 2)) if any(shift) else out


def _weights(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of logits (B G, h, N, N), with the mask (G, N, N) added to those of each image."""
    if mask is not None:
        logits = (logits.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
    return logits.softmax(dim=-1)


def _similarity(q: Tensor, k: Tensor, scale: float | None, logit_scale: Tensor | None) -> Tensor:
    """Logits (B G, h, N, N) of q and k (B G, h, N, D): their scaled product, or their scaled cosine."""
    if logit_scale is None:
        return (q * (scale if scale is not None else q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
    factor = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().view(-1, 1, 1)
    return (_unit(q) @ _unit(k).transpose(-2, -1)) * factor


def _unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) along the last axis, computed in float32 at least; a shorter vector has gradient 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    wide = torch.where(norm < MIN_NORM, wide.detach(), wide)
    return (wide / norm.clamp_min(MIN_NORM)).to(x.dtype)


def relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """Row of the bias table for each pair of tokens in a window: (N, N) int64.

    The table holds a row for each offset (dh, dw) between two tokens, row by row: (2 wh - 1)(2 ww - 1) rows.
    """
    h, w = window_size
    rows, columns = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)  # (N,) each
    dh = rows[:, None] - rows[None, :] + h - 1
    dw = columns[:, None] - columns[None, :] + w - 1
    return dh * (2 * w - 1) + dw


def shift_mask(grid: tuple[int, int], window_size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """What is added to the logits so that tokens from opposite borders, brought together by the roll, do not attend.

    Args:
        grid: Height and width of the (padded) grid, multiples of the window.
        window_size: Height and width of a window.
        shift: Rows and columns of the roll.

    Returns:
        (G, N, N) float32: 0 within a region, -100 between regions.
    """
    rows, columns = (
        (torch.arange(size) >= size - window).long() + (torch.arange(size) >= size - by).long()
        if by
        else torch.zeros(size)
        for size, window, by in zip(grid, window_size, shift, strict=True)
    )
    regions = partition((3 * rows[:, None] + columns[None, :])[None, :, :, None], window_size).squeeze(-1)  # (G, N)
    differ = regions[:, None, :] != regions[:, :, None]
    return torch.zeros(differ.shape).masked_fill(differ, BETWEEN_REGIONS)


def pad_to_windows(x: Tensor, window_size: tuple[int, int], value: Tensor | None) -> Tensor:
    """Pad (B, H, W, C) at the bottom and right to whole windows with `value` (C,), or with zeros."""
    batch, height, width, channels = x.shape
    bottom, right = -height % window_size[0], -width % window_size[1]
    if not bottom and not right:
        return x
    value = x.new_zeros(channels) if value is None else value.to(x.dtype)
    x = torch.cat([x, value.expand(batch, bottom, width, channels)], dim=1)
    return torch.cat([x, value.expand(batch, height + bottom, right, channels)], dim=2)


def partition(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Cut (B, H, W, C) into windows: (B G, N, C), window by window in row-major order."""
    h, w = window_size
    x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h))  # (B, H/h, h, W/w, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def reverse(windows: Tensor, window_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Put windows (B G, N, C) back into their grid: (B, H, W, C)."""
    h, w = window_size
    x = windows.view(-1, grid[0] // h, grid[1] // w, h, w, windows.shape[-1])
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
