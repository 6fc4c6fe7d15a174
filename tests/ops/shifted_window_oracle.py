"""Window attention as Hugging Face's Swin lays it out: pad, roll, cut, attend, put back, roll back, crop.

Written on its own, pair by pair, to check the reference.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def roll_and_partition(
    qkv: Tensor,
    bias_table: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    num_heads: int,
    pad_value: Tensor | None,
    logit_scale: None = None,
    queries: None = None,
) -> Tensor:
    """The arguments of `ops.shifted_window_attention`, without the cosine form and the queries."""
    batch, height, width, channels = qkv.shape
    (window_h, window_w), (shift_h, shift_w) = window_size, shift
    padded_h, padded_w = height + -height % window_h, width + -width % window_w
    padded = qkv.new_zeros(channels) if pad_value is None else pad_value
    padded = padded.repeat(batch, padded_h, padded_w, 1)
    padded[:, :height, :width] = qkv
    rolled = padded.roll((-shift_h, -shift_w), (1, 2))
    region = _regions((padded_h, padded_w), window_size, shift)
    out = torch.zeros(batch, padded_h, padded_w, channels // 3, dtype=qkv.dtype, device=qkv.device)
    for top, left in product(range(0, padded_h, window_h), range(0, padded_w, window_w)):
        cells = list(product(range(top, top + window_h), range(left, left + window_w)))
        tokens = torch.stack([rolled[:, y, x] for y, x in cells], dim=1)  # (B, N, 3C)
        attended = _attend(tokens, _biases(cells, region, bias_table, window_size), num_heads)
        for n, (y, x) in enumerate(cells):
            out[:, y, x] = attended[:, n]
    return out.roll(shift, (1, 2))[:, :height, :width].contiguous()


def _regions(grid: tuple[int, int], window_size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Number of the region of each cell of the rolled grid, counted over three slices along each shifted axis."""
    region = torch.zeros(grid, dtype=torch.int64)
    slices = [
        (slice(0, -window), slice(-window, -by), slice(-by, None)) if by else (slice(None),)
        for window, by in zip(window_size, shift, strict=True)
    ]
    for number, (rows, columns) in enumerate(product(*slices)):
        region[rows, columns] = number
    return region


def _biases(
    cells: list[tuple[int, int]], region: Tensor, bias_table: Tensor, window_size: tuple[int, int]
) -> list[list[Tensor]]:
    """For each query cell and key cell what is added to their logit: (heads)."""
    window_h, window_w = window_size
    return [
        [
            bias_table[(y - key_y + window_h - 1) * (2 * window_w - 1) + x - key_x + window_w - 1]
            - (100.0 if region[y, x] != region[key_y, key_x] else 0.0)
            for key_y, key_x in cells
        ]
        for y, x in cells
    ]


def _attend(tokens: Tensor, biases: list[list[Tensor]], num_heads: int) -> Tensor:
    """Attention of the tokens (B, N, 3C) of one window to each other: (B, N, C)."""
    q, k, v = (part.chunk(num_heads, dim=-1) for part in tokens.chunk(3, dim=-1))
    heads = []
    for head in range(num_heads):
        bias = torch.stack([torch.stack([pair[head] for pair in row]) for row in biases])  # (N, N)
        scale = q[head].shape[-1] ** -0.5
        weights = (torch.einsum("bnd,bmd->bnm", q[head], k[head]) * scale + bias).exp()
        heads.append(torch.einsum("bnm,bmd->bnd", weights / weights.sum(-1, keepdim=True), v[head]))
    return torch.cat(heads, dim=-1)
