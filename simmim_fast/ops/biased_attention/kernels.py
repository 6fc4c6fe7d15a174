"""Triton kernels of biased_attention and their launchers.

A program of the forward handles rows (queries) of one head of one image, a tile after the other; one of the backward
handles a head of a chunk of images, two at a time where they share a bias. Up to 256 tokens the keys of a head in the
forward, and its rows in the backward, are one tile, which stays on the chip. Logits and their gradients live in
registers. N need not be a multiple of anything. Pointers to an image are int64, since a tensor may have more than 2^31
elements; offsets inside an image are int32, which spares the registers that would spill.

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
    mask_if,
    on_device_of,
    store_rounded,
)
from simmim_fast.ops._devices import capability_of
from simmim_fast.ops.biased_attention.op import (
    CAPABILITIES,
    Tile,
    backward_tile,
    compute_dtype,
    forward_tile,
    num_chunks,
    program_rows,
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
def _load_bias(bias_ptr, first_pair, pairs, wanted, keys, NUM_TOKENS: tl.constexpr, COMPUTE: tl.constexpr):
    """The bias of a head's pairs of tokens and keys (R, K), as far as they are wanted; -inf beyond the last key."""
    bias = tl.where(keys < NUM_TOKENS, 0.0, float("-inf")).to(COMPUTE)[None, :]
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + first_pair + pairs, mask=wanted, other=0.0).to(COMPUTE)
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
    first_pair = head.to(tl.int64) * NUM_TOKENS * NUM_TOKENS
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
            pairs = tokens[:, None] * NUM_TOKENS + keys[None, :]
            valid_pairs = valid[:, None] & (keys < NUM_TOKENS)[None, :]
            bias = _load_bias(bias_ptr, first_pair, pairs, valid_pairs, keys, NUM_TOKENS, COMPUTE)
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


