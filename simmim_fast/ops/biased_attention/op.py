"""Operators of biased_attention: schemas, fakes, autograd, cost. The formulas are derived in README.md.

Shapes: B batch, N tokens, h heads of D channels (C = h D), R rows of an image: its N tokens or its K queries; qkv
(B, N, 3C); bias (h, N, N); queries (B, K) int32; out and grad_out (B, R, C); lse (B, h, R), the logarithm of a row's
sum of exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simmim_fast._backends import triton_version
from simmim_fast.ops._devices import MULTIPROCESSORS, capability_of
from simmim_fast.ops._registration import Direction, define_op, unrounded_nbytes
from simmim_fast.ops.biased_attention import reference

MAX_HEAD_SIZE = 128
MAX_IMAGE_ELEMENTS = 2**31  # of qkv, and of a head's bias: the Triton kernels' offsets inside an image are int32
CAPABILITIES = (80, 86, 90, 100)  # that have tiles of their own; the blocks of 8.6 and 8.9 have 99 KiB


# Images that a program of the backward takes at a time on 9.0. triton 3.9 no longer moves anything out of a loop with
# `disable_licm`, not even changes of layout, and two spill 26 registers.
HOPPER_IMAGES = 2 if () < triton_version() < (3, 9) else 1


class Tile(NamedTuple):
    """Sizes of a Triton kernel's tiles of logits, the warps of a program, and the images it takes at a time.

    hoists: What does not change may leave the backward's loop over keys.
    """

    rows: int
    keys: int
    warps: int = 8
    images: int = 1
    hoists: bool = False


def forward_tile(qkv: Tensor, num_heads: int, capability: int) -> Tile:
    """The largest tile found that fits and spills no register; below that, no more keys than there are."""
    tokens, head_size = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    if qkv.itemsize > 2:
        tile = Tile(16, 32, warps=4) if head_size <= 32 else Tile(32, 32) if head_size <= 64 else Tile(16, 32)
    elif head_size > 64:
        tile = Tile(64, 128)
    else:
        one_tile = tokens <= 256 and head_size > 32 and capability != 86
        tile = Tile(32, 256) if one_tile else Tile(64, 64)
    return tile._replace(keys=min(tile.keys, _covering(tokens)))


def backward_tile(qkv: Tensor, bias: Tensor | None, queries: Tensor | None, num_heads: int, capability: int) -> Tile:
    """The largest tile found that fits and spills no register; below that, no more rows than there are.

    Two images at a time where that spares reading a bias twice, and where they have the same rows.
    """
    tokens, head_size = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    rows = tokens if queries is None else queries.shape[1]
    hopper = capability >= 90
    if qkv.itemsize > 2:
        tile = Tile(16, 16) if head_size > 64 else Tile(32 if capability >= 100 else 64, 16)
    elif head_size > 64:
        tile = Tile(256 if hopper else 32, 16)
    elif head_size <= 32 or (tokens > 256 and not hopper) or capability == 86:
        tile = Tile(128, 16)
    else:
        pairs = {90: HOPPER_IMAGES, 100: 2} if tokens <= 256 else {}
        tile = Tile(256, 16, images=pairs.get(capability, 1))
    images = 1 if bias is None or queries is not None else tile.images
    return tile._replace(rows=min(tile.rows, _covering(rows)), images=images, hoists=not hopper)


def _covering(size: int) -> int:
    """The smallest side of a tile that holds so many rows or keys: a power of two, 16 or more."""
    return max(16, 2 ** math.ceil(math.log2(max(size, 1))))


def program_rows(tile: Tile, heads: int, rows: int, tokens: int) -> int:
    """Rows of one program of the forward, a multiple of the tile's.

    All rows of one of the `heads` of all images where its keys are one tile, which is then read once, unless that makes
    too few programs; else one tile.
    """
    if tile.keys < tokens:
        return tile.rows
    row_tiles = -(-rows // tile.rows)
    programs = min(row_tiles, -(-MULTIPROCESSORS // heads))
    return tile.rows * -(-row_tiles // programs)


def num_chunks(tile: Tile, images: int, num_heads: int, needs_bias: bool) -> int:
    """Chunks of images, for each of which one program of the backward has a head.

    For the gradient of the bias, which is added up over a chunk, a chunk is two images or more.
    """
    if not needs_bias:
        return -(-images // tile.images)
    return min(-(-images // 2), max(1, MULTIPROCESSORS // num_heads))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits, softmax and sums for qkv of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def workspace_shapes(
    tile: Tile, qkv: Tensor, bias: Tensor | None, queries: Tensor | None, num_heads: int, needs_bias: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the workspaces of Triton's backward, both in `compute_dtype`.

    "kv": the gradients of k and v, summed over the tiles of rows so far, where there are several. "bias": that of the
    bias, summed over each chunk of images.
    """
    images, tokens, channels = qkv.shape
    shapes: dict[str, tuple[int, ...]] = {}
    if (tokens if queries is None else queries.shape[1]) > tile.rows:
        shapes["kv"] = (images, tokens, 2 * channels // 3)
    if needs_bias and bias is not None:
        shapes["bias"] = (num_chunks(tile, images, num_heads, needs_bias), *bias.shape)
    return shapes


def size_refusal(backend: str, *, tokens: int, channels: int, num_heads: int) -> str | None:
    """Why a backend does not take N tokens of C channels in so many heads; None where it does."""
    if backend != "triton":
        return None
    if channels > MAX_HEAD_SIZE * num_heads:
        return f"it takes heads of at most {MAX_HEAD_SIZE} channels; got {channels // num_heads}"
    if tokens * max(tokens, 3 * channels) >= MAX_IMAGE_ELEMENTS:
        return f"it takes images whose qkv, and whose pairs of tokens, are fewer than 2^31; got {tokens} tokens"
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
    """Five products: q k' again, dO v', p' dO, ds k and ds' q."""
    return 5 * _product(qkv, queries)


def _bytes_moved(
    qkv: Tensor,
    bias: Tensor | None,
    queries: Tensor | None,
    num_heads: int,
    scale: float,
    *,
    every_load: bool = False,
) -> tuple[int, int]:
    """Every program (a tile of rows, where keys are several tiles) loads k and v, every image the bias."""
    out, lse = _fake(qkv.to("meta"), bias, queries, num_heads, scale)
    images, rows = out.shape[:2]
    if out.numel() == 0:
        return 0, 0
    tile = forward_tile(qkv, num_heads, capability_of(qkv.device, CAPABILITIES))
    if every_load:
        programs = -(-rows // program_rows(tile, images * num_heads, rows, qkv.shape[1]))
        bias_rows, of_queries = images * rows, num_heads
    else:
        programs, bias_rows, of_queries = 1, _distinct_rows(qkv, queries, images), 1
    read = out.nbytes + programs * 2 * qkv.nbytes // 3 + _rows_nbytes(bias, bias_rows)
    return read + of_queries * _nbytes(queries), out.nbytes + lse.nbytes


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
    *,
    every_load: bool = False,
) -> tuple[int, int]:
    """Every tile of rows loads k, v and their gradients' sums, every unit of images the bias and its sum."""
    images, rows = grad_out.shape[:2]
    tile = backward_tile(qkv, bias, queries, num_heads, capability_of(qkv.device, CAPABILITIES))
    row_tiles, units = -(-rows // tile.rows), -(-images // tile.images)
    shapes = workspace_shapes(tile, qkv, bias, queries, num_heads, needs_bias)
    itemsize = compute_dtype(qkv.dtype).itemsize
    grad_kv_sums = itemsize * math.prod(shapes.get("kv", (0,)))
    if every_load:
        key_loads, sum_loads, bias_rows, of_queries = row_tiles, row_tiles - 1, units * rows, num_heads
    else:
        key_loads, sum_loads, bias_rows, of_queries = 1, 1, _distinct_rows(qkv, queries, images), 1
    read = 3 * grad_out.nbytes + lse.nbytes + of_queries * _nbytes(queries)
    read += key_loads * 2 * qkv.nbytes // 3 + sum_loads * grad_kv_sums + _rows_nbytes(bias, bias_rows)
    written = 2 * qkv.nbytes // 3 + grad_out.nbytes + grad_kv_sums
    if queries is not None:
        written += qkv.nbytes // 3  # zeros where tokens are not queried
    if bias is not None and "bias" in shapes:
        partials, unrounded = itemsize * math.prod(shapes["bias"]), unrounded_nbytes(compute_dtype(qkv.dtype), bias)
        loaded, stored = _rows_of_sums(shapes["bias"][0], qkv, queries, units)
        if every_load:
            loaded = (units - shapes["bias"][0] if queries is None else units) * rows
        of_a_row = itemsize * bias[:, 0].numel()
        read += loaded * of_a_row + partials + unrounded
        written += stored * of_a_row + unrounded + bias.nbytes + (0 if queries is None else partials)
    return read, written


def _distinct_rows(qkv: Tensor, queries: Tensor | None, images: int) -> int:
    """Rows of the bias that so many images read: all, or as many as their queries can name."""
    tokens = qkv.shape[1]
    return tokens if queries is None else min(images * queries.shape[1], tokens)


def _rows_of_sums(chunks: int, qkv: Tensor, queries: Tensor | None, units: int) -> tuple[int, int]:
    """Rows of the chunks' sums that are read and written: those of a chunk's first unit are read with queries alone."""
    if queries is None:
        return min(chunks, units - chunks) * qkv.shape[1], chunks * qkv.shape[1]
    rows = sum(_distinct_rows(qkv, queries, len(range(chunk, units, chunks))) for chunk in range(chunks))
    return rows, rows


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
        schema=f"({_ARGUMENTS}, {_CONSTANTS}) -> (Tensor, Tensor)",
        fake=_fake,
        flops=_flops,
        bytes_moved=_bytes_moved,
        bytes_loaded=partial(_bytes_moved, every_load=True),
    ),
    backward=Direction(
        schema=f"(Tensor grad_out, {_ARGUMENTS}, Tensor out, Tensor lse, {_CONSTANTS}, bool needs_bias)"
        " -> (Tensor, Tensor)",
        fake=_fake_backward,
        flops=_flops_backward,
        bytes_moved=_bytes_moved_backward,
        bytes_loaded=partial(_bytes_moved_backward, every_load=True),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    backends={"native": None, "triton": "simmim_fast.ops.biased_attention.kernels"},
)
