"""Operators of masked_patch_embed: schemas, fakes, autograd, cost. The formulas are derived in README.md.

Shapes: B images of P = H / p x W / p patches, D = channels x p x p numbers of a patch, C channels of a token, R rows:
the patches of an image that may be embedded, K with `visible` and all P without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simmim_fast.ops._devices import ENOUGH_PROGRAMS
from simmim_fast.ops._registration import Direction, define_op, unrounded_nbytes
from simmim_fast.ops.masked_patch_embed import reference

# Sums over tokens go by chunks of 16 positions in 16 images: the chunks are added up first, then their sums.
CHUNK_IMAGES = 16
CHUNK_POSITIONS = 16
# Rows of a chunk of the other sums: the most that leave enough programs to fill a GPU, or else the last.
CHUNK_ROWS = (2048, 1024, 512, 256)
# Tiles of the gradient of the weight.
WEIGHT_TILE_ROWS = 32
WEIGHT_TILE_CHANNELS = 128
WEIGHT_TILE_NUMBERS = 64
MAX_NORM_CHANNELS = 1024


class Tile(NamedTuple):
    """How a Triton kernel that multiplies rows is launched: the tile of one program, and its warps."""

    rows: int
    channels: int
    numbers: int
    num_warps: int


def row_tile(weight: Tensor, dtype: torch.dtype, norm: bool, live: int) -> Tile:
    """The tile of a program that holds `live` numbers for each row and channel; with a norm, of all channels.

    Offline compilation shows that nothing is spilled so in the released models, whose norms have 96 to 192 channels;
    over 512 and more some values are. Dots in float32 take more registers than those in halves.
    """
    channels = _tile_side(weight.shape[0])
    channels = channels if norm else min(channels, 128)
    rows = min(64, max(16, (8192 if live == 1 else 4096) // channels))
    half, numbers = dtype.itemsize == 2, weight[0].numel()
    fewest = 4 if half and norm else 16 if not half and live > 1 and channels <= 256 else 8
    num_warps = min(16, max(fewest, 1 << (live * rows * channels // 4096 - 1).bit_length()))
    return Tile(rows, channels, 32 if half and numbers % 32 == 0 else 16, num_warps)


def weight_tile(channels: int, numbers: int) -> Tile:
    """The tile of a program that yields a part of the weight's gradient."""
    sides = (min(WEIGHT_TILE_CHANNELS, _tile_side(channels)), min(WEIGHT_TILE_NUMBERS, _tile_side(numbers)))
    return Tile(WEIGHT_TILE_ROWS, *sides, num_warps=4)


def _tile_side(size: int) -> int:
    """The least power of two, from 16, that holds so many elements."""
    return max(16, 1 << (size - 1).bit_length())


def size_refusal(backend: str, *, channels: int, norm: bool) -> str | None:
    """Why a backend does not take so many channels; None where it does."""
    if backend == "triton" and norm and channels > MAX_NORM_CHANNELS:
        return f"it takes a norm over at most {MAX_NORM_CHANNELS} channels; got {channels}"
    return None


