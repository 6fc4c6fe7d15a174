"""What the Triton kernels of masked_patch_embed do with a tile of rows: find them, gather, project and normalise.

Letters as in op.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simmim_fast._triton import dot
from simmim_fast.ops.masked_patch_embed.op import Tile


def tile_constants(tile: Tile) -> dict[str, int]:
    """As the kernels and their launches take them."""
    return {"TILE_R": tile.rows, "TILE_C": tile.channels, "TILE_D": tile.numbers, "num_warps": tile.num_warps}


@triton.jit
def row_patches(visible_ptr, mask_ptr, rows, total_rows, rows_per_image, num_patches):
    """Image and patch of each row (int64), and whether the patch is there and visible."""
    images = rows // rows_per_image
    patches = rows % rows_per_image
    valid = rows < total_rows
    if visible_ptr is not None:
        patches = tl.load(visible_ptr + rows, mask=valid, other=-1).to(tl.int64)
        valid = (patches >= 0) & (patches < num_patches)
    hidden = tl.load(mask_ptr + images * num_patches + patches, mask=valid, other=1) != 0
    return images, patches, valid & (hidden == 0)


@triton.jit
def load_patches(
    image_ptr,  # (B, channels, H, W)
    mean_ptr,  # (channels) or None
    std_ptr,  # (channels) or None
    images,
    patches,
    valid,
    numbers,
    num_numbers,  # D
    height,  # H
    width,  # W
    COMPUTE: tl.constexpr,
    PATCH_SIZE: tl.constexpr,
    RUN: tl.constexpr,
):
    """The given numbers of patches, (rows, numbers), 0 where not valid. RUN numbers in a row lie side by side."""
    channels = numbers // (PATCH_SIZE * PATCH_SIZE)
    in_patch = (channels.to(tl.int64) * height + numbers // PATCH_SIZE % PATCH_SIZE) * width + numbers % PATCH_SIZE
    patches_per_line = width // PATCH_SIZE
    lines = images * (num_numbers // (PATCH_SIZE * PATCH_SIZE)) * height + patches // patches_per_line * PATCH_SIZE
    corners = lines * width + patches % patches_per_line * PATCH_SIZE
    offsets = corners[:, None] + in_patch[None, :]
    offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, RUN)), (1, RUN))
    in_bounds = valid[:, None] & (numbers < num_numbers)[None, :]
    pixels = tl.load(image_ptr + offsets, mask=in_bounds, other=0)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + channels, mask=numbers < num_numbers, other=0.0).to(COMPUTE)
        std = tl.load(std_ptr + channels, mask=numbers < num_numbers, other=1.0).to(COMPUTE)
        pixels = tl.where(in_bounds, (pixels.to(COMPUTE) / 255 - mean[None, :]) / std[None, :], 0.0)
    return pixels


@triton.jit
def project(
    image_ptr,
    mean_ptr,
    std_ptr,
    weight_ptr,  # (C, D)
    bias_ptr,  # (C)
    images,
    patches,
    valid,
    channels,
    num_channels,  # C
    num_numbers,
    height,
    width,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    PATCH_SIZE: tl.constexpr,
    RUN: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """weight patch + bias, (rows, channels)."""
    out = tl.zeros((TILE_R, TILE_C), COMPUTE)
    in_token = channels < num_channels
    for first in range(0, num_numbers, TILE_D):
        numbers = first + tl.arange(0, TILE_D)
        pixels = load_patches(
            image_ptr, mean_ptr, std_ptr, images, patches, valid, numbers, num_numbers, height, width,
            COMPUTE, PATCH_SIZE, RUN,
        )  # fmt: skip
        weight = tl.load(
            weight_ptr + channels.to(tl.int64)[:, None] * num_numbers + numbers[None, :],
            mask=in_token[:, None] & (numbers < num_numbers)[None, :],
            other=0.0,
        )
        out += dot(pixels, tl.trans(weight), OPERAND)
    return out + tl.load(bias_ptr + channels, mask=in_token, other=0.0).to(COMPUTE)[None, :]


@triton.jit
def normalise(x, channels, num_channels, EPS: tl.constexpr):
    """(x - mean) / standard deviation over the channels of each row, 0 beyond the last one; and 1 / deviation."""
    in_token = (channels < num_channels)[None, :]
    centred = tl.where(in_token, x - (tl.sum(x, axis=1) / num_channels)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / num_channels
    inverse = 1 / tl.sqrt(variance + tl.full((), EPS, x.dtype))
    return centred * inverse[:, None], inverse