@triton.jit
def _load_image(
    image,
    head,
    tokens,
    rows,
    valid,
    channels,
    grad_out_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    NUM_ROWS: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """What the backward needs of a head's rows: q and grad_out (R, D), delta and lse (R)."""
    NUM_CHANNELS: tl.constexpr = NUM_HEADS * HEAD_SIZE
    q_ptr = qkv_ptr + image * NUM_TOKENS * 3 * NUM_CHANNELS + head * HEAD_SIZE
    first_out = image * NUM_ROWS * NUM_CHANNELS + head * HEAD_SIZE
    q = _load_rows(q_ptr, tokens, 3 * NUM_CHANNELS, valid, channels, HEAD_SIZE)
    grad_out = _load_rows(grad_out_ptr + first_out, rows, NUM_CHANNELS, valid, channels, HEAD_SIZE)
    out = _load_rows(out_ptr + first_out, rows, NUM_CHANNELS, valid, channels, HEAD_SIZE)
    delta = tl.sum(out.to(COMPUTE) * grad_out.to(COMPUTE), axis=1)
    statistics = lse_ptr + (image * NUM_HEADS + head) * NUM_ROWS + rows
    lse = tl.load(statistics, mask=valid, other=float("inf"))  # which makes weights of 0
    return q, grad_out, delta, lse


@triton.jit
def _tile_gradients(
    image,
    head,
    there,
    q,
    grad_out,
    delta,
    lse,
    bias,
    keys,
    first_row,
    channels,
    scale,
    qkv_ptr,
    grad_qkv_ptr,
    grad_kv_ptr,
    NUM_ROWS: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    OPERAND: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """Store grad_k and grad_v of a tile of keys (their sums so far, before the last rows).

    Returns grad_logits (R, K), and the tile's part of grad_q (R, D). grad_k and grad_v are multiplied transposed: a
    product of Hopper's has 64 rows, and D are more often than the tile's keys are.
    """
    NUM_CHANNELS: tl.constexpr = NUM_HEADS * HEAD_SIZE
    in_bounds = mask_if(keys < NUM_TOKENS, there)
    first_token = image * NUM_TOKENS * 3 * NUM_CHANNELS + head * HEAD_SIZE
    k = _load_rows(qkv_ptr + first_token + NUM_CHANNELS, keys, 3 * NUM_CHANNELS, in_bounds, channels, HEAD_SIZE)
    v = _load_rows(qkv_ptr + first_token + 2 * NUM_CHANNELS, keys, 3 * NUM_CHANNELS, in_bounds, channels, HEAD_SIZE)
    weights = tl.exp(dot(q, tl.trans(k), OPERAND) * scale + bias - lse[:, None])
    grad_v = tl.trans(dot(tl.trans(grad_out), weights, OPERAND))
    grad_logits = weights * (dot(grad_out, tl.trans(v), OPERAND) - delta[:, None])
    rounded = as_operand(grad_logits, OPERAND)
    grad_k = tl.trans(dot(tl.trans(q), rounded, OPERAND))
    grad_q = dot(rounded, k, OPERAND)

    wanted = in_bounds[:, None] & (channels < HEAD_SIZE)[None, :]
    if grad_kv_ptr is not None:
        last = first_row + TILE_R >= NUM_ROWS
        first_sum = image * NUM_TOKENS * 2 * NUM_CHANNELS + head * HEAD_SIZE
        sums = grad_kv_ptr + first_sum + (keys[:, None] * 2 * NUM_CHANNELS + channels[None, :])
        grad_k += tl.load(sums, mask=mask_if(wanted, first_row > 0), other=0.0)
        grad_v += tl.load(sums + NUM_CHANNELS, mask=mask_if(wanted, first_row > 0), other=0.0)
        tl.store(sums, grad_k, mask=mask_if(wanted, ~last))
        tl.store(sums + NUM_CHANNELS, grad_v, mask=mask_if(wanted, ~last))
        wanted = mask_if(wanted, last)
    offsets = keys[:, None] * 3 * NUM_CHANNELS + channels[None, :]
    store_rounded(grad_qkv_ptr + first_token + NUM_CHANNELS + offsets, grad_k * scale, wanted)
    store_rounded(grad_qkv_ptr + first_token + 2 * NUM_CHANNELS + offsets, grad_v, wanted)
    return grad_logits, grad_q


@triton.jit(do_not_specialize=["num_images", "num_units"])
def _biased_attention_bwd_kernel(
    grad_out_ptr,  # (B, R, C)
    qkv_ptr,  # (B, N, 3C)
    bias_ptr,  # (h, N, N) or None
    queries_ptr,  # (B, K) or None
    out_ptr,  # (B, R, C)
    lse_ptr,  # (B, h, R)
    grad_qkv_ptr,  # (B, N, 3C)
    grad_kv_ptr,  # (B, N, 2C), sums over the tiles of rows so far; None where there is one tile
    partial_ptr,  # (chunks, h, N, N), sums over the chunk's images so far, at first 0 with queries; None: not wanted
    num_images,  # B
    num_units,  # B / IMAGES, times h
    NUM_ROWS: tl.constexpr,  # R
    NUM_TOKENS: tl.constexpr,  # N
    NUM_HEADS: tl.constexpr,  # h
    HEAD_SIZE: tl.constexpr,  # D
    SCALE: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    IMAGES: tl.constexpr,  # 1 or 2
    HOISTS: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """All gradients of one head of a chunk of images, one or two at a time. Grid: chunks x h.

    grad_q of a tile of rows stays in registers while keys go by; two images share the tiles of the bias and of its
    gradient. What does not fit beside them, the sum of the bias over images and those of k and v over tiles of rows, is
    added up in memory that no other program touches. On 9.0 and 10.0 nothing is hoisted out of the loops: it would be
    spilled. On 8.x and 12.0 q and grad_out have to leave the loop over keys, to be in shared memory before it (HOISTS).
    """
    NUM_CHANNELS: tl.constexpr = NUM_HEADS * HEAD_SIZE
    channels = tl.arange(0, TILE_D)
    scale = tl.full((), SCALE, COMPUTE)
    for unit in tl.range(tl.program_id(0), num_units, tl.num_programs(0), disable_licm=True):
        head = unit % NUM_HEADS  # every time the same, since the grid is a multiple of h
        image = tl.cast(unit // NUM_HEADS * IMAGES, tl.int64)
        paired = image + 1 < num_images
        first_pair = tl.cast(head, tl.int64) * NUM_TOKENS * NUM_TOKENS
        grad_ptr = grad_qkv_ptr + image * NUM_TOKENS * 3 * NUM_CHANNELS + head * HEAD_SIZE
        for first_row in range(0, NUM_ROWS, TILE_R):
            rows = first_row + tl.arange(0, TILE_R)
            tokens, valid = _row_tokens(queries_ptr, image, rows, NUM_ROWS, NUM_TOKENS)
            q, grad_out, delta, lse = _load_image(
                *(image, head, tokens, rows, valid, channels, grad_out_ptr, qkv_ptr, out_ptr, lse_ptr),
                *(NUM_ROWS, NUM_TOKENS, NUM_HEADS, HEAD_SIZE, COMPUTE),
            )
            grad_q = tl.zeros((TILE_R, TILE_D), COMPUTE)
            if IMAGES == 2:
                q_2, grad_out_2, delta_2, lse_2 = _load_image(
                    *(image + 1, head, tokens, rows, mask_if(valid, paired), channels),
                    *(grad_out_ptr, qkv_ptr, out_ptr, lse_ptr, NUM_ROWS, NUM_TOKENS, NUM_HEADS, HEAD_SIZE, COMPUTE),
                )
                grad_q_2 = tl.zeros((TILE_R, TILE_D), COMPUTE)
            for first_key in tl.range(0, NUM_TOKENS, TILE_K, disable_licm=not HOISTS):
                keys = first_key + tl.arange(0, TILE_K)
                pairs = tokens[:, None] * NUM_TOKENS + keys[None, :]
                valid_pairs = valid[:, None] & (keys < NUM_TOKENS)[None, :]
                bias = _load_bias(bias_ptr, first_pair, pairs, valid_pairs, keys, NUM_TOKENS, COMPUTE)
                grad_logits, of_tile = _tile_gradients(
                    *(image, head, True, q, grad_out, delta, lse, bias, keys, first_row, channels, scale),
                    *(qkv_ptr, grad_qkv_ptr, grad_kv_ptr, NUM_ROWS, NUM_TOKENS, NUM_HEADS, HEAD_SIZE, OPERAND, TILE_R),
                )
                grad_q += of_tile
                if IMAGES == 2:
                    of_second, of_tile = _tile_gradients(
                        *(image + 1, head, paired, q_2, grad_out_2, delta_2, lse_2, bias, keys, first_row, channels),
                        *(scale, qkv_ptr, grad_qkv_ptr, grad_kv_ptr),
                        *(NUM_ROWS, NUM_TOKENS, NUM_HEADS, HEAD_SIZE, OPERAND, TILE_R),
                    )
                    grad_q_2 += of_tile
                    grad_logits += of_second
                if partial_ptr is not None:
                    first_sum = tl.cast(unit % tl.num_programs(0), tl.int64) * NUM_TOKENS * NUM_TOKENS
                    sums = partial_ptr + first_sum + pairs
                    begun = (unit >= tl.num_programs(0)) | (queries_ptr is not None)
                    so_far = tl.load(sums, mask=mask_if(valid_pairs, begun), other=0.0)
                    tl.store(sums, so_far + grad_logits, mask=valid_pairs)
            offsets = tokens[:, None] * 3 * NUM_CHANNELS + channels[None, :]
            wanted = valid[:, None] & (channels < HEAD_SIZE)[None, :]
            store_rounded(grad_ptr + offsets, grad_q * scale, wanted)
            if IMAGES == 2:
                grad_ptr += NUM_TOKENS * 3 * NUM_CHANNELS
                there = (unit // NUM_HEADS + 1) * IMAGES <= num_images  # paired, which until here would be spilled
                store_rounded(grad_ptr + offsets, grad_q_2 * scale, mask_if(wanted, there))
            tl.debug_barrier()  # other threads of the program read what was stored above


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
    tile = forward_tile(qkv, num_heads, capability_of(qkv.device, CAPABILITIES))
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
    needs_bias = needs_bias and bias is not None
    tile = backward_tile(qkv, bias, queries, num_heads, capability_of(qkv.device, CAPABILITIES))
    shapes = workspace_shapes(tile, qkv, bias, queries, num_heads, needs_bias)
    sums = {name: qkv.new_empty(shape, dtype=lse.dtype) for name, shape in shapes.items()}
    grad_qkv = qkv.new_empty(qkv.shape)
    if queries is not None:
        grad_qkv[..., : channels // 3 if grad_out.numel() > 0 else channels].zero_()
        if needs_bias:
            sums["bias"].zero_()
    if grad_out.numel() > 0:
        with on_device_of(qkv):
            _biased_attention_bwd_kernel[(num_chunks(tile, images, num_heads, needs_bias) * num_heads,)](
                grad_out.contiguous(),
                qkv.contiguous(),
                contiguous(bias),
                contiguous(queries),
                out,
                lse,
                grad_qkv,
                sums.get("kv"),
                sums.get("bias"),
                images,
                triton.cdiv(images, tile.images) * num_heads,
                grad_out.shape[1],
                **_constants(tile, qkv, num_heads, scale),
                IMAGES=tile.images,
                HOISTS=tile.hoists,
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