def check_listed(mask: Tensor, visible: Tensor | None) -> None:
    """All patches that are not hidden are listed, and all that are listed are there. Reads data.

    Raises:
        ValueError: A patch is missing, or out of range.
    """
    if visible is None:
        return
    listed = mask.flatten(1).clone()
    if not bool(((visible >= 0) & (visible < listed.shape[1])).all()):
        raise ValueError(f"visible must hold flat patches from 0 to {listed.shape[1] - 1}; got one out of range")
    if not bool(listed.scatter_(1, visible.long(), True).all()):
        raise ValueError("visible must hold every patch that is not hidden; one is missing")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums over tensors of `dtype` accumulate."""
    return torch.promote_types(dtype, torch.float32)


def total_rows(mask: Tensor, visible: Tensor | None) -> int:
    """Rows of all images, B x R."""
    return mask.numel() if visible is None else visible.numel()


def chunk_rows(rows: int, weight: Tensor) -> int:
    """Rows of a chunk. It depends on sizes alone, so that sums repeat from GPU to GPU."""
    channels, numbers = weight.shape[0], math.prod(weight.shape[1:])
    tiles = -(-channels // WEIGHT_TILE_CHANNELS) * -(-numbers // WEIGHT_TILE_NUMBERS)
    return next((n for n in CHUNK_ROWS if -(-rows // n) * tiles >= ENOUGH_PROGRAMS), CHUNK_ROWS[-1])


def workspace_shapes(grad_out: Tensor, weight: Tensor, rows: int, norm: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the backward's workspaces; only what the wanted gradients need is allocated.

    "rows" are the gradients of the projection's results, in the compute dtype, needed with a norm; the others are
    partial sums in `sum_dtype`, with the axis to sum over first.
    """
    images, height, width, channels = grad_out.shape
    image_chunks, position_chunks = -(-images // CHUNK_IMAGES), -(-height * width // CHUNK_POSITIONS)
    row_chunks = -(-rows // chunk_rows(rows, weight))
    return {
        "rows": (rows if norm else 0, channels),
        "weight": (row_chunks, channels, math.prod(weight.shape[1:])),
        "bias": (row_chunks, channels),
        "norm_weight": (row_chunks, channels),
        "embedded": (image_chunks * position_chunks, channels),
        "mask_token": (image_chunks * position_chunks, channels),
        "pos_embed": (image_chunks, height, width, channels),
    }


def _reference(
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
    has_data = type(mask) is Tensor and not torch.compiler.is_compiling()
    if has_data and mask.device.type == "cpu":
        check_listed(mask, visible)
    parameters = (weight, bias, norm_weight, norm_bias, mask_token, pos_embed)
    return reference.masked_patch_embed(
        image, mask, *parameters, eps=eps, mean=mean, std=std, visible=visible
    ).contiguous()


def _fake(
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
    return image.new_empty((*mask.shape, weight.shape[0]), dtype=out_dtype)


def _fake_backward(
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
    return tuple(
        grad_out.new_empty(0) if dtype is None else grad_out.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(gradient_shapes(grad_out, weight), gradient_dtypes, strict=True)
    )


def gradient_shapes(grad_out: Tensor, weight: Tensor) -> tuple[torch.Size, ...]:
    """Of weight, bias, norm_weight, norm_bias, mask_token, pos_embed."""
    return weight.shape, *[grad_out.shape[3:]] * 4, grad_out.shape[1:]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, mask, weight, bias, norm_weight, _, _, _, mean, std, visible, ctx.eps, ctx.compute_dtype, _ = inputs
    ctx.save_for_backward(image, mask, weight, bias, norm_weight, mean, std, visible)
    ctx.gradient_dtypes = [inputs[i].dtype if ctx.needs_input_grad[i] else None for i in range(2, 8)]


def _gradients(ctx: Any, backward: Callable, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    gradients = backward(grad_out, *ctx.saved_tensors, ctx.eps, ctx.compute_dtype, *ctx.gradient_dtypes)
    wanted = [None if dtype is None else grad for grad, dtype in zip(gradients, ctx.gradient_dtypes, strict=True)]
    return None, None, *wanted, *[None] * 6


def _product(mask: Tensor, weight: Tensor, visible: Tensor | None) -> int:
    """FLOPs of one product of all rows with the weight. Without `visible`, no less than what the mask leaves."""
    return 2 * total_rows(mask, visible) * weight.numel()


def _flops(image: Tensor, mask: Tensor, weight: Tensor, *others: Any) -> int:
    return _product(mask, weight, others[7])


def _flops_backward(
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
) -> int:
    """The projection again where there is a norm, and the product that yields the weight's gradient."""
    again = norm_weight is not None and any(gradient_dtypes[:3])
    return (again + (gradient_dtypes[0] is not None)) * _product(mask, weight, visible)


def _bytes_moved(
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
    *,
    every_load: bool = False,
) -> tuple[int, int]:
    """Every tile of channels loads the rows of pixels, every tile of rows the weight, every image the positions.

    Of the mask a byte for every row. Without `visible` all patches count as rows, though only the visible are read.
    With it, all that is not hidden is written twice: first as NaN.
    """
    rows, channels = total_rows(mask, visible), weight.shape[0]
    tile = row_tile(weight, compute_dtype, norm_weight is not None, live=1)
    channel_tiles, row_tiles, images = -(-channels // tile.channels), -(-rows // tile.rows), mask.shape[0]
    if not every_load:
        channel_tiles = row_tiles = images = 1
    read = (
        mask.nbytes + rows + _nbytes(bias, norm_weight, norm_bias, mask_token, mean, std) + images * _nbytes(pos_embed)
    )
    read += channel_tiles * (_pixels_nbytes(rows, image, weight) + _nbytes(visible)) + row_tiles * weight.nbytes
    rewritten = 0 if visible is None else rows
    return read, (mask.numel() + rewritten) * channels * out_dtype.itemsize


def _pixels_nbytes(rows: int, image: Tensor, weight: Tensor) -> int:
    """Bytes of the pixels of so many patches."""
    return rows * weight[0].numel() * image.itemsize


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _bytes_moved_backward(
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
    every_load: bool = False,
) -> tuple[int, int]:
    """The output's gradient, its rows, pixels and weight for each kernel, and for every tile that loads them.

    As in the forward, all patches count as rows without `visible`. Partial sums are written and read once.
    """
    norm, rows, channels = norm_weight is not None, total_rows(mask, visible), weight.shape[0]
    wanted, shapes = wanted_workspaces(norm, gradient_dtypes), workspace_shapes(grad_out, weight, rows, norm)
    sums = sum_dtype(grad_out.dtype)
    partials = sums.itemsize * sum(math.prod(shapes[name]) for name in wanted - {"rows"})
    pixels, grad_rows = _pixels_nbytes(rows, image, weight), rows * channels * grad_out.itemsize
    of_tokens, of_norm, of_weight = (needed(wanted) for needed in (sums_tokens, differentiates_norm, sums_weight))
    read = of_tokens * (grad_out.nbytes + mask.nbytes)
    if of_norm:
        row_tiles = -(-rows // row_tile(weight, compute_dtype, norm, live=3).rows) if every_load else 1
        read += pixels + grad_rows + row_tiles * weight.nbytes + rows + _nbytes(visible, bias, norm_weight, mean, std)
    if of_weight:
        tile = weight_tile(channels, weight[0].numel())
        channel_tiles, number_tiles = -(-channels // tile.channels), -(-weight[0].numel() // tile.numbers)
        if not every_load:
            channel_tiles = number_tiles = 1
        grad_rows = rows * channels * compute_dtype.itemsize if norm else grad_rows
        read += channel_tiles * pixels + number_tiles * grad_rows + rows + _nbytes(mean, std)
        read += channel_tiles * number_tiles * _nbytes(visible)
    given = (grad_out.to("meta"), image, mask, weight, bias, norm_weight, mean, std, visible, eps, compute_dtype)
    results = _fake_backward(*given, *gradient_dtypes)
    stored = partials + unrounded_nbytes(sums, *results)
    rows_stored = rows * channels * compute_dtype.itemsize if "rows" in wanted else 0
    return read + stored, stored + rows_stored + _nbytes(*results)


def wanted_workspaces(norm: bool, gradient_dtypes: tuple[torch.dtype | None, ...]) -> set[str]:
    """The workspaces that the wanted gradients need."""
    weight, bias, norm_weight, norm_bias, mask_token, pos_embed = (dtype is not None for dtype in gradient_dtypes)
    needed = {
        "rows": norm and weight,
        "weight": weight,
        "bias": norm and bias,
        "norm_weight": norm_weight,
        "embedded": norm_bias if norm else bias,
        "mask_token": mask_token,
        "pos_embed": pos_embed,
    }
    return {name for name, need in needed.items() if need}


def sums_tokens(wanted: set[str]) -> bool:
    """Whether the kernel that adds up gradients of the output runs."""
    return not wanted.isdisjoint(("embedded", "mask_token", "pos_embed"))


def differentiates_norm(wanted: set[str]) -> bool:
    """Whether the kernel that takes the gradient through the norm runs."""
    return not wanted.isdisjoint(("rows", "bias", "norm_weight"))


def sums_weight(wanted: set[str]) -> bool:
    """Whether the kernel that yields the weight's gradient runs."""
    return "weight" in wanted


OP = define_op(
    "masked_patch_embed",
    reference=_reference,
    forward=Direction(
        schema="(Tensor image, Tensor mask, Tensor weight, Tensor bias, Tensor? norm_weight, Tensor? norm_bias,"
        " Tensor mask_token, Tensor? pos_embed, Tensor? mean, Tensor? std, Tensor? visible, float eps,"
        " ScalarType compute_dtype, ScalarType out_dtype) -> Tensor",
        fake=_fake,
        flops=_flops,
        bytes_moved=_bytes_moved,
        bytes_loaded=partial(_bytes_moved, every_load=True),
    ),
    backward=Direction(
        schema="(Tensor grad_out, Tensor image, Tensor mask, Tensor weight, Tensor bias, Tensor? norm_weight,"
        " Tensor? mean, Tensor? std, Tensor? visible, float eps, ScalarType compute_dtype, ScalarType? weight_dtype,"
        " ScalarType? bias_dtype, ScalarType? norm_weight_dtype, ScalarType? norm_bias_dtype, ScalarType? token_dtype,"
        " ScalarType? pos_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fake=_fake_backward,
        flops=_flops_backward,
        bytes_moved=_bytes_moved_backward,
        bytes_loaded=partial(_bytes_moved_backward, every_load=True),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    backends={"native": None, "triton": "simmim_fast.ops.masked_patch_embed.kernels"},
)
