"""Triton kernels of masked_l1_loss and their launchers.

A program handles a chunk of rows, a row being one line of one channel of one image. Offsets are int64: a tensor may
have more than 2^31 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_fast._triton import compute_type, on_device_of, store_rounded
from simmim_fast.ops.masked_l1_loss.op import CHUNK_ROWS, chunk_count, loss_dtype

# Chosen by bytes in flight per program, not yet by measurement on a GPU.
TILE_COLUMNS = 256
TILE_CHUNKS = 1024
TILE_PIXELS = 4096
NUM_WARPS = 4


@triton.jit
def _masked_l1_loss_fwd_kernel(
    prediction_ptr,  # (B, channels, H, W)
    target_ptr,  # (B, channels, H, W)
    mask_ptr,  # (B, H / patch, W / patch)
    mean_ptr,  # (channels) or None
    std_ptr,  # (channels) or None
    sign_ptr,  # (B, channels, H, W) or None
    sum_ptr,  # (chunks)
    count_ptr,  # (chunks)
    num_rows,  # B channels H
    num_channels,
    height,
    width,
    PATCH: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One chunk of rows. Grid: (chunks).

    Reads mask, and prediction and target where masked, and writes the signs, each once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_rows
    channels = (rows // height) % num_channels
    mask_rows = (rows // height // num_channels * (height // PATCH) + rows % height // PATCH) * (width // PATCH)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    count = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        in_bounds = in_batch[:, None] & (columns < width)[None, :]
        hidden = tl.load(mask_ptr + mask_rows[:, None] + (columns // PATCH)[None, :], mask=in_bounds, other=0) != 0
        offsets = rows[:, None] * width + columns[None, :]
        prediction = tl.load(prediction_ptr + offsets, mask=hidden, other=0.0).to(COMPUTE)
        target = tl.load(target_ptr + offsets, mask=hidden, other=0).to(COMPUTE)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + channels, mask=in_batch, other=0.0).to(COMPUTE)
            std = tl.load(std_ptr + channels, mask=in_batch, other=1.0).to(COMPUTE)
            target = tl.where(hidden, (target / 255 - mean[:, None]) / std[:, None], 0.0)
        residual = prediction - target
        total += tl.abs(residual)
        count += (hidden & (channels == 0)[:, None]).to(tl.int32)
        if sign_ptr is not None:
            sign = (residual > 0).to(tl.int8) - (residual < 0).to(tl.int8)
            tl.store(sign_ptr + offsets, sign, mask=in_bounds)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0).to(tl.float64))
    tl.store(count_ptr + tl.program_id(0), tl.sum(tl.sum(count, axis=1), axis=0).to(tl.int64))


@triton.jit
def _masked_l1_loss_sum_kernel(
    sum_ptr,  # (chunks)
    count_ptr,  # (chunks)
    loss_ptr,  # ()
    scale_ptr,  # ()
    num_chunks,
    num_channels,
    COMPUTE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Adds the chunks up, in float64 and in order. Grid: (1)."""
    total = tl.zeros((CHUNKS,), tl.float64)
    count = tl.zeros((CHUNKS,), tl.int64)
    for first in range(0, num_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)
        total += tl.load(sum_ptr + chunks, mask=chunks < num_chunks, other=0.0)
        count += tl.load(count_ptr + chunks, mask=chunks < num_chunks, other=0)
    denominator = (tl.sum(count, axis=0).to(tl.float32) + 1e-5).to(COMPUTE)
    scale = 1 / denominator / num_channels
    tl.store(scale_ptr, scale)
    tl.store(loss_ptr, (tl.sum(total, axis=0) * scale).to(COMPUTE))


@triton.jit
def _masked_l1_loss_bwd_kernel(
    grad_loss_ptr,  # ()
    sign_ptr,  # (pixels)
    scale_ptr,  # ()
    grad_prediction_ptr,  # (pixels)
    num_pixels,
    COMPUTE: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The sign times the gradient of the loss times its scale. Grid: (tiles of pixels)."""
    pixels = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    factor = tl.load(grad_loss_ptr).to(COMPUTE) * tl.load(scale_ptr)
    sign = tl.load(sign_ptr + pixels, mask=pixels < num_pixels, other=0).to(COMPUTE)
    store_rounded(grad_prediction_ptr + pixels, sign * factor, pixels < num_pixels)


def forward(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    patch_size: int,
    keep_sign: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's forward: loss (), sign (B, channels, H, W) or (0), scale ()."""
    images, channels, height, width = prediction.shape
    chunks = chunk_count(prediction)
    loss, scale = (prediction.new_empty((), dtype=loss_dtype(prediction.dtype)) for _ in range(2))
    sign = prediction.new_empty(prediction.shape if keep_sign else (0,), dtype=torch.int8)
    sums, counts = (prediction.new_empty(chunks, dtype=dtype) for dtype in (torch.float64, torch.int64))
    compute = compute_type(prediction.dtype)
    with on_device_of(prediction):
        if prediction.numel() > 0:
            _masked_l1_loss_fwd_kernel[(chunks,)](
                prediction.contiguous(),
                target.contiguous(),
                mask.contiguous(),
                None if mean is None else mean.contiguous(),
                None if std is None else std.contiguous(),
                sign if keep_sign else None,
                sums,
                counts,
                images * channels * height,
                channels,
                height,
                width,
                PATCH=patch_size,
                COMPUTE=compute,
                ROWS=CHUNK_ROWS,
                COLUMNS=min(TILE_COLUMNS, triton.next_power_of_2(width)),
                num_warps=NUM_WARPS,
            )
        _masked_l1_loss_sum_kernel[(1,)](
            sums,
            counts,
            loss,
            scale,
            chunks if prediction.numel() > 0 else 0,
            channels,
            COMPUTE=compute,
            CHUNKS=TILE_CHUNKS,
            num_warps=NUM_WARPS,
        )
    return loss, sign, scale


def backward(grad_loss: Tensor, sign: Tensor, scale: Tensor, prediction_dtype: torch.dtype) -> Tensor:
    """The operator's backward: grad_prediction (B, channels, H, W)."""
    grad_prediction = sign.new_empty(sign.shape, dtype=prediction_dtype)
    pixels = sign.numel()
    if pixels > 0:
        with on_device_of(sign):
            _masked_l1_loss_bwd_kernel[(triton.cdiv(pixels, TILE_PIXELS),)](
                grad_loss,
                sign.contiguous(),
                scale,
                grad_prediction,
                pixels,
                COMPUTE=compute_type(prediction_dtype),
                PIXELS=TILE_PIXELS,
                num_warps=NUM_WARPS,
            )
    return grad_prediction
