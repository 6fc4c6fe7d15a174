"""Operators of substitute_mask_tokens: schemas, fakes, autograd, cost. The formulas are derived in README.md.

Shapes: x, grad_out (B, H, W, C); mask (B, H, W) bool; mask_token (C); pos_embed (H, W, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simmim_fast.ops._registration import Direction, define_op, unrounded_nbytes
from simmim_fast.ops.substitute_mask_tokens.reference import substitute_mask_tokens

# Sums over tokens go by chunks of 16 positions in 16 images: the chunks are added up first, then their sums.
CHUNK_IMAGES = 16
CHUNK_POSITIONS = 16


def output_dtype(x: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> torch.dtype:
    """What the tensors promote to, under autocast as without, as in torch.where and +."""
    dtype = torch.promote_types(x.dtype, mask_token.dtype)
    return dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums over tensors of `dtype` accumulate."""
    return torch.promote_types(dtype, torch.float32)


def partial_shapes(grad_out: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the partial sums of grad_token and grad_pos; the first axis is the one to sum over."""
    images, height, width, channels = grad_out.shape
    image_chunks = -(-images // CHUNK_IMAGES)
    position_chunks = -(-height * width // CHUNK_POSITIONS)
    return (image_chunks * position_chunks, channels), (image_chunks, height, width, channels)


def _fake(x: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=output_dtype(x, mask_token, pos_embed))


def _fake_backward(
    grad_out: Tensor,
    mask: Tensor,
    x_dtype: torch.dtype | None,
    token_dtype: torch.dtype | None,
    pos_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (grad_out.shape, grad_out.shape[3:], grad_out.shape[1:])
    dtypes = (x_dtype, token_dtype, pos_dtype)
    return tuple(
        grad_out.new_empty(0) if dtype is None else grad_out.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dtypes = [inputs[i].dtype if ctx.needs_input_grad[i] else None for i in (0, 2, 3)]


def _gradients(ctx: Any, backward: Callable, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    gradients = backward(grad_out, *ctx.saved_tensors, *ctx.dtypes)
    wanted = [None if dtype is None else grad for grad, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return wanted[0], None, wanted[1], wanted[2]


def _no_flops(*args: Any) -> int:
    return 0


def _bytes_moved(
    x: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None, *, every_load: bool = False
) -> tuple[int, int]:
    """All of x counts as read, though the kernels leave out what is masked. Every image loads the positions."""
    images = x.shape[0] if every_load else 1
    read = x.nbytes + mask.nbytes + mask_token.nbytes + (0 if pos_embed is None else images * pos_embed.nbytes)
    return read, x.numel() * output_dtype(x, mask_token, pos_embed).itemsize


def _bytes_moved_backward(
    grad_out: Tensor,
    mask: Tensor,
    x_dtype: torch.dtype | None,
    token_dtype: torch.dtype | None,
    pos_dtype: torch.dtype | None,
) -> tuple[int, int]:
    """The partial sums are written once and read once, and so are their sums where these are rounded."""
    token_partials, pos_partials = (math.prod(shape) for shape in partial_shapes(grad_out))
    partials = (token_partials if token_dtype else 0) + (pos_partials if pos_dtype else 0)
    dtype = partial_dtype(grad_out.dtype)
    results = _fake_backward(grad_out.to("meta"), mask, x_dtype, token_dtype, pos_dtype)
    workspace = partials * dtype.itemsize + unrounded_nbytes(dtype, *results[1:])
    return grad_out.nbytes + mask.nbytes + workspace, workspace + sum(t.nbytes for t in results)


OP = define_op(
    "substitute_mask_tokens",
    reference=substitute_mask_tokens,
    forward=Direction(
        schema="(Tensor x, Tensor mask, Tensor mask_token, Tensor? pos_embed) -> Tensor",
        fake=_fake,
        flops=_no_flops,
        bytes_moved=_bytes_moved,
        bytes_loaded=partial(_bytes_moved, every_load=True),
    ),
    backward=Direction(
        schema="(Tensor grad_out, Tensor mask, ScalarType? x_dtype, ScalarType? token_dtype, ScalarType? pos_dtype)"
        " -> (Tensor, Tensor, Tensor)",
        fake=_fake_backward,
        flops=_no_flops,
        bytes_moved=_bytes_moved_backward,
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    backends={"native": None, "triton": "simmim_fast.ops.substitute_mask_tokens.kernels"},
    native_devices=("cpu", "cuda"),
)
