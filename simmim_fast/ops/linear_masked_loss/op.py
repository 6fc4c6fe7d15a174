"""Operators of linear_masked_loss: schemas, fakes, autograd, cost. The formulas are derived in README.md.

Shapes: features (B, h, w, D); weight (s^2 channels, D), its rows being the outputs; target (B, channels, h s, w s);
mask (B, h s / patch, w s / patch) bool; tokens (B, K) int32 or None; loss and scale (). The forward keeps the slope of
the loss at each prediction, (B, K, outputs) or (B, h w, outputs) without tokens, and the factor `scale` of the loss.
For L1 the slope is a sign and an int8, otherwise it has the dtype of the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simmim_fast.ops._devices import MULTIPROCESSORS
from simmim_fast.ops._registration import Direction, define_op, unrounded_nbytes
from simmim_fast.ops.linear_masked_loss import reference

LOSSES = tuple(reference.LOSSES)
# Tile of the Triton forward: tokens by outputs whose losses are added up before their sums are.
TILE_TOKENS = 64
TILE_OUTPUTS = 128
TILE_CHANNELS = 128
# The gradient of the weight is added up over chunks of rows where its tiles alone are too few programs to fill a GPU.
LEAST_CHUNK_ROWS = 1024


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the loss for features of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def slope_dtype(dtype: torch.dtype, loss: int) -> torch.dtype:
    """Dtype of the slopes of a loss, by its place in `LOSSES`, for features of `dtype`."""
    return torch.int8 if LOSSES[loss] == "l1" else dtype


def row_count(features: Tensor, tokens: Tensor | None) -> int:
    """Tokens of the batch that are computed."""
    batch, height, width, _ = features.shape
    return batch * (height * width if tokens is None else tokens.shape[1])


def chunk_count(features: Tensor, weight: Tensor, tokens: Tensor | None) -> int:
    """Partial sums of the forward: a float64 and an int64 each."""
    return -(-row_count(features, tokens) // TILE_TOKENS) * -(-weight.shape[0] // TILE_OUTPUTS)


def row_chunks(rows: int, weight: Tensor) -> tuple[int, int]:
    """Chunks of rows whose gradients of the weight are added afterwards, and rows of one. By the sizes alone."""
    outputs, depth = weight.shape
    tiles = -(-outputs // TILE_OUTPUTS) * -(-depth // TILE_CHANNELS)
    wanted = max(1, min(-(-MULTIPROCESSORS // max(tiles, 1)), rows // LEAST_CHUNK_ROWS))
    size = max(TILE_TOKENS, -(-rows // (wanted * TILE_TOKENS)) * TILE_TOKENS)
    return max(1, -(-rows // size)), size


def _reference(
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
) -> tuple[Tensor]:
    options = {"patch_size": patch_size, "loss": LOSSES[loss], "tokens": tokens, "mean": mean, "std": std}
    return (reference.linear_masked_loss(features, weight, bias, target, mask, **options),)


def _fake(
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
    batch, height, width, _ = features.shape
    slots = height * width if tokens is None else tokens.shape[1]
    shape = (batch, slots, weight.shape[0]) if keep_slope else (0,)
    value, scale = (features.new_empty((), dtype=loss_dtype(features.dtype)) for _ in range(2))
    return value, features.new_empty(shape, dtype=slope_dtype(features.dtype, loss)), scale


def _fake_backward(
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
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (features.shape, weight.shape, weight.shape[:1])
    return tuple(features.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, weight, _, target, mask, tokens, _, _, patch_size, loss, _ = inputs
    _, slope, scale = output
    ctx.mark_non_differentiable(slope, scale)
    ctx.save_for_backward(features, weight, slope, scale, mask, tokens)
    ctx.options = (target.shape[1], patch_size, loss)
    ctx.needs = ctx.needs_input_grad[:3]


def _gradients(ctx: Any, backward: Callable, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    gradients = backward(grad_loss, *ctx.saved_tensors, *ctx.options, *ctx.needs)
    wanted = [grad if needed else None for grad, needed in zip(gradients, ctx.needs, strict=True)]
    return *wanted, *[None] * 8


def _product(features: Tensor, weight: Tensor, tokens: Tensor | None) -> int:
    """FLOPs of one product: tokens by outputs by D."""
    return 2 * row_count(features, tokens) * weight.numel()


def _flops(
    features: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor, tokens: Tensor | None, *others: Any
) -> int:
    return _product(features, weight, tokens)


def _flops_backward(
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
) -> int:
    return (needs_features + needs_weight) * _product(features, weight, tokens)


def _bytes_moved(
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
    *,
    every_load: bool = False,
) -> tuple[int, int]:
    """All pixels under the tokens. Every tile of outputs loads features, every tile of tokens the weight."""
    rows, outputs = row_count(features, tokens), weight.shape[0]
    token_tiles, output_tiles, _ = _tiles(features, weight, rows) if every_load else (1, 1, 1)
    partial = 16 * chunk_count(features, weight, tokens)
    read = output_tiles * (rows * features.shape[3] * features.itemsize + _tokens_nbytes(tokens, every_load))
    read += token_tiles * weight.nbytes + rows * outputs * target.itemsize
    masked = mask.nbytes * rows // max(1, math.prod(features.shape[:3]))  # entries over the tokens
    read += bias.nbytes + mask.nbytes + masked + sum(t.nbytes for t in (mean, std) if t is not None) + 8
    slopes = rows * outputs * slope_dtype(features.dtype, loss).itemsize if keep_slope else 0
    return read + partial, partial + 8 + slopes + 2 * loss_dtype(features.dtype).itemsize


def _tiles(features: Tensor, weight: Tensor, rows: int) -> tuple[int, int, int]:
    """Tiles of tokens, of outputs and of channels."""
    channels = features.shape[3]
    return -(-rows // TILE_TOKENS), -(-weight.shape[0] // TILE_OUTPUTS), -(-channels // TILE_CHANNELS)


def _tokens_nbytes(tokens: Tensor | None, every_load: bool) -> int:
    """Bytes that are read of a list of tokens: each is loaded with the one before it."""
    if tokens is None:
        return 0
    return tokens.nbytes + every_load * max(0, tokens.nbytes - tokens.shape[0] * tokens.itemsize)


def _bytes_moved_backward(
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
    *,
    every_load: bool = False,
) -> tuple[int, int]:
    """Slopes once per product, and for every tile that loads them. Of listed tokens the gradient is written twice.

    Sums over chunks of rows are written, read and added, and written once more where they are rounded.
    """
    rows, outputs = row_count(features, tokens), weight.shape[0]
    listed = rows * features.shape[3] * features.itemsize
    token_tiles, output_tiles, channel_tiles = _tiles(features, weight, rows) if every_load else (1, 1, 1)
    of_tokens = _tokens_nbytes(tokens, every_load)
    read = needs_features * (channel_tiles * (slope.nbytes + of_tokens) + token_tiles * weight.nbytes)
    if needs_weight or needs_bias:
        tiles = channel_tiles if needs_weight else 1
        read += tiles * (slope.nbytes + output_tiles * of_tokens) + needs_weight * output_tiles * listed
    read += (needs_features + (needs_weight or needs_bias)) * (grad_loss.nbytes + scale.nbytes)
    written = needs_features * (listed + (0 if tokens is None else features.nbytes))
    elements = needs_weight * weight.numel() + needs_bias * outputs
    chunks, sum_dtype = row_chunks(rows, weight)[0], loss_dtype(features.dtype)
    partials = 0
    if chunks > 1:
        rounded = unrounded_nbytes(sum_dtype, weight.new_empty(elements, device="meta"))
        partials = chunks * elements * sum_dtype.itemsize + rounded
    return read + partials, written + partials + elements * weight.itemsize


_FORWARD = (
    "(Tensor features, Tensor weight, Tensor bias, Tensor target, Tensor mask, Tensor? tokens, Tensor? mean,"
    " Tensor? std, int patch_size, int loss, bool keep_slope) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor grad_loss, Tensor features, Tensor weight, Tensor slope, Tensor scale, Tensor mask, Tensor? tokens,"
    " int channels, int patch_size, int loss, bool needs_features, bool needs_weight, bool needs_bias)"
    " -> (Tensor, Tensor, Tensor)"
)

OP = define_op(
    "linear_masked_loss",
    reference=_reference,
    forward=Direction(
        schema=_FORWARD,
        fake=_fake,
        flops=_flops,
        bytes_moved=_bytes_moved,
        bytes_loaded=partial(_bytes_moved, every_load=True),
    ),
    backward=Direction(
        schema=_BACKWARD,
        fake=_fake_backward,
        flops=_flops_backward,
        bytes_moved=_bytes_moved_backward,
        bytes_loaded=partial(_bytes_moved_backward, every_load=True),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    backends={"native": None, "triton": "simmim_fast.ops.linear_masked_loss.kernels"},
)
