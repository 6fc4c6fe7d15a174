"""Triton kernels of linear_masked_loss and their launchers.

Tiles are of rows (tokens of the batch that are computed: listed ones, or all), of outputs of the head, and of channels.
Offsets are int64: a tensor may have more than 2^31 elements.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_fast._triton import compute_type, contiguous, dot, mask_if, on_device_of, store_rounded
from simmim_fast.ops.linear_masked_loss.op import (
    TILE_CHANNELS,
    TILE_OUTPUTS,
    TILE_TOKENS,
    chunk_count,
    loss_dtype,
    row_chunks,
    row_count,
    slope_dtype,
)

# Chosen by registers and shared memory, not yet by measurement on a GPU.
TILE_ROWS = 64
TILE_DEPTH = {2: 64, 4: 32, 8: 16}  # by bytes of an operand
TILE_CHUNKS = 1024
NUM_WARPS = 8
NUM_STAGES = 3
# Deeper pipelines of thinner tiles, as compute capability 8.0 has too few registers for more.
BACKWARD_PIPELINE = {size: {"DEPTH": min(depth, 32), "num_stages": 4} for size, depth in TILE_DEPTH.items()}
WRONG_TOKEN = tl.constexpr(1 << 40)  # more than there are pixels


@triton.jit
def _row_tokens(tokens_ptr, rows, num_rows, slots, grid):
    """Image and token of rows, whether each is on the grid, and 1 where it is wrong: off the grid or not ascending."""
    in_batch = rows < num_rows
    image, token = rows // slots, rows % slots
    wrong = tl.zeros(rows.shape, tl.int64)
    if tokens_ptr is not None:
        before = tl.load(tokens_ptr + rows - 1, mask=in_batch & (token > 0), other=-1).to(tl.int64)
        token = tl.load(tokens_ptr + rows, mask=in_batch, other=0).to(tl.int64)
        wrong = (in_batch & ((token < 0) | (token >= grid) | (token <= before))).to(tl.int64)
    return image, token, in_batch & (token >= 0) & (token < grid), wrong


@triton.jit
def _linear_masked_loss_fwd_kernel(
    features_ptr,  # (B, h, w, D)
    weight_ptr,  # (outputs, D)
    bias_ptr,  # (outputs)
    target_ptr,  # (B, channels, h s, w s)
    mask_ptr,  # (B, h s / patch, w s / patch)
    tokens_ptr,  # (B, slots) or None
    mean_ptr,  # (channels) or None
    std_ptr,  # (channels) or None
    slope_ptr,  # (B, slots, outputs) or None
    sum_ptr,  # (row tiles, output tiles)
    count_ptr,  # (row tiles, output tiles)
    num_rows,  # B slots
    slots,
    num_outputs,
    depth,  # D
    height,  # h
    width,  # w
    num_channels,
    STRIDE: tl.constexpr,
    PATCH: tl.constexpr,
    LOSS: tl.constexpr,  # 0: L1, 1: L2, 2: smooth L1
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The product, the residuals and their loss for one tile. Grid: (row tiles, output tiles).

    Reads target where masked and writes slopes, each once; the prediction stays in registers.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = outputs < num_outputs
    image, token, is_row, wrong = _row_tokens(tokens_ptr, rows, num_rows, slots, height * width)
    feature_rows = features_ptr + (image * height * width + token) * depth  # (ROWS)
    weight_rows = weight_ptr + outputs.to(tl.int64) * depth  # (OUTPUTS)
    prediction = tl.zeros((ROWS, OUTPUTS), COMPUTE)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        in_depth = k < depth
        a = tl.load(feature_rows[:, None] + k[None, :], mask=is_row[:, None] & in_depth[None, :], other=0.0)
        b = tl.load(weight_rows[None, :] + k[:, None], mask=is_output[None, :] & in_depth[:, None], other=0.0)
        prediction += dot(a, b, OPERAND)
    prediction += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(COMPUTE)[None, :]

    channel = outputs // (STRIDE * STRIDE)
    y = (token // width * STRIDE)[:, None] + (outputs // STRIDE % STRIDE)[None, :]  # (ROWS, OUTPUTS)
    x = (token % width * STRIDE)[:, None] + (outputs % STRIDE)[None, :]
    in_bounds = is_row[:, None] & is_output[None, :]
    image_height, image_width = height * STRIDE, width * STRIDE
    cell = (image[:, None] * (image_height // PATCH) + y // PATCH) * (image_width // PATCH) + x // PATCH
    hidden = tl.load(mask_ptr + cell, mask=in_bounds, other=0) != 0
    pixel = ((image * num_channels)[:, None] + channel[None, :]) * image_height * image_width + y * image_width + x
    target = tl.load(target_ptr + pixel, mask=hidden, other=0).to(COMPUTE)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channel, mask=is_output, other=0.0).to(COMPUTE)
        std = tl.load(std_ptr + channel, mask=is_output, other=1.0).to(COMPUTE)
        target = (target / 255 - mean[None, :]) / std[None, :]
    residual = tl.where(hidden, prediction - target, 0.0)
    size = tl.abs(residual)
    if LOSS == 0:
        loss = size
        slope = (residual > 0).to(COMPUTE) - (residual < 0).to(COMPUTE)
    elif LOSS == 1:
        loss = size * size
        slope = 2 * residual
    else:
        loss = tl.where(size < 1, size * size / 2, size - 0.5)
        slope = tl.where(residual > 1, 1.0, tl.where(residual < -1, -1.0, residual))
    if slope_ptr is not None:
        in_slopes = (rows < num_rows)[:, None] & is_output[None, :]
        at = slope_ptr + rows[:, None] * num_outputs + outputs[None, :]
        if LOSS == 0:
            tl.store(at, slope.to(tl.int8), mask=in_slopes)
        else:
            store_rounded(at, slope, in_slopes)
    counted = (hidden & (channel == 0)[None, :]).to(tl.int64)
    count = tl.sum(tl.sum(counted, axis=1), axis=0) - tl.sum(wrong, axis=0) * WRONG_TOKEN
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sum_ptr + tile, tl.sum(tl.sum(loss, axis=1), axis=0).to(tl.float64))
    tl.store(count_ptr + tile, count)


@triton.jit
def _linear_masked_loss_sum_kernel(
    sum_ptr,  # (chunks)
    count_ptr,  # (chunks): masked pixels under the tokens that were computed
    masked_ptr,  # (): masked entries of the mask
    loss_ptr,  # ()
    scale_ptr,  # ()
    num_chunks,
    num_channels,
    PATCH: tl.constexpr,
    COMPUTE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Adds the chunks up, in float64 and in order; NaN where tokens do not fit the mask. Grid: (1)."""
    total = tl.zeros((CHUNKS,), tl.float64)
    count = tl.zeros((CHUNKS,), tl.int64)
    for first in range(0, num_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)
        total += tl.load(sum_ptr + chunks, mask=chunks < num_chunks, other=0.0)
        count += tl.load(count_ptr + chunks, mask=chunks < num_chunks, other=0)
    pixels = tl.load(masked_ptr) * (PATCH * PATCH)
    denominator = (pixels.to(tl.float32) + 1e-5).to(COMPUTE)
    scale = tl.where(tl.sum(count, axis=0) == pixels, 1 / denominator / num_channels, float("nan"))
    tl.store(scale_ptr, scale)
    tl.store(loss_ptr, (tl.sum(total, axis=0) * scale).to(COMPUTE))


