"""A Triton kernel that loads a few numbers of one patch. Imports triton: tests import it when they run."""

from __future__ import annotations

import triton
import triton.language as tl

from simmim_fast.ops.masked_patch_embed.kernels_rows import load_patches


@triton.jit
def load_patch_kernel(
    image_ptr,  # (1, channels, H, W)
    out_ptr,  # (NUMBERS)
    patch,
    first_number,
    num_numbers,
    height,
    width,
    PATCH_SIZE: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """The numbers of a patch from `first_number` on. Grid: (1)."""
    rows = tl.zeros((1,), tl.int64)
    numbers = first_number + tl.arange(0, NUMBERS)
    pixels = load_patches(
        image_ptr, None, None, rows, rows + patch, rows == 0, numbers, num_numbers, height, width,
        tl.float32, PATCH_SIZE, 1,
    )  # fmt: skip
    tl.store(out_ptr + tl.arange(0, NUMBERS), tl.reshape(pixels, (NUMBERS,)))
