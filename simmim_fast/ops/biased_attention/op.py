"""Operators of biased_attention: schemas, fakes, autograd, cost. The formulas are derived in README.md.

Shapes: B batch, N tokens, h heads of D channels (C = h D), R rows of an image: its N tokens or its K queries; qkv
(B, N, 3C); bias (h, N, N); queries (B, K) int32; out and grad_out (B, R, C); lse (B, h, R), the logarithm of a row's
sum of exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simmim_fast.ops._registration import Direction, define_op, unrounded_nbytes
from simmim_fast.ops.biased_attention import reference

MAX_HEAD_SIZE = 128
# Images whose gradients of the bias one program adds up; then come the chunks' sums.
CHUNK_IMAGES = 32


class Tile(NamedTuple):
    """Sizes of the Triton kernels' tiles, in rows or keys.

    Attributes:
        own: What a program handles.
        step: What it goes through, tile by tile.
    """

    own: int
    step: int


def tile(dtype: torch.dtype) -> Tile:
    """The tiles for qkv of a dtype: Hopper multiplies 64 rows at once; at N = 197 steps of 32 waste less than 64."""
    return Tile(own=64, step=32) if dtype.itemsize == 2 else Tile(own=32, step=32)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits, softmax and sums for qkv of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def workspace_shapes(
    qkv: Tensor, bias: Tensor | None, queries: Tensor | None, num_heads: int, needs_bias: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the workspaces of Triton's backward.

    "delta" (rows' sums of out x grad_out) and "bias" (sums of chunks of images) are in `compute_dtype`, "positions"
    (the row of each token, or -1) is int32.
    """
    images, tokens = qkv.shape[:2]
    rows = tokens if queries is None else queries.shape[1]
    shapes = {"delta": (images, num_heads, rows)}
    if needs_bias and bias is not None:
        shapes["bias"] = (-(-images // CHUNK_IMAGES), *bias.shape)
        if queries is not None:
            shapes["positions"] = (images, tokens + 1)
    return shapes


def size_refusal(backend: str, *, head_size: int) -> str | None:
    """Why a backend does not take heads of so many channels; None where it does."""
    if backend == "triton" and head_size > MAX_HEAD_SIZE:
        return f"it takes heads of at most {MAX_HEAD_SIZE} channels; got {head_size}"
    return None


def _reference(
    qkv: Tensor, bias: Tensor | None, queries: Tensor | None, num_heads: int, scale: float
) -> tuple[Tensor, None]:
    out = reference.biased_attention(qkv, bias, num_heads, scale=scale, queries=queries)
    return out.contiguous(), None


def _fake(
    qkv: Tensor, bias: Tensor | None, queries: Tensor | None, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    images, tokens, channels = qkv.shape
    rows = tokens if queries is None else queries.shape[1]
    lse = qkv.new_empty((images, num_heads, rows), dtype=compute_dtype(qkv.dtype))
    return qkv.new_empty((images, rows, channels // 3)), lse


def _fake_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    queries: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor]:
    grad_bias = bias.new_empty(bias.shape) if needs_bias and bias is not None else grad_out.new_empty(0)
    return qkv.new_empty(qkv.shape), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, queries, ctx.num_heads, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, bias, queries, out, lse)


def _gradients(ctx: Any, backward: Callable, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_qkv, needs_bias = ctx.needs_input_grad[:2]
    grad_qkv, grad_bias = backward(grad_out, *ctx.saved_tensors, ctx.num_heads, ctx.scale, needs_bias)
    return grad_qkv if needs_qkv else None, grad_bias if needs_bias else None, None, None, None


def _product(qkv: Tensor, queries: Tensor | None) -> int:
    """FLOPs of one product over all images and heads: rows by keys by D."""
    images, tokens, channels = qkv.shape
    rows = tokens if queries is None else queries.shape[1]
    return 2 * images * rows * tokens * (channels // 3)


def _flops(qkv: Tensor, bias: Tensor | None, queries: Tensor | None, num_heads: int, scale: float) -> int:
    """Two products: q k' and p v."""
    return 2 * _product(qkv, queries)


def _flops_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    queries: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    needs_bias: bool,
) -> int:
    """Five products: q k' again, dO v', p' dO, ds k and ds' q. That some are computed twice does not count."""
    return 5 * _product(qkv, queries)


def _bytes_moved(
    qkv: Tensor, bias: Tensor | None, queries: Tensor | None, num_heads: int, scale: float
) -> tuple[int, int]:
    """q once, k and v once for every tile of rows, the rows' bias once for every image."""
    out, lse = _fake(qkv.to("meta"), bias, queries, num_heads, scale)
    images, rows = out.shape[:2]
    row_tiles = -(-rows // tile(qkv.dtype).own)
    read = out.nbytes + row_tiles * 2 * qkv.nbytes // 3 + images * _rows_nbytes(bias, rows) + _nbytes(queries)
    return read, out.nbytes + lse.nbytes


def _bytes_moved_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    queries: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    needs_bias: bool,
) -> tuple[int, int]:
    """The three kernels in turn: of q (with delta), of k and v, of the bias; workspaces are written and read."""
    images, rows = grad_out.shape[:2]
    tokens, itemsize = qkv.shape[1], compute_dtype(qkv.dtype).itemsize
    third, statistics = qkv.nbytes // 3, lse.nbytes
    row_tiles, key_tiles = (-(-size // tile(qkv.dtype).own) for size in (rows, tokens))
    biases = images * _rows_nbytes(bias, rows)
    rows_read = 2 * grad_out.nbytes + 2 * statistics + _nbytes(queries)  # q, dO, lse, delta
    read = rows_read + out.nbytes - statistics + row_tiles * 2 * third + biases
    read += 2 * third + key_tiles * rows_read + biases
    written = statistics + qkv.nbytes + (0 if queries is None else third)
    if needs_bias and bias is not None:
        shapes = workspace_shapes(qkv, bias, queries, num_heads, needs_bias)
        step_tiles = -(-tokens // tile(qkv.dtype).step)
        partials, positions = itemsize * math.prod(shapes["bias"]), 4 * math.prod(shapes.get("positions", (0,)))
        read += step_tiles * (rows_read - _nbytes(queries) + positions) + key_tiles * 2 * third
        unrounded = unrounded_nbytes(compute_dtype(qkv.dtype), bias)
        read += shapes["bias"][0] * bias.nbytes + partials + unrounded + _nbytes(queries)
        written += partials + unrounded + bias.nbytes + 2 * positions
    return read, written


def _rows_nbytes(bias: Tensor | None, rows: int) -> int:
    """Bytes of so many rows of the bias, in all heads."""
    return 0 if bias is None else bias.shape[0] * rows * bias.shape[2] * bias.itemsize


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


_ARGUMENTS = "Tensor qkv, Tensor? bias, Tensor? queries"
_CONSTANTS = "int num_heads, float scale"

OP = define_op(
    "biased_attention",
    reference=_reference,
    forward=Direction(
        schema=f"({_ARGUMENTS}, {_CONSTANTS}) -> (Tensor, Tensor)", fake=_fake, flops=_flops, bytes_moved=_bytes_moved
    ),
    backward=Direction(
        schema=f"(Tensor grad_out, {_ARGUMENTS}, Tensor out, Tensor lse, {_CONSTANTS}, bool needs_bias)"
        " -> (Tensor, Tensor)",
        fake=_fake_backward,
        flops=_flops_backward,
        bytes_moved=_bytes_moved_backward,
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    backends={"native": None, "triton": "simmim_fast.ops.biased_attention.kernels"},
)
