"""Triton kernels of substitute_mask_tokens and their launchers.

A program handles a tile of P positions (of the H W of an image) by C channels. Offsets are int64: a tensor may have
more than 2^31 elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_fast._triton import compute_type, on_device_of, store_rounded
from simmim_fast.ops.substitute_mask_tokens.op import (
    CHUNK_IMAGES,
    CHUNK_POSITIONS,
    output_dtype,
    partial_dtype,
    partial_shapes,
)


class Tile(NamedTuple):
    """How a kernel is launched: the tile of one program, at most, and its warps."""

    positions: int
    channels: int
    num_warps: int


# Chosen by bytes in flight per program, not yet by measurement on a GPU.
FORWARD = Tile(positions=16, channels=256, num_warps=4)
BACKWARD = Tile(positions=CHUNK_POSITIONS, channels=128, num_warps=4)


@triton.jit
def _substitute_mask_tokens_fwd_kernel(
    x_ptr,  # (B, H, W, C)
    mask_ptr,  # (B, H, W)
    mask_token_ptr,  # (C)
    pos_embed_ptr,  # (H, W, C) or None
    out_ptr,  # (B, H, W, C)
    num_positions,  # H W
    num_channels,  # C
    COMPUTE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One tile of one image. Grid: (B x position tiles, channel tiles).

    Reads mask, positions and the visible part of x, writes out, each once; rounds at the store.
    """
    position_tiles = tl.cdiv(num_positions, TILE_P)
    image = (tl.program_id(0) // position_tiles).to(tl.int64)
    positions = (tl.program_id(0) % position_tiles).to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    in_image = positions < num_positions
    in_row = channels < num_channels
    in_bounds = in_image[:, None] & in_row[None, :]  # (P, C)
    in_tile = positions[:, None] * num_channels + channels[None, :]  # (P, C)
    in_batch = image * num_positions * num_channels + in_tile

    hidden = tl.load(mask_ptr + image * num_positions + positions, mask=in_image, other=0) != 0  # (P)
    x = tl.load(x_ptr + in_batch, mask=in_bounds & (hidden == 0)[:, None], other=0.0).to(COMPUTE)
    mask_token = tl.load(mask_token_ptr + channels, mask=in_row, other=0.0).to(COMPUTE)
    out = tl.where(hidden[:, None], mask_token[None, :], x)
    if pos_embed_ptr is not None:
        out += tl.load(pos_embed_ptr + in_tile, mask=in_bounds, other=0.0).to(COMPUTE)
    store_rounded(out_ptr + in_batch, out, in_bounds)


@triton.jit(do_not_specialize=["num_images"])
def _substitute_mask_tokens_bwd_kernel(
    grad_out_ptr,  # (B, H, W, C)
    mask_ptr,  # (B, H, W)
    grad_x_ptr,  # (B, H, W, C) or None
    token_partial_ptr,  # (image chunks x position tiles, C) or None
    pos_partial_ptr,  # (image chunks, H, W, C) or None
    num_images,  # B
    num_positions,  # H W
    num_channels,  # C
    COMPUTE: tl.constexpr,
    IMAGES: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """One tile through a chunk of images. Grid: (image chunks x position tiles, channel tiles).

    Reads grad_out and mask, writes grad_x, each once, and the chunk's sums; grad_x rounds at the store.
    """
    position_tiles = tl.cdiv(num_positions, TILE_P)
    image_chunk = (tl.program_id(0) // position_tiles).to(tl.int64)
    positions = (tl.program_id(0) % position_tiles).to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    in_image = positions < num_positions
    in_row = channels < num_channels
    in_bounds = in_image[:, None] & in_row[None, :]  # (P, C)
    in_tile = positions[:, None] * num_channels + channels[None, :]  # (P, C)

    token_sum = tl.zeros((TILE_P, TILE_C), COMPUTE)
    pos_sum = tl.zeros((TILE_P, TILE_C), COMPUTE)
    first_image = image_chunk * IMAGES
    for image in range(first_image, tl.minimum(first_image + IMAGES, num_images)):
        in_batch = image * num_positions * num_channels + in_tile
        hidden = tl.load(mask_ptr + image * num_positions + positions, mask=in_image, other=0) != 0  # (P)
        grad = tl.load(grad_out_ptr + in_batch, mask=in_bounds, other=0.0).to(COMPUTE)
        if grad_x_ptr is not None:
            store_rounded(grad_x_ptr + in_batch, tl.where(hidden[:, None], 0.0, grad), in_bounds)
        token_sum += tl.where(hidden[:, None], grad, 0.0)
        pos_sum += grad

    if token_partial_ptr is not None:
        partial = tl.program_id(0).to(tl.int64) * num_channels + channels
        tl.store(token_partial_ptr + partial, tl.sum(token_sum, axis=0), mask=in_row)
    if pos_partial_ptr is not None:
        tl.store(pos_partial_ptr + image_chunk * num_positions * num_channels + in_tile, pos_sum, mask=in_bounds)


def forward(x: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> Tensor:
    """The operator's forward: out (B, H, W, C)."""
    images, height, width, channels = x.shape
    positions = height * width
    out = x.new_empty(x.shape, dtype=output_dtype(x, mask_token, pos_embed))
    if out.numel() == 0:
        return out
    tile_channels = min(FORWARD.channels, triton.next_power_of_2(channels))
    grid = (images * triton.cdiv(positions, FORWARD.positions), triton.cdiv(channels, tile_channels))
    with on_device_of(x):
        _substitute_mask_tokens_fwd_kernel[grid](
            x.contiguous(),
            mask.contiguous(),
            mask_token.contiguous(),
            None if pos_embed is None else pos_embed.contiguous(),
            out,
            positions,
            channels,
            COMPUTE=compute_type(out.dtype),
            TILE_P=FORWARD.positions,
            TILE_C=tile_channels,
            num_warps=FORWARD.num_warps,
        )
    return out


def backward(
    grad_out: Tensor,
    mask: Tensor,
    x_dtype: torch.dtype | None,
    token_dtype: torch.dtype | None,
    pos_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's backward: grad_x (B, H, W, C), grad_token (C), grad_pos (H, W, C); empty where dtype is None."""
    images, height, width, channels = grad_out.shape
    positions = height * width
    grad_x = None if x_dtype is None else grad_out.new_empty(grad_out.shape, dtype=x_dtype)
    token_partial, pos_partial = (
        None if dtype is None else grad_out.new_empty(shape, dtype=partial_dtype(grad_out.dtype))
        for shape, dtype in zip(partial_shapes(grad_out), (token_dtype, pos_dtype), strict=True)
    )
    if grad_out.numel() > 0:
        tile_channels = min(BACKWARD.channels, triton.next_power_of_2(channels))
        chunks = triton.cdiv(images, CHUNK_IMAGES) * triton.cdiv(positions, BACKWARD.positions)
        with on_device_of(grad_out):
            _substitute_mask_tokens_bwd_kernel[(chunks, triton.cdiv(channels, tile_channels))](
                grad_out.contiguous(),
                mask.contiguous(),
                grad_x,
                token_partial,
                pos_partial,
                images,
                positions,
                channels,
                COMPUTE=compute_type(grad_out.dtype),
                IMAGES=CHUNK_IMAGES,
                TILE_P=BACKWARD.positions,
                TILE_C=tile_channels,
                num_warps=BACKWARD.num_warps,
            )
    return (
        grad_out.new_empty(0) if grad_x is None else grad_x,
        grad_out.new_empty(0) if token_partial is None else token_partial.sum(0).to(token_dtype),
        grad_out.new_empty(0) if pos_partial is None else pos_partial.sum(0).to(pos_dtype),
    )
