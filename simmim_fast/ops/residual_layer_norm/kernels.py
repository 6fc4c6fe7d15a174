"""Triton kernels of residual_layer_norm and their launchers.

A program holds whole rows, a tile of R of them by all C channels, rounded up to a power of two. Offsets are int64: a
tensor may have more than 2^31 elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_fast._triton import as_operand, compute_type, contiguous, on_device_of, store_rounded
from simmim_fast.ops.residual_layer_norm.op import chunk_rows, partial_shape, sum_dtype
from simmim_fast.ops.residual_layer_norm.reference import stream_dtype


class Tile(NamedTuple):
    """How a kernel is launched: the tile of one program, and its warps."""

    rows: int
    channels: int
    num_warps: int


def tile(channels: int, itemsize: int) -> Tile:
    """16 bytes of an activation for each thread where 16 warps are enough, few to keep the backward's in registers.

    Args:
        channels: Of a row.
        itemsize: Bytes of an element of the narrowest activation.
    """
    width = triton.next_power_of_2(channels)
    rows = min(16, max(1, 4096 // (width * itemsize)))
    return Tile(rows, width, min(16, max(1, rows * width * itemsize // 512)))


@triton.jit
def _load_rows(pointer, offsets, in_bounds, COMPUTE: tl.constexpr):
    return tl.load(pointer + offsets, mask=in_bounds, other=0.0).to(COMPUTE)


@triton.jit
def _load_channels(pointer, channels, num_channels, COMPUTE: tl.constexpr):
    return tl.load(pointer + channels, mask=channels < num_channels, other=0.0).to(COMPUTE)[None, :]


@triton.jit
def _load_branch(delta_ptr, delta_bias_ptr, offsets, in_bounds, channels, num_channels, COMPUTE: tl.constexpr):
    """delta + delta_bias."""
    branch = _load_rows(delta_ptr, offsets, in_bounds, COMPUTE)
    if delta_bias_ptr is not None:
        branch += _load_channels(delta_bias_ptr, channels, num_channels, COMPUTE)
    return branch


@triton.jit
def _add_branch(x, branch, keep, gamma_ptr, channels, num_channels, stream_ptr, COMPUTE: tl.constexpr):
    """x + keep gamma branch, as the stream rounds it."""
    branch *= keep[:, None]
    if gamma_ptr is not None:
        branch *= _load_channels(gamma_ptr, channels, num_channels, COMPUTE)
    return as_operand(x + branch, stream_ptr.dtype.element_ty).to(COMPUTE)


@triton.jit
def _residual_layer_norm_fwd_kernel(
    x_ptr,  # (rows, C)
    delta_ptr,  # (rows, C) or None
    weight_ptr,  # (C)
    bias_ptr,  # (C)
    gamma_ptr,  # (C) or None
    keep_ptr,  # (samples) or None
    delta_bias_ptr,  # (C) or None
    stream_ptr,  # (rows, C) or None
    normed_ptr,  # (rows, C) or None
    mean_ptr,  # (rows)
    rstd_ptr,  # (rows)
    num_rows,
    rows_per_sample,
    num_channels,  # C
    EPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    NORMS_DELTA: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One tile of rows. Grid: (row tiles). Reads x and delta and writes the results once each."""
    rows = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)
    channels = tl.arange(0, TILE_C)
    in_row = (channels < num_channels)[None, :]
    in_bounds = (rows < num_rows)[:, None] & in_row
    offsets = rows[:, None] * num_channels + channels[None, :]
    source = _load_rows(x_ptr, offsets, in_bounds, COMPUTE)
    stream = source
    if delta_ptr is not None:
        keep = tl.full((TILE_R,), 1.0, COMPUTE)
        if keep_ptr is not None:
            keep = tl.load(keep_ptr + rows // rows_per_sample, mask=rows < num_rows, other=0.0).to(COMPUTE)
        branch = _load_branch(delta_ptr, delta_bias_ptr, offsets, in_bounds, channels, num_channels, COMPUTE)
        if NORMS_DELTA:
            source = branch
        else:
            source = _add_branch(stream, branch, keep, gamma_ptr, channels, num_channels, stream_ptr, COMPUTE)
            store_rounded(stream_ptr + offsets, source, in_bounds)

    mean = tl.sum(source, axis=1) / num_channels
    centred = tl.where(in_row, source - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / num_channels
    rstd = 1 / tl.sqrt(variance + tl.full((), EPS, COMPUTE))
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    weight = _load_channels(weight_ptr, channels, num_channels, COMPUTE)
    normed = centred * rstd[:, None] * weight + _load_channels(bias_ptr, channels, num_channels, COMPUTE)
    if NORMS_DELTA:
        store_rounded(stream_ptr + offsets, stream + normed * keep[:, None], in_bounds)
    else:
        store_rounded(normed_ptr + offsets, normed, in_bounds)


@triton.jit
def _residual_layer_norm_bwd_kernel(
    grad_normed_ptr,  # (rows, C)
    grad_stream_ptr,  # (rows, C) or None
    source_ptr,  # (rows, C)
    delta_ptr,  # (rows, C) or None
    weight_ptr,  # (C)
    bias_ptr,  # (C) or None
    gamma_ptr,  # (C) or None
    keep_ptr,  # (samples) or None
    delta_bias_ptr,  # (C) or None
    mean_ptr,  # (rows)
    rstd_ptr,  # (rows)
    grad_x_ptr,  # (rows, C) or None
    grad_delta_ptr,  # (rows, C) or None
    normed_ptr,  # (rows, C) or None, as bias_ptr
    weight_partial_ptr,  # (chunks, C) or None
    bias_partial_ptr,  # (chunks, C) or None
    gamma_partial_ptr,  # (chunks, C) or None
    delta_bias_partial_ptr,  # (chunks, C) or None
    num_rows,
    rows_per_sample,
    num_channels,  # C
    COMPUTE: tl.constexpr,
    NORMS_DELTA: tl.constexpr,
    ADDS_DELTA: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """A chunk of rows, tile by tile. Grid: (row chunks). Activations are read and written once, sums at the end."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    channels = tl.arange(0, TILE_C)
    in_row = (channels < num_channels)[None, :]
    weight = _load_channels(weight_ptr, channels, num_channels, COMPUTE)
    weight_sum = tl.zeros((TILE_R, TILE_C), COMPUTE)
    bias_sum = tl.zeros((TILE_R, TILE_C), COMPUTE)
    gamma_sum = tl.zeros((TILE_R, TILE_C), COMPUTE)
    delta_bias_sum = tl.zeros((TILE_R, TILE_C), COMPUTE)
    for first in range(0, ROWS, TILE_R):
        rows = first_row + first + tl.arange(0, TILE_R)
        in_bounds = (rows < num_rows)[:, None] & in_row
        offsets = rows[:, None] * num_channels + channels[None, :]
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        grad = _load_rows(grad_normed_ptr, offsets, in_bounds, COMPUTE)
        keep = tl.full((TILE_R,), 1.0, COMPUTE)
        if keep_ptr is not None:
            keep = tl.load(keep_ptr + rows // rows_per_sample, mask=rows < num_rows, other=0.0).to(COMPUTE)
        if NORMS_DELTA:
            grad *= keep[:, None]
        if NORMS_DELTA:
            source = _load_branch(source_ptr, delta_bias_ptr, offsets, in_bounds, channels, num_channels, COMPUTE)
        else:
            source = _load_rows(source_ptr, offsets, in_bounds, COMPUTE)
        if ADDS_DELTA:
            branch = _load_branch(delta_ptr, delta_bias_ptr, offsets, in_bounds, channels, num_channels, COMPUTE)
            source = _add_branch(source, branch, keep, gamma_ptr, channels, num_channels, source_ptr, COMPUTE)
        normed = (source - mean[:, None]) * rstd[:, None]
        if normed_ptr is not None:
            shift = _load_channels(bias_ptr, channels, num_channels, COMPUTE)
            store_rounded(normed_ptr + offsets, normed * weight + shift, in_bounds)
        weight_sum += grad * normed
        bias_sum += grad

        grad *= weight
        offset = tl.sum(grad, axis=1) / num_channels
        slope = tl.sum(grad * normed, axis=1) / num_channels
        grad = (grad - offset[:, None] - normed * slope[:, None]) * rstd[:, None]
        if grad_stream_ptr is not None:
            grad += _load_rows(grad_stream_ptr, offsets, in_bounds, COMPUTE)
        if grad_x_ptr is not None:
            store_rounded(grad_x_ptr + offsets, grad, in_bounds)
        if not NORMS_DELTA:
            grad *= keep[:, None]
        if gamma_partial_ptr is not None:
            gamma_sum += grad * _load_branch(
                delta_ptr, delta_bias_ptr, offsets, in_bounds, channels, num_channels, COMPUTE
            )
        if gamma_ptr is not None:
            grad *= _load_channels(gamma_ptr, channels, num_channels, COMPUTE)
        if delta_bias_partial_ptr is not None:
            delta_bias_sum += grad
        if grad_delta_ptr is not None:
            store_rounded(grad_delta_ptr + offsets, grad, in_bounds)

    partials = tl.program_id(0).to(tl.int64) * num_channels + channels
    if weight_partial_ptr is not None:
        tl.store(weight_partial_ptr + partials, tl.sum(weight_sum, axis=0), mask=channels < num_channels)
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + partials, tl.sum(bias_sum, axis=0), mask=channels < num_channels)
    if gamma_partial_ptr is not None:
        tl.store(gamma_partial_ptr + partials, tl.sum(gamma_sum, axis=0), mask=channels < num_channels)
    if delta_bias_partial_ptr is not None:
        tl.store(delta_bias_partial_ptr + partials, tl.sum(delta_bias_sum, axis=0), mask=channels < num_channels)


def _rows(x: Tensor) -> tuple[int, int]:
    """Rows, and rows of one sample."""
    rows = x.numel() // x.shape[-1]
    return rows, rows if x.ndim == 1 else rows // x.shape[0]


def forward(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    delta_bias: Tensor | None,
    eps: float,
    norms_delta: bool,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's forward: stream, norm (empty where there is none), mean and 1 / deviation of each row."""
    dtype = stream_dtype(x, delta)
    stream = x.new_empty(0 if delta is None else x.shape, dtype=dtype)
    normed = x.new_empty(0 if norms_delta else x.shape, dtype=norm_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=sum_dtype(dtype)) for _ in range(2))
    if x.numel() > 0:
        rows, rows_per_sample = _rows(x)
        size = tile(x.shape[-1], dtype.itemsize if delta is None else delta.itemsize)
        with on_device_of(x):
            _residual_layer_norm_fwd_kernel[(triton.cdiv(rows, size.rows),)](
                *map(contiguous, (x, delta, weight, bias, gamma, keep, delta_bias)),
                None if delta is None else stream,
                None if norms_delta else normed,
                mean,
                rstd,
                rows,
                rows_per_sample,
                x.shape[-1],
                EPS=eps,
                COMPUTE=compute_type(dtype),
                NORMS_DELTA=norms_delta,
                TILE_R=size.rows,
                TILE_C=size.channels,
                num_warps=size.num_warps,
            )
    return stream, normed, mean, rstd


def backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    source: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    delta_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norms_delta: bool,
    adds_delta: bool,
    x_dtype: torch.dtype | None,
    delta_dtype: torch.dtype | None,
    *parameter_dtypes: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """The operator's backward: six gradients, and the norm where bias is given; what is not wanted is empty."""
    dtypes = (x_dtype, delta_dtype, None if bias is None else grad_normed.dtype)
    activations = [None if dtype is None else source.new_empty(source.shape, dtype=dtype) for dtype in dtypes]
    sums_shape = partial_shape(source)
    partials = [None if dtype is None else mean.new_empty(sums_shape) for dtype in parameter_dtypes]
    if source.numel() > 0:
        rows, rows_per_sample = _rows(source)
        size = tile(source.shape[-1], min(source.itemsize, grad_normed.itemsize))
        chunk = chunk_rows(source.shape[-1])
        tensors = (grad_normed, grad_stream, source, delta, weight, bias, gamma, keep, delta_bias, mean, rstd)
        with on_device_of(source):
            _residual_layer_norm_bwd_kernel[(triton.cdiv(rows, chunk),)](
                *map(contiguous, tensors),
                *activations,
                *partials,
                rows,
                rows_per_sample,
                source.shape[-1],
                COMPUTE=compute_type(mean.dtype),
                NORMS_DELTA=norms_delta,
                ADDS_DELTA=adds_delta,
                ROWS=chunk,
                TILE_R=size.rows,
                TILE_C=size.channels,
                num_warps=size.num_warps,
            )
    sums = (
        None if partial is None else partial.sum(0).to(dtype)
        for partial, dtype in zip(partials, parameter_dtypes, strict=True)
    )
    results = (*activations[:2], *sums, activations[2])
    return tuple(source.new_empty(0) if result is None else result for result in results)
