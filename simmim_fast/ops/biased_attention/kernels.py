"""Triton kernels of biased_attention and their launchers.

A program of the forward handles rows (queries) of one head of one image, a tile after the other; one of the backward
handles a head of a chunk of images. Up to 256 tokens the keys of a head are one tile, which stays on the chip. Logits
and their gradients live in registers. N need not be a multiple of anything. Pointers to an image are int64, since a
tensor may have more than 2^31 elements; offsets inside an image are int32, which spares the registers that would spill.

Letters as in op.py. Where the rows are queries, a row's token is looked up; a token that does not exist gives a row of
NaN and no gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from simmim_fast._triton import (
    MIN_DOT_SIZE,
    OPERAND_TYPES,
    as_operand,
    compute_type,
    contiguous,
    dot,
    on_device_of,
    store_rounded,
)
from simmim_fast.ops._devices import capability_of
from simmim_fast.ops.biased_attention.op import (
    CAPABILITIES,
    Tile,
    chunk_images,
    compute_dtype,
    program_rows,
    tiles,
    workspace_shapes,
)

NUM_STAGES = 1


@triton.jit
def _row_tokens(queries_ptr, image, rows, num_rows, NUM_TOKENS: tl.constexpr):
    """The token of each row (int32), and whether there are both row and token."""
    tokens, valid = rows, rows < num_rows
    if queries_ptr is not None:
        tokens = tl.load(queries_ptr + image * num_rows + rows, mask=valid, other=-1)
        valid = (tokens >= 0) & (tokens < NUM_TOKENS)
    return tokens, valid


@triton.jit
def _load_rows(pointer, rows, stride, valid, channels, HEAD_SIZE: tl.constexpr):
    """Rows of D channels, (rows, D), 0 where not valid."""
    offsets = rows[:, None] * stride + channels[None, :]
    return tl.load(pointer + offsets, mask=valid[:, None] & (channels < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def _load_keys(q_ptr, keys, channels, NUM_TOKENS: tl.constexpr, NUM_CHANNELS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """k and v of a head, (K, D) each."""
    valid = keys < NUM_TOKENS
    k = _load_rows(q_ptr + NUM_CHANNELS, keys, 3 * NUM_CHANNELS, valid, channels, HEAD_SIZE)
    v = _load_rows(q_ptr + 2 * NUM_CHANNELS, keys, 3 * NUM_CHANNELS, valid, channels, HEAD_SIZE)
    return k, v


@triton.jit
def _load_bias(bias_ptr, tokens, valid, keys, NUM_TOKENS: tl.constexpr, COMPUTE: tl.constexpr):
    """The head's bias of tokens (R, 1) and keys (1, K), or the other way round; -inf beyond the last key."""
    bias = tl.where(keys < NUM_TOKENS, 0.0, float("-inf")).to(COMPUTE)
    if bias_ptr is not None:
        pairs = tokens * NUM_TOKENS + keys
        bias += tl.load(bias_ptr + pairs, mask=valid & (keys < NUM_TOKENS), other=0.0).to(COMPUTE)
    return bias


