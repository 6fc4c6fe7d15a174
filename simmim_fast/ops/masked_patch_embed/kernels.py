"""Triton kernels of masked_patch_embed and their launchers.

Patches are gathered from the image as the products need them; a tile without a visible patch is skipped. Offsets are
int64: a tensor may have more than 2^31 elements. Letters as in op.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_fast._triton import OPERAND_TYPES, compute_type, contiguous, dot, on_device_of, store_rounded
from simmim_fast.ops.masked_patch_embed.kernels_rows import (
    load_patches,
    normalise,
    project,
    row_patches,
    tile_constants,
)
from simmim_fast.ops.masked_patch_embed.op import (
    CHUNK_IMAGES,
    CHUNK_POSITIONS,
    Tile,
    check_listed,
    chunk_rows,
    differentiates_norm,
    gradient_shapes,
    row_tile,
    sum_dtype,
    sums_tokens,
    sums_weight,
    total_rows,
    wanted_workspaces,
    weight_tile,
    workspace_shapes,
)

TOKEN_TILE_CHANNELS = 128
SIZES = ("total_rows", "rows_per_image", "num_patches", "num_channels", "num_numbers", "height", "width")


@triton.jit
def _masked_patch_embed_fwd_hidden_kernel(
    mask_ptr,  # (B, P)
    mask_token_ptr,  # (C)
    pos_embed_ptr,  # (P, C) or None
    out_ptr,  # (B, P, C)
    num_patches,  # P
    num_channels,  # C
    POISON: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Token and positions where hidden, and NaN elsewhere if POISON. Grid: (B x position tiles, channel tiles)."""
    position_tiles = tl.cdiv(num_patches, TILE_P)
    image = (tl.program_id(0) // position_tiles).to(tl.int64)
    patches = (tl.program_id(0) % position_tiles).to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    in_image, in_token = patches < num_patches, channels < num_channels
    hidden = tl.load(mask_ptr + image * num_patches + patches, mask=in_image, other=0) != 0
    in_tile = patches[:, None] * num_channels + channels[None, :]  # (P, C)
    in_bounds = (hidden & in_image)[:, None] & in_token[None, :]

    token = tl.load(mask_token_ptr + channels, mask=in_token, other=0.0).to(COMPUTE)
    out = tl.broadcast_to(token[None, :], (TILE_P, TILE_C))
    if pos_embed_ptr is not None:
        out += tl.load(pos_embed_ptr + in_tile, mask=in_bounds, other=0.0).to(COMPUTE)
    if POISON:
        out = tl.where(hidden[:, None], out, float("nan"))
        in_bounds = in_image[:, None] & in_token[None, :]
    store_rounded(out_ptr + image * num_patches * num_channels + in_tile, out, in_bounds)


@triton.jit(do_not_specialize=["total_rows"])
def _masked_patch_embed_fwd_kernel(
    image_ptr,  # (B, channels, H, W)
    mask_ptr,  # (B, P)
    weight_ptr,  # (C, D)
    bias_ptr,  # (C)
    norm_weight_ptr,  # (C) or None
    norm_bias_ptr,  # (C) or None
    pos_embed_ptr,  # (P, C) or None
    mean_ptr,  # (channels) or None
    std_ptr,  # (channels) or None
    visible_ptr,  # (B, K) or None
    out_ptr,  # (B, P, C)
    total_rows,  # B R
    rows_per_image,  # R
    num_patches,  # P
    num_channels,  # C
    num_numbers,  # D
    height,  # H
    width,  # W
    EPS: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    PATCH_SIZE: tl.constexpr,
    RUN: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """A tile of rows, all channels of a token with a norm. Grid: (row tiles, channel tiles). Rounds at the store."""
    rows = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    images, patches, valid = row_patches(visible_ptr, mask_ptr, rows, total_rows, rows_per_image, num_patches)
    if tl.max(valid.to(tl.int32), axis=0) > 0:
        in_token = channels < num_channels
        out = project(
            image_ptr, mean_ptr, std_ptr, weight_ptr, bias_ptr, images, patches, valid, channels, num_channels,
            num_numbers, height, width, OPERAND, COMPUTE, PATCH_SIZE, RUN, TILE_R, TILE_C, TILE_D,
        )  # fmt: skip
        if norm_weight_ptr is not None:
            normed, _ = normalise(out, channels, num_channels, EPS)
            norm_weight = tl.load(norm_weight_ptr + channels, mask=in_token, other=0.0).to(COMPUTE)
            norm_bias = tl.load(norm_bias_ptr + channels, mask=in_token, other=0.0).to(COMPUTE)
            out = normed * norm_weight[None, :] + norm_bias[None, :]
        in_bounds = valid[:, None] & in_token[None, :]
        if pos_embed_ptr is not None:
            positions = patches[:, None] * num_channels + channels[None, :]
            out += tl.load(pos_embed_ptr + positions, mask=in_bounds, other=0.0).to(COMPUTE)
        offsets = (images * num_patches + patches)[:, None] * num_channels + channels[None, :]
        store_rounded(out_ptr + offsets, out, in_bounds)


@triton.jit(do_not_specialize=["num_images"])
def _masked_patch_embed_bwd_tokens_kernel(
    grad_out_ptr,  # (B, P, C)
    mask_ptr,  # (B, P)
    embedded_partial_ptr,  # (image chunks x position tiles, C) or None
    token_partial_ptr,  # (image chunks x position tiles, C) or None
    pos_partial_ptr,  # (image chunks, P, C) or None
    num_images,  # B
    num_patches,  # P
    num_channels,  # C
    COMPUTE: tl.constexpr,
    IMAGES: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Sums of grad_out: visible, hidden, over images. Grid: (image chunks x position tiles, channel tiles)."""
    position_tiles = tl.cdiv(num_patches, TILE_P)
    image_chunk = (tl.program_id(0) // position_tiles).to(tl.int64)
    patches = (tl.program_id(0) % position_tiles).to(tl.int64) * TILE_P + tl.arange(0, TILE_P)
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    in_image, in_token = patches < num_patches, channels < num_channels
    in_bounds = in_image[:, None] & in_token[None, :]
    in_tile = patches[:, None] * num_channels + channels[None, :]  # (P, C)

    embedded_sum = tl.zeros((TILE_P, TILE_C), COMPUTE)
    token_sum = tl.zeros((TILE_P, TILE_C), COMPUTE)
    first_image = image_chunk * IMAGES
    for image in range(first_image, tl.minimum(first_image + IMAGES, num_images)):
        hidden = tl.load(mask_ptr + image * num_patches + patches, mask=in_image, other=0) != 0
        loaded = in_bounds
        if embedded_partial_ptr is None and pos_partial_ptr is None:
            loaded = in_bounds & hidden[:, None]
        grad = tl.load(grad_out_ptr + image * num_patches * num_channels + in_tile, mask=loaded, other=0.0).to(COMPUTE)
        embedded_sum += tl.where(hidden[:, None], 0.0, grad)
        token_sum += tl.where(hidden[:, None], grad, 0.0)

    partial = tl.program_id(0).to(tl.int64) * num_channels + channels
    if embedded_partial_ptr is not None:
        tl.store(embedded_partial_ptr + partial, tl.sum(embedded_sum, axis=0), mask=in_token)
    if token_partial_ptr is not None:
        tl.store(token_partial_ptr + partial, tl.sum(token_sum, axis=0), mask=in_token)
    if pos_partial_ptr is not None:
        offsets = image_chunk * num_patches * num_channels + in_tile
        tl.store(pos_partial_ptr + offsets, embedded_sum + token_sum, mask=in_bounds)


@triton.jit(do_not_specialize=["total_rows"])
def _masked_patch_embed_bwd_norm_kernel(
    grad_out_ptr,  # (B, P, C)
    image_ptr,  # (B, channels, H, W)
    mask_ptr,  # (B, P)
    weight_ptr,  # (C, D)
    bias_ptr,  # (C)
    norm_weight_ptr,  # (C)
    mean_ptr,  # (channels) or None
    std_ptr,  # (channels) or None
    visible_ptr,  # (B, K) or None
    grad_rows_ptr,  # (B R, C) or None
    bias_partial_ptr,  # (row chunks, C) or None
    norm_weight_partial_ptr,  # (row chunks, C) or None
    total_rows,  # B R
    rows_per_image,  # R
    num_patches,  # P
    num_channels,  # C
    num_numbers,  # D
    height,  # H
    width,  # W
    EPS: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    PATCH_SIZE: tl.constexpr,
    RUN: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Through the norm of a chunk of rows, whose projection is computed again. Grid: row chunks."""
    channels = tl.arange(0, TILE_C)
    in_token = channels < num_channels
    norm_weight = tl.load(norm_weight_ptr + channels, mask=in_token, other=0.0).to(COMPUTE)
    bias_sum = tl.zeros((TILE_C,), COMPUTE)
    norm_weight_sum = tl.zeros((TILE_C,), COMPUTE)
    first_row = tl.program_id(0).to(tl.int64) * CHUNK
    for row in range(first_row, tl.minimum(first_row + CHUNK, total_rows), TILE_R):
        rows = row + tl.arange(0, TILE_R)
        images, patches, valid = row_patches(visible_ptr, mask_ptr, rows, total_rows, rows_per_image, num_patches)
        if tl.max(valid.to(tl.int32), axis=0) > 0:
            x = project(
                image_ptr, mean_ptr, std_ptr, weight_ptr, bias_ptr, images, patches, valid, channels, num_channels,
                num_numbers, height, width, OPERAND, COMPUTE, PATCH_SIZE, RUN, TILE_R, TILE_C, TILE_D,
            )  # fmt: skip
            normed, inverse = normalise(x, channels, num_channels, EPS)
            in_bounds = valid[:, None] & in_token[None, :]
            offsets = (images * num_patches + patches)[:, None] * num_channels + channels[None, :]
            grad = tl.load(grad_out_ptr + offsets, mask=in_bounds, other=0.0).to(COMPUTE)
            norm_weight_sum += tl.sum(grad * normed, axis=0)
            grad *= norm_weight[None, :]
            along = tl.sum(grad * normed, axis=1) / num_channels
            grad -= (tl.sum(grad, axis=1) / num_channels)[:, None] + normed * along[:, None]
            grad = tl.where(in_bounds, grad * inverse[:, None], 0.0)
            bias_sum += tl.sum(grad, axis=0)
            if grad_rows_ptr is not None:
                store_rounded(grad_rows_ptr + rows[:, None] * num_channels + channels[None, :], grad, in_bounds)

    partial = tl.program_id(0).to(tl.int64) * num_channels + channels
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + partial, bias_sum, mask=in_token)
    if norm_weight_partial_ptr is not None:
        tl.store(norm_weight_partial_ptr + partial, norm_weight_sum, mask=in_token)


@triton.jit(do_not_specialize=["total_rows"])
def _masked_patch_embed_bwd_weight_kernel(
    grad_out_ptr,  # (B, P, C)
    grad_rows_ptr,  # (B R, C), or None for those of grad_out
    image_ptr,  # (B, channels, H, W)
    mask_ptr,  # (B, P)
    mean_ptr,  # (channels) or None
    std_ptr,  # (channels) or None
    visible_ptr,  # (B, K) or None
    weight_partial_ptr,  # (row chunks, C, D)
    total_rows,  # B R
    rows_per_image,  # R
    num_patches,  # P
    num_channels,  # C
    num_numbers,  # D
    height,  # H
    width,  # W
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    PATCH_SIZE: tl.constexpr,
    RUN: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One tile of the gradient over a chunk of rows. Grid: (row chunks, channel tiles, number tiles)."""
    channels = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    numbers = tl.program_id(2) * TILE_D + tl.arange(0, TILE_D)
    in_token = channels < num_channels
    grad_weight = tl.zeros((TILE_C, TILE_D), COMPUTE)
    first_row = tl.program_id(0).to(tl.int64) * CHUNK
    for row in range(first_row, tl.minimum(first_row + CHUNK, total_rows), TILE_R):
        rows = row + tl.arange(0, TILE_R)
        images, patches, valid = row_patches(visible_ptr, mask_ptr, rows, total_rows, rows_per_image, num_patches)
        if tl.max(valid.to(tl.int32), axis=0) > 0:
            pixels = load_patches(
                image_ptr, mean_ptr, std_ptr, images, patches, valid, numbers, num_numbers, height, width,
                COMPUTE, PATCH_SIZE, RUN,
            )  # fmt: skip
            in_bounds = valid[:, None] & in_token[None, :]
            if grad_rows_ptr is not None:
                offsets = rows[:, None] * num_channels + channels[None, :]
                grad = tl.load(grad_rows_ptr + offsets, mask=in_bounds, other=0.0)
            else:
                offsets = (images * num_patches + patches)[:, None] * num_channels + channels[None, :]
                grad = tl.load(grad_out_ptr + offsets, mask=in_bounds, other=0.0)
            grad_weight += dot(tl.trans(grad), pixels, OPERAND)

    chunk_channels = tl.program_id(0).to(tl.int64) * num_channels + channels
    offsets = chunk_channels[:, None] * num_numbers + numbers[None, :]
    tl.store(weight_partial_ptr + offsets, grad_weight, mask=in_token[:, None] & (numbers < num_numbers)[None, :])


def forward(
    image: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask_token: Tensor,
    pos_embed: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    visible: Tensor | None,
    eps: float,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """The operator's forward: out (B, H / p, W / p, C)."""
    if image.device.type == "cpu":
        check_listed(mask, visible)
    rows = total_rows(mask, visible)
    out = image.new_empty((*mask.shape, weight.shape[0]), dtype=out_dtype)
    mask, pos_embed, visible = mask.contiguous(), contiguous(pos_embed), contiguous(visible)
    with on_device_of(image):
        if out.numel() > 0:
            _write_hidden(mask, mask_token, pos_embed, out, poison=visible is not None)
        if rows > 0:
            tile = row_tile(weight, compute_dtype, norm_weight is not None, live=1)
            _masked_patch_embed_fwd_kernel[triton.cdiv(rows, tile.rows), triton.cdiv(weight.shape[0], tile.channels)](
                image.contiguous(),
                mask,
                weight.contiguous(),
                bias.contiguous(),
                contiguous(norm_weight),
                contiguous(norm_bias),
                pos_embed,
                contiguous(mean),
                contiguous(std),
                visible,
                out,
                *_sizes(image, mask, weight, visible),
                EPS=eps,
                **_constants(weight, compute_dtype, compute_type(out_dtype)),
                **tile_constants(tile),
            )
    return out


def _write_hidden(mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None, out: Tensor, poison: bool) -> None:
    """Fill out where the mask is set, and with `poison` with NaN elsewhere."""
    images, patches, channels = mask.shape[0], mask[0].numel(), out.shape[3]
    tile_channels = min(TOKEN_TILE_CHANNELS, triton.next_power_of_2(channels))
    _masked_patch_embed_fwd_hidden_kernel[
        images * triton.cdiv(patches, CHUNK_POSITIONS), triton.cdiv(channels, tile_channels)
    ](
        mask,
        mask_token.contiguous(),
        pos_embed,
        out,
        patches,
        channels,
        POISON=poison,
        COMPUTE=compute_type(out.dtype),
        TILE_P=CHUNK_POSITIONS,
        TILE_C=tile_channels,
    )


def backward(
    grad_out: Tensor,
    image: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    visible: Tensor | None,
    eps: float,
    compute_dtype: torch.dtype,
    *gradient_dtypes: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """The operator's backward: gradients of weight, bias, norm_weight, norm_bias, mask_token and pos_embed."""
    norm, rows = norm_weight is not None, total_rows(mask, visible)
    wanted = wanted_workspaces(norm, gradient_dtypes)
    workspaces: dict[str, Tensor | None] = {
        name: grad_out.new_empty(shape, dtype=compute_dtype if name == "rows" else sum_dtype(grad_out.dtype))
        if name in wanted
        else None
        for name, shape in workspace_shapes(grad_out, weight, rows, norm).items()
    }
    grad_out, image, mask, visible = grad_out.contiguous(), image.contiguous(), mask.contiguous(), contiguous(visible)
    pixels = {"image_ptr": image, "mask_ptr": mask, "visible_ptr": visible}
    pixels |= {"mean_ptr": contiguous(mean), "std_ptr": contiguous(std)}
    constants = _constants(weight, compute_dtype, compute_type(grad_out.dtype)) | {"CHUNK": chunk_rows(rows, weight)}
    with on_device_of(grad_out):
        if grad_out.numel() > 0 and sums_tokens(wanted):
            _sum_tokens(grad_out, mask, workspaces)
        if rows > 0 and norm and differentiates_norm(wanted):
            parameters = {"weight_ptr": weight.contiguous(), "bias_ptr": bias.contiguous(), "EPS": eps}
            parameters["norm_weight_ptr"] = norm_weight.contiguous()
            tile = row_tile(weight, compute_dtype, norm, live=3)
            sizes = _sizes(image, mask, weight, visible)
            _differentiate_norm(grad_out, workspaces, sizes, tile, pixels | parameters | constants)
        if rows > 0 and sums_weight(wanted):
            _sum_weight(grad_out, workspaces, _sizes(image, mask, weight, visible), pixels | constants)
    partials = [workspaces[name] for name in ("weight", "bias", "norm_weight", "embedded", "mask_token", "pos_embed")]
    if not norm:
        partials[1], partials[3] = partials[3], None
    return tuple(
        grad_out.new_empty(0) if dtype is None else partial.sum(0).to(dtype).view(shape)
        for partial, dtype, shape in zip(partials, gradient_dtypes, gradient_shapes(grad_out, weight), strict=True)
    )


def _sum_tokens(grad_out: Tensor, mask: Tensor, workspaces: dict[str, Tensor | None]) -> None:
    """Fill the partial sums "embedded", "mask_token" and "pos_embed", as far as they are wanted."""
    partials = [workspaces[name] for name in ("embedded", "mask_token", "pos_embed")]
    images, height, width, channels = grad_out.shape
    patches, tile_channels = height * width, min(TOKEN_TILE_CHANNELS, triton.next_power_of_2(channels))
    chunks = triton.cdiv(images, CHUNK_IMAGES) * triton.cdiv(patches, CHUNK_POSITIONS)
    _masked_patch_embed_bwd_tokens_kernel[(chunks, triton.cdiv(channels, tile_channels))](
        grad_out,
        mask,
        *partials,
        images,
        patches,
        channels,
        COMPUTE=compute_type(grad_out.dtype),
        IMAGES=CHUNK_IMAGES,
        TILE_P=CHUNK_POSITIONS,
        TILE_C=tile_channels,
    )


def _differentiate_norm(
    grad_out: Tensor,
    workspaces: dict[str, Tensor | None],
    sizes: tuple[int, ...],
    tile: Tile,
    arguments: dict[str, Any],
) -> None:
    """Fill "rows", "bias" and "norm_weight", as far as they are wanted."""
    _masked_patch_embed_bwd_norm_kernel[(triton.cdiv(sizes[0], arguments["CHUNK"]),)](
        grad_out_ptr=grad_out,
        grad_rows_ptr=workspaces["rows"],
        bias_partial_ptr=workspaces["bias"],
        norm_weight_partial_ptr=workspaces["norm_weight"],
        **dict(zip(SIZES, sizes, strict=True)),
        **tile_constants(tile),
        **arguments,
    )


def _sum_weight(
    grad_out: Tensor, workspaces: dict[str, Tensor | None], sizes: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    """Fill "weight" from "rows", or without a norm from grad_out."""
    partial = workspaces["weight"]
    chunks, channels, numbers = partial.shape
    tile = weight_tile(channels, numbers)
    grid = (chunks, triton.cdiv(channels, tile.channels), triton.cdiv(numbers, tile.numbers))
    _masked_patch_embed_bwd_weight_kernel[grid](
        grad_out_ptr=grad_out,
        grad_rows_ptr=workspaces["rows"],
        weight_partial_ptr=partial,
        **dict(zip(SIZES, sizes, strict=True)),
        **tile_constants(tile),
        **arguments,
    )


def _sizes(image: Tensor, mask: Tensor, weight: Tensor, visible: Tensor | None) -> tuple[int, ...]:
    """B R, R, P, C, D, H, W, as the kernels take them."""
    rows_per_image = mask[0].numel() if visible is None else visible.shape[1]
    return total_rows(mask, visible), rows_per_image, mask[0].numel(), *weight.flatten(1).shape, *image.shape[2:]


def _constants(weight: Tensor, compute_dtype: torch.dtype, compute: tl.dtype) -> dict[str, Any]:
    patch_size = weight.shape[3]
    run = patch_size & -patch_size  # the largest power of 2 that divides it
    return {"OPERAND": OPERAND_TYPES[compute_dtype], "COMPUTE": compute, "PATCH_SIZE": patch_size, "RUN": run}
