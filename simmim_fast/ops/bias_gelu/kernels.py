"""Triton kernels of bias_gelu and their launchers.

Rows are the positions of all axes but the last; offsets are int64: a tensor may have more than 2^31 elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_fast._triton import compute_type, on_device_of, store_rounded
from simmim_fast.ops.bias_gelu.op import CHUNK_ROWS, partial_shape, sum_dtype


class Tile(NamedTuple):
    """How a kernel is launched: the tile of one program, at most, and its warps."""

    rows: int
    channels: int
    num_warps: int


# Chosen by bytes in flight per program, not yet by measurement on a GPU.
FORWARD = Tile(rows=16, channels=256, num_warps=4)
BACKWARD = Tile(rows=16, channels=128, num_warps=4)


@triton.jit
def _normal_below(z):
    """Phi(z), the normal distribution function."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def _bias_gelu_fwd_kernel(
    x_ptr,  # (rows, C)
    bias_ptr,  # (C)
    out_ptr,  # (rows, C)
    num_rows,
    num_channels,  # C
    COMPUTE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One tile. Grid: (row tiles, channel tiles). Reads x and writes out once; rounds at the store."""
    rows = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    in_row = channels < num_channels
    in_bounds = (rows < num_rows)[:, None] & in_row[None, :]
    offsets = rows[:, None] * num_channels + channels[None, :]
    bias = tl.load(bias_ptr + channels, mask=in_row, other=0.0).to(COMPUTE)
    z = tl.load(x_ptr + offsets, mask=in_bounds, other=0.0).to(COMPUTE) + bias[None, :]
    store_rounded(out_ptr + offsets, z * _normal_below(z), in_bounds)


@triton.jit
def _bias_gelu_bwd_kernel(
    grad_out_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    bias_ptr,  # (C)
    grad_x_ptr,  # (rows, C) or None
    out_ptr,  # (rows, C) or None
    partial_ptr,  # (chunks, C) or None
    num_rows,
    num_channels,  # C
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """A chunk of rows, tile by tile. Grid: (row chunks, channel tiles).

    Reads grad_out and x and writes grad_x, and out where it is wanted again, once, and the chunk's sum, of what has not
    been rounded.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    in_row = channels < num_channels
    bias = tl.load(bias_ptr + channels, mask=in_row, other=0.0).to(COMPUTE)
    total = tl.zeros((TILE_R, TILE_C), COMPUTE)
    for first in range(0, ROWS, TILE_R):
        rows = first_row + first + tl.arange(0, TILE_R)
        in_bounds = (rows < num_rows)[:, None] & in_row[None, :]
        offsets = rows[:, None] * num_channels + channels[None, :]
        z = tl.load(x_ptr + offsets, mask=in_bounds, other=0.0).to(COMPUTE) + bias[None, :]
        grad = tl.load(grad_out_ptr + offsets, mask=in_bounds, other=0.0).to(COMPUTE)
        below = _normal_below(z)
        if out_ptr is not None:
            store_rounded(out_ptr + offsets, z * below, in_bounds)
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        grad *= below + z * density
        if grad_x_ptr is not None:
            store_rounded(grad_x_ptr + offsets, grad, in_bounds)
        total += grad
    if partial_ptr is not None:
        partial = tl.program_id(0).to(tl.int64) * num_channels + channels
        tl.store(partial_ptr + partial, tl.sum(total, axis=0), mask=in_row)


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """The operator's forward: out (..., C)."""
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    channels = x.shape[-1]
    rows, tile_channels = x.numel() // channels, min(FORWARD.channels, triton.next_power_of_2(channels))
    with on_device_of(x):
        _bias_gelu_fwd_kernel[(triton.cdiv(rows, FORWARD.rows), triton.cdiv(channels, tile_channels))](
            x.contiguous(),
            bias.contiguous(),
            out,
            rows,
            channels,
            COMPUTE=compute_type(x.dtype),
            TILE_R=FORWARD.rows,
            TILE_C=tile_channels,
            num_warps=FORWARD.num_warps,
        )
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    bias: Tensor,
    recompute: bool,
    x_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's backward: grad_x (..., C) and grad_bias (C), empty where the dtype is None, and out, if wanted."""
    channels = x.shape[-1]
    out = x.new_empty(x.shape) if recompute else None
    grad_x = None if x_dtype is None else x.new_empty(x.shape, dtype=x_dtype)
    partial = None if bias_dtype is None else x.new_empty(partial_shape(x), dtype=sum_dtype(x.dtype))
    if x.numel() > 0:
        rows, tile_channels = x.numel() // channels, min(BACKWARD.channels, triton.next_power_of_2(channels))
        with on_device_of(x):
            _bias_gelu_bwd_kernel[(triton.cdiv(rows, CHUNK_ROWS), triton.cdiv(channels, tile_channels))](
                grad_out.contiguous(),
                x.contiguous(),
                bias.contiguous(),
                grad_x,
                out,
                partial,
                rows,
                channels,
                COMPUTE=compute_type(x.dtype),
                ROWS=CHUNK_ROWS,
                TILE_R=BACKWARD.rows,
                TILE_C=tile_channels,
                num_warps=BACKWARD.num_warps,
            )
    results = (grad_x, None if partial is None else partial.sum(0).to(bias_dtype), out)
    return tuple(x.new_empty(0) if result is None else result for result in results)