@triton.jit
def _biased_attention_fwd_kernel(
    qkv_ptr,  # (B, N, 3C)
    bias_ptr,  # (h, N, N) or None
    queries_ptr,  # (B, K) or None
    out_ptr,  # (B, R, C)
    lse_ptr,  # (B, h, R)
    num_rows,  # R
    program_rows,  # a multiple of TILE_R
    NUM_TOKENS: tl.constexpr,  # N
    NUM_HEADS: tl.constexpr,  # h
    HEAD_SIZE: tl.constexpr,  # D
    SCALE: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Some rows of one head. Grid: (B x h, R / program_rows).

    Where all keys are one tile it is read once; else once for every tile of rows, and the softmax is corrected as
    larger logits turn up.
    """
    NUM_CHANNELS: tl.constexpr = NUM_HEADS * HEAD_SIZE
    WHOLE: tl.constexpr = TILE_K >= NUM_TOKENS
    image = (tl.program_id(0) // NUM_HEADS).to(tl.int64)
    head = tl.program_id(0) % NUM_HEADS
    channels = tl.arange(0, TILE_D)
    scale = tl.full((), SCALE, COMPUTE)
    q_ptr = qkv_ptr + image * NUM_TOKENS * 3 * NUM_CHANNELS + head * HEAD_SIZE
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * NUM_TOKENS * NUM_TOKENS
    out_ptr += image * num_rows * NUM_CHANNELS + head * HEAD_SIZE
    lse_ptr += (image * NUM_HEADS + head) * num_rows
    if WHOLE:
        keys = tl.arange(0, TILE_K)
        k, v = _load_keys(q_ptr, keys, channels, NUM_TOKENS, NUM_CHANNELS, HEAD_SIZE)

    program_row = tl.program_id(1) * program_rows
    for first_row in range(program_row, tl.minimum(program_row + program_rows, num_rows), TILE_R):
        rows = first_row + tl.arange(0, TILE_R)
        tokens, valid = _row_tokens(queries_ptr, image, rows, num_rows, NUM_TOKENS)
        q = _load_rows(q_ptr, tokens, 3 * NUM_CHANNELS, valid, channels, HEAD_SIZE)
        maximum = tl.full((TILE_R,), float("-inf"), COMPUTE)
        total = tl.zeros((TILE_R,), COMPUTE)
        out = tl.zeros((TILE_R, TILE_D), COMPUTE)
        for first_key in range(0, NUM_TOKENS, TILE_K):
            if not WHOLE:
                keys = first_key + tl.arange(0, TILE_K)
                k, v = _load_keys(q_ptr, keys, channels, NUM_TOKENS, NUM_CHANNELS, HEAD_SIZE)
            bias = _load_bias(bias_ptr, tokens[:, None], valid[:, None], keys[None, :], NUM_TOKENS, COMPUTE)
            logits = dot(q, tl.trans(k), OPERAND) * scale + bias  # (R, K)
            maximum_so_far = tl.maximum(maximum, tl.max(logits, axis=1))
            finite = tl.where(maximum_so_far == float("-inf"), 0.0, maximum_so_far)
            correction = tl.exp(maximum - finite)
            weights = tl.exp(logits - finite[:, None])
            total = total * correction + tl.sum(weights, axis=1)
            out = out * correction[:, None] + dot(weights, v, OPERAND)
            maximum = maximum_so_far

        out = tl.where(valid[:, None], out / total[:, None], float("nan"))
        in_bounds = rows < num_rows
        offsets = rows[:, None] * NUM_CHANNELS + channels[None, :]
        store_rounded(out_ptr + offsets, out, in_bounds[:, None] & (channels < HEAD_SIZE)[None, :])
        tl.store(lse_ptr + rows, maximum + tl.log(total), mask=in_bounds)


@triton.jit(do_not_specialize=["num_images", "chunk_images"])
def _biased_attention_bwd_kernel(
    grad_out_ptr,  # (B, R, C)
    qkv_ptr,  # (B, N, 3C)
    bias_ptr,  # (h, N, N) or None
    queries_ptr,  # (B, K) or None
    out_ptr,  # (B, R, C)
    lse_ptr,  # (B, h, R)
    grad_qkv_ptr,  # (B, N, 3C)
    grad_q_ptr,  # (B, R, C), sums over the tiles of keys so far; None where there is one tile
    partial_ptr,  # (chunks, h, N, N), sums over the chunk's images so far, at first 0 with queries; None: not wanted
    num_images,  # B
    chunk_images,
    num_rows,  # R
    NUM_TOKENS: tl.constexpr,  # N
    NUM_HEADS: tl.constexpr,  # h
    HEAD_SIZE: tl.constexpr,  # D
    SCALE: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """All gradients of one head of a chunk of images. Grid: chunks x h. Logits are transposed.

    The gradients of a tile of keys stay in registers while rows go by. What does not fit beside them, the sum of the
    bias over images and that of q over tiles of keys, is added up in memory that no other program touches.
    """
    NUM_CHANNELS: tl.constexpr = NUM_HEADS * HEAD_SIZE
    chunk = (tl.program_id(0) // NUM_HEADS).to(tl.int64)
    head = tl.program_id(0) % NUM_HEADS
    channels = tl.arange(0, TILE_D)
    in_head = (channels < HEAD_SIZE)[None, :]
    scale = tl.full((), SCALE, COMPUTE)
    if bias_ptr is not None:
        bias_ptr += head.to(tl.int64) * NUM_TOKENS * NUM_TOKENS
    if partial_ptr is not None:
        partial_ptr += (chunk * NUM_HEADS + head) * NUM_TOKENS * NUM_TOKENS

    first_image = chunk * chunk_images
    for image in range(first_image, tl.minimum(first_image + chunk_images, num_images)):
        first_token = image * NUM_TOKENS * 3 * NUM_CHANNELS + head * HEAD_SIZE
        first_out = image * num_rows * NUM_CHANNELS + head * HEAD_SIZE
        q_ptr, grad_ptr = qkv_ptr + first_token, grad_qkv_ptr + first_token
        for first_key in range(0, NUM_TOKENS, TILE_K):
            keys = first_key + tl.arange(0, TILE_K)
            k, v = _load_keys(q_ptr, keys, channels, NUM_TOKENS, NUM_CHANNELS, HEAD_SIZE)
            grad_k = tl.zeros((TILE_K, TILE_D), COMPUTE)
            grad_v = tl.zeros((TILE_K, TILE_D), COMPUTE)
            for first_row in range(0, num_rows, TILE_R):
                rows = first_row + tl.arange(0, TILE_R)
                tokens, valid = _row_tokens(queries_ptr, image, rows, num_rows, NUM_TOKENS)
                q = _load_rows(q_ptr, tokens, 3 * NUM_CHANNELS, valid, channels, HEAD_SIZE)
                grad_out = _load_rows(grad_out_ptr + first_out, rows, NUM_CHANNELS, valid, channels, HEAD_SIZE)
                out = _load_rows(out_ptr + first_out, rows, NUM_CHANNELS, valid, channels, HEAD_SIZE)
                delta = tl.sum(out.to(COMPUTE) * grad_out.to(COMPUTE), axis=1)  # (R)
                statistics = lse_ptr + (image * NUM_HEADS + head) * num_rows + rows
                lse = tl.load(statistics, mask=valid, other=float("inf"))  # which makes weights of 0
                bias = _load_bias(bias_ptr, tokens[None, :], valid[None, :], keys[:, None], NUM_TOKENS, COMPUTE)
                weights = tl.exp(dot(k, tl.trans(q), OPERAND) * scale + bias - lse[None, :])  # (K, R)
                grad_v += dot(weights, grad_out, OPERAND)
                grad_logits = weights * (dot(v, tl.trans(grad_out), OPERAND) - delta[None, :])
                if partial_ptr is not None:
                    pairs = partial_ptr + (tokens[None, :] * NUM_TOKENS + keys[:, None])
                    wanted = valid[None, :] & (keys < NUM_TOKENS)[:, None]
                    begun = (image > first_image) | (queries_ptr is not None)
                    so_far = tl.load(pairs, mask=wanted & begun, other=0.0)
                    tl.store(pairs, so_far + grad_logits, mask=wanted)
                grad_logits = as_operand(grad_logits, OPERAND)
                grad_k += dot(grad_logits, q, OPERAND)
                grad_q = dot(tl.trans(grad_logits), k, OPERAND)  # (R, D)
                wanted_q = valid[:, None] & in_head
                last = first_key + TILE_K >= NUM_TOKENS
                if grad_q_ptr is not None:
                    sums = grad_q_ptr + first_out + (rows[:, None] * NUM_CHANNELS + channels[None, :])
                    grad_q += tl.load(sums, mask=wanted_q & (first_key > 0), other=0.0)
                    tl.store(sums, grad_q, mask=wanted_q & ~last)
                offsets = tokens[:, None] * 3 * NUM_CHANNELS + channels[None, :]
                store_rounded(grad_ptr + offsets, grad_q * scale, wanted_q & last)
            tl.debug_barrier()  # other threads of the program read what was stored above

            offsets = keys[:, None] * 3 * NUM_CHANNELS + channels[None, :]
            in_bounds = (keys < NUM_TOKENS)[:, None] & in_head
            store_rounded(grad_ptr + offsets + NUM_CHANNELS, grad_k * scale, in_bounds)
            store_rounded(grad_ptr + offsets + 2 * NUM_CHANNELS, grad_v, in_bounds)


def forward(
    qkv: Tensor, bias: Tensor | None, queries: Tensor | None, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The operator's forward: out (B, R, C), lse (B, h, R)."""
    images, tokens, channels = qkv.shape
    rows = tokens if queries is None else queries.shape[1]
    out = qkv.new_empty((images, rows, channels // 3))
    lse = qkv.new_empty((images, num_heads, rows), dtype=compute_dtype(qkv.dtype))
    if out.numel() == 0:
        return out, lse
    tile = tiles(qkv, num_heads, capability_of(qkv.device, CAPABILITIES)).forward
    of_a_program = program_rows(tile, images * num_heads, rows, tokens)
    with on_device_of(qkv):
        _biased_attention_fwd_kernel[(images * num_heads, triton.cdiv(rows, of_a_program))](
            qkv.contiguous(),
            contiguous(bias),
            contiguous(queries),
            out,
            lse,
            rows,
            of_a_program,
            **_constants(tile, qkv, num_heads, scale),
        )
    return out, lse


def backward(
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
    """The operator's backward: grad_qkv (B, N, 3C), and grad_bias (h, N, N), empty where it is not needed."""
    images, _, channels = qkv.shape
    tile = tiles(qkv, num_heads, capability_of(qkv.device, CAPABILITIES)).backward
    needs_bias = needs_bias and bias is not None
    shapes = workspace_shapes(tile, qkv, bias, queries, num_heads, needs_bias)
    sums = {name: qkv.new_empty(shape, dtype=lse.dtype) for name, shape in shapes.items()}
    grad_qkv = qkv.new_empty(qkv.shape)
    if queries is not None:
        grad_qkv[..., : channels // 3].zero_()
        if needs_bias:
            sums["bias"].zero_()
    if qkv.numel() > 0:
        chunk = chunk_images(images, num_heads, needs_bias)
        with on_device_of(qkv):
            _biased_attention_bwd_kernel[(triton.cdiv(images, chunk) * num_heads,)](
                grad_out.contiguous(),
                qkv.contiguous(),
                contiguous(bias),
                contiguous(queries),
                out,
                lse,
                grad_qkv,
                sums.get("q"),
                sums.get("bias"),
                images,
                chunk,
                grad_out.shape[1],
                **_constants(tile, qkv, num_heads, scale),
            )
    return grad_qkv, sums["bias"].sum(0).to(bias.dtype) if needs_bias else grad_out.new_empty(0)


def _constants(tile: Tile, qkv: Tensor, num_heads: int, scale: float) -> dict[str, object]:
    """Arguments that both kernels share. With sizes known when compiling, fewer registers hold offsets and masks."""
    head_size = qkv.shape[2] // (3 * num_heads)
    return {
        "NUM_TOKENS": qkv.shape[1],
        "NUM_HEADS": num_heads,
        "HEAD_SIZE": head_size,
        "SCALE": scale,
        "OPERAND": OPERAND_TYPES[qkv.dtype],
        "COMPUTE": compute_type(qkv.dtype),
        "TILE_R": tile.rows,
        "TILE_K": tile.keys,
        "TILE_D": max(MIN_DOT_SIZE, triton.next_power_of_2(head_size)),
        "num_warps": tile.warps,
        "num_stages": NUM_STAGES,
    }