@triton.jit
def _linear_masked_loss_bwd_features_kernel(
    grad_loss_ptr,  # ()
    scale_ptr,  # ()
    weight_ptr,  # (outputs, D)
    slope_ptr,  # (B, slots, outputs)
    tokens_ptr,  # (B, slots) or None
    grad_features_ptr,  # (B, h, w, D)
    num_rows,  # B slots
    slots,
    grid,  # h w
    num_outputs,
    depth,  # D
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """slope weight for one tile. Grid: (row tiles, channel tiles)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channels < depth
    image, token, is_row, _ = _row_tokens(tokens_ptr, rows, num_rows, slots, grid)
    product = tl.zeros((ROWS, CHANNELS), COMPUTE)
    for first in range(0, num_outputs, DEPTH):
        outputs = first + tl.arange(0, DEPTH)
        is_output = outputs < num_outputs
        in_slopes = is_row[:, None] & is_output[None, :]
        a = tl.load(slope_ptr + rows[:, None] * num_outputs + outputs[None, :], mask=in_slopes, other=0)
        in_weight = is_output[:, None] & is_channel[None, :]
        b = tl.load(weight_ptr + outputs.to(tl.int64)[:, None] * depth + channels[None, :], mask=in_weight, other=0.0)
        product += dot(a, b, OPERAND)
    factor = tl.load(grad_loss_ptr).to(COMPUTE) * tl.load(scale_ptr)
    at = grad_features_ptr + (image * grid + token)[:, None] * depth + channels[None, :]
    store_rounded(at, product * factor, is_row[:, None] & is_channel[None, :])


@triton.jit
def _linear_masked_loss_bwd_weight_kernel(
    grad_loss_ptr,  # ()
    scale_ptr,  # ()
    features_ptr,  # (B, h, w, D)
    slope_ptr,  # (B, slots, outputs)
    tokens_ptr,  # (B, slots) or None
    grad_weight_ptr,  # (chunks, outputs, D) or None
    grad_bias_ptr,  # (chunks, outputs) or None
    chunk_rows,
    num_rows,  # B slots
    slots,
    grid,  # h w
    num_outputs,
    depth,  # D
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """slope' features for one tile, through a chunk of rows in order; the first channel tile also sums the slopes.

    Grid: (output tiles, channel tiles, chunks).
    """
    chunk = tl.program_id(2).to(tl.int64)
    first_row = chunk * chunk_rows
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_output, is_channel = outputs < num_outputs, channels < depth
    product = tl.zeros((OUTPUTS, CHANNELS), COMPUTE)
    total = tl.zeros((OUTPUTS,), COMPUTE)
    for first in range(0, tl.minimum(chunk_rows, num_rows - first_row), DEPTH):
        rows = first_row + first + tl.arange(0, DEPTH)
        image, token, is_row, _ = _row_tokens(tokens_ptr, rows, num_rows, slots, grid)
        in_slopes = is_row[:, None] & is_output[None, :]
        slope = tl.load(slope_ptr + rows[:, None] * num_outputs + outputs[None, :], mask=in_slopes, other=0)
        total += tl.sum(slope.to(COMPUTE), axis=0)
        if grad_weight_ptr is not None:
            at = features_ptr + (image * grid + token)[:, None] * depth + channels[None, :]
            b = tl.load(at, mask=is_row[:, None] & is_channel[None, :], other=0.0)
            product += dot(tl.trans(slope), b, OPERAND)
    factor = tl.load(grad_loss_ptr).to(COMPUTE) * tl.load(scale_ptr)
    if grad_weight_ptr is not None:
        at = grad_weight_ptr + (chunk * num_outputs + outputs)[:, None] * depth + channels[None, :]
        store_rounded(at, product * factor, is_output[:, None] & is_channel[None, :])
    if grad_bias_ptr is not None:
        at = grad_bias_ptr + chunk * num_outputs + outputs
        store_rounded(at, total * factor, mask_if(is_output, tl.program_id(1) == 0))


_OPERANDS = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _shared_options(features: Tensor) -> dict[str, object]:
    """Constants and launch options that the kernels have in common."""
    return {
        "OPERAND": _OPERANDS[features.dtype],
        "COMPUTE": compute_type(features.dtype),
        "DEPTH": TILE_DEPTH[features.itemsize],
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
    }


def forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    mask: Tensor,
    tokens: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    patch_size: int,
    loss: int,
    keep_slope: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's forward: loss (), slope (B, slots, outputs) or (0), scale ()."""
    images, height, width, depth = features.shape
    outputs, channels = weight.shape[0], target.shape[1]
    slots = height * width if tokens is None else tokens.shape[1]
    rows, chunks = row_count(features, tokens), chunk_count(features, weight, tokens)
    value, scale = (features.new_empty((), dtype=loss_dtype(features.dtype)) for _ in range(2))
    shape = (images, slots, outputs) if keep_slope else (0,)
    slope = features.new_empty(shape, dtype=slope_dtype(features.dtype, loss))
    sums, counts = (features.new_empty(chunks, dtype=dtype) for dtype in (torch.float64, torch.int64))
    with on_device_of(features):
        if chunks > 0:
            _linear_masked_loss_fwd_kernel[(triton.cdiv(rows, TILE_TOKENS), triton.cdiv(outputs, TILE_OUTPUTS))](
                *map(contiguous, (features, weight, bias, target, mask, tokens, mean, std)),
                slope if keep_slope else None,
                sums,
                counts,
                *(rows, slots, outputs, depth, height, width, channels),
                STRIDE=math.isqrt(outputs // channels),
                PATCH=patch_size,
                LOSS=loss,
                ROWS=TILE_TOKENS,
                OUTPUTS=TILE_OUTPUTS,
                **_shared_options(features),
            )
        _linear_masked_loss_sum_kernel[(1,)](
            *(sums, counts, mask.sum(), value, scale),
            *(chunks, channels),
            PATCH=patch_size,
            COMPUTE=compute_type(features.dtype),
            CHUNKS=TILE_CHUNKS,
        )
    return value, slope, scale


def backward(
    grad_loss: Tensor,
    features: Tensor,
    weight: Tensor,
    slope: Tensor,
    scale: Tensor,
    mask: Tensor,
    tokens: Tensor | None,
    channels: int,
    patch_size: int,
    loss: int,
    needs_features: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's backward: grad_features (B, h, w, D), grad_weight (outputs, D), grad_bias (outputs); or empty."""
    rows, grid = row_count(features, tokens), features.shape[1] * features.shape[2]
    (outputs, depth), options = weight.shape, _shared_options(features) | BACKWARD_PIPELINE[features.itemsize]
    slope, tokens = slope.contiguous(), contiguous(tokens)
    sizes = (rows, grid if tokens is None else tokens.shape[1], grid, outputs, depth)
    allocate = features.new_empty if tokens is None else features.new_zeros
    grad_features = allocate(features.shape if needs_features else (0,))
    chunks, chunk_rows = row_chunks(rows, weight)
    shapes = ((chunks, outputs, depth) if needs_weight else (1, 0), (chunks, outputs) if needs_bias else (1, 0))
    dtype = features.dtype if chunks == 1 else loss_dtype(features.dtype)
    grad_weight, grad_bias = (features.new_empty(shape, dtype=dtype) for shape in shapes)
    tiles = triton.cdiv(depth, TILE_CHANNELS)
    with on_device_of(features):
        if needs_features and rows > 0:
            _linear_masked_loss_bwd_features_kernel[(triton.cdiv(rows, TILE_ROWS), tiles)](
                *(grad_loss, scale, weight.contiguous(), slope, tokens, grad_features),
                *sizes,
                ROWS=TILE_ROWS,
                CHANNELS=TILE_CHANNELS,
                **options,
            )
        if needs_weight or needs_bias:
            programs = (triton.cdiv(outputs, TILE_OUTPUTS), tiles if needs_weight else 1, chunks)
            _linear_masked_loss_bwd_weight_kernel[programs](
                *(grad_loss, scale, features.contiguous(), slope, tokens),
                grad_weight if needs_weight else None,
                grad_bias if needs_bias else None,
                chunk_rows,
                *sizes,
                OUTPUTS=TILE_OUTPUTS,
                CHANNELS=TILE_CHANNELS,
                **options,
            )
    return grad_features, _added(grad_weight, features.dtype), _added(grad_bias, features.dtype)


def _added(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis, in order."""
    return partial[0] if partial.shape[0] == 1 else partial.sum(0).to(dtype)
