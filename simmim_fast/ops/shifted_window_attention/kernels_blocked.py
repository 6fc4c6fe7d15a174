"""Triton kernels of shifted_window_attention for windows of more than 64 tokens: blocks of queries, blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from simmim_fast._triton import as_operand, dot
from simmim_fast.ops.shifted_window_attention.kernels_tiles import (
    compared,
    cut_sides,
    first_token,
    keep_apart,
    load_bias,
    load_head,
    load_keys_and_values,
    logit_factor,
    logits,
    query_tokens,
    store_head,
    store_sum,
    through_norm,
    window_cuts,
    window_tokens,
)


@triton.jit(do_not_specialize=["num_queries"])
def _window_attention_blocked_fwd_kernel(
    qkv_ptr,  # (B, H, W, 3C)
    table_ptr,  # (h, offsets)
    logit_scale_ptr,  # (h) or None
    pad_value_ptr,  # (3C) or None
    queries_ptr,  # (B, K) or None
    out_ptr,  # (B, H, W, C) or (B, K, C)
    num_queries,  # K
    num_heads,  # h
    height,  # H
    width,  # W
    windows_h,
    windows_w,
    shift_h,
    shift_w,
    SCALE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    SHIFTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One block of queries of a window and head, over blocks of keys. Grid: (windows x h, query blocks).

    Reads q once, k and v once for every query block, and writes out; the softmax is rescaled from block to block.
    """
    COSINE: tl.constexpr = logit_scale_ptr is not None
    OPERAND: tl.constexpr = qkv_ptr.dtype.element_ty
    head = tl.program_id(0) % num_heads
    window = tl.program_id(0) // num_heads
    channels = num_heads * HEAD_SIZE
    first_channel = head * HEAD_SIZE
    first = first_token(window, height, width, windows_h, windows_w)
    image_ptr = qkv_ptr + first * 3 * channels
    places = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    column_ptr = table_ptr + head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    factor = logit_factor(logit_scale_ptr, head, SCALE, COMPUTE)
    if queries_ptr is None:
        q_slots = places
        q_tokens, q_inside = window_tokens(
            window, places, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
    else:
        q_tokens, q_inside, q_slots = query_tokens(
            queries_ptr, window, places, num_queries, height, width, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
    q = load_head(image_ptr, q_tokens, q_inside, 3 * channels, first_channel, HEAD_SIZE, TILE_D)  # (M, D)
    q_sides = cut_sides(q_slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
    cuts = window_cuts(window, windows_h, windows_w)
    q = compared(q, COSINE, COMPUTE, OPERAND)[0]
    row_max = tl.full((TILE_M,), float("-inf"), COMPUTE)
    row_sum = tl.zeros((TILE_M,), COMPUTE)
    out = tl.zeros((TILE_M, TILE_D), COMPUTE)

    for first_slot in range(0, WINDOW_H * WINDOW_W, TILE_N):
        slots = first_slot + tl.arange(0, TILE_N)
        in_window = slots < WINDOW_H * WINDOW_W
        tokens, inside = window_tokens(
            window, slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
        k, v = load_keys_and_values(
            image_ptr, pad_value_ptr, tokens, inside, in_window, num_heads, head, HEAD_SIZE, TILE_D, PADDED
        )  # (N, D) each
        bias = load_bias(column_ptr, 1, q_slots, slots, WINDOW_H, WINDOW_W, COMPUTE)  # (M, N)
        sides = cut_sides(slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
        k = compared(k, COSINE, COMPUTE, OPERAND)[0]
        s = logits(q, k, bias, factor, OPERAND)
        if SHIFTED:
            s = keep_apart(s, q_sides, sides, cuts)
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
        p = tl.exp2(s - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        out = out * rescale[:, None] + dot(p, v, OPERAND)
        row_max = new_max

    out /= row_sum[:, None]
    if queries_ptr is None:
        store_head(out_ptr + first * channels, out, q_tokens, q_inside, channels, first_channel, HEAD_SIZE, TILE_D)
    else:
        out = tl.where(q_inside[:, None], out, float("nan"))
        rows_ptr = out_ptr + window.to(tl.int64) * num_queries * channels
        store_head(rows_ptr, out, places, places < num_queries, channels, first_channel, HEAD_SIZE, TILE_D)


@triton.jit
def _load_grad_out(
    grad_out_ptr,
    places_ptr,
    window,
    first,
    tokens,
    inside,
    num_queries,
    num_heads,
    head,
    HEAD_SIZE: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One head of the gradient of out of some tokens: (tokens, TILE_D), zero of those that are no queries."""
    channels = num_heads * HEAD_SIZE
    rows_ptr = grad_out_ptr + first * channels
    if places_ptr is not None:
        tokens = tl.load(places_ptr + first + tokens, mask=inside, other=-1)
        inside = tokens >= 0
        rows_ptr = grad_out_ptr + window.to(tl.int64) * num_queries * channels
    return load_head(rows_ptr, tokens, inside, channels, head * HEAD_SIZE, HEAD_SIZE, TILE_D)


@triton.jit
def _weights_and_gradient(s, grad, v, normaliser, delta, OPERAND: tl.constexpr):
    """The softmax weights of a block of logits, and the gradient of those: (queries, keys) each."""
    p = tl.exp2(s - normaliser[:, None])
    return p, p * (dot(grad, tl.trans(v), OPERAND) - delta[:, None])


@triton.jit(do_not_specialize=["num_queries"])
def _window_attention_blocked_bwd_queries_kernel(
    grad_out_ptr,  # (B, H, W, C) or (B, K, C)
    qkv_ptr,  # (B, H, W, 3C)
    table_ptr,  # (h, offsets)
    logit_scale_ptr,  # (h) or None
    pad_value_ptr,  # (3C) or None
    places_ptr,  # (B, H, W): a token's place among the queries, -1 where it is none; or None
    grad_qkv_ptr,  # (B, H, W, 3C)
    normaliser_ptr,  # (windows, h, N): log2 of a row's sum of exponentials
    delta_ptr,  # (windows, h, N): a row's sum of p grad_p
    logit_scale_partial_ptr,  # (windows x query blocks, h) or None
    num_queries,  # K
    num_heads,  # h
    height,  # H
    width,  # W
    windows_h,
    windows_w,
    shift_h,
    shift_w,
    SCALE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    SHIFTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """The gradient of one block of queries of a window and head. Grid: (windows x h, query blocks).

    Goes over the blocks of keys twice: for the statistics of the rows, which it stores, then for grad_q.
    """
    COSINE: tl.constexpr = logit_scale_ptr is not None
    OPERAND: tl.constexpr = qkv_ptr.dtype.element_ty
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % num_heads
    window = tl.program_id(0) // num_heads
    channels = num_heads * HEAD_SIZE
    first_channel = head * HEAD_SIZE
    first = first_token(window, height, width, windows_h, windows_w)
    image_ptr = qkv_ptr + first * 3 * channels
    grad_image_ptr = grad_qkv_ptr + first * 3 * channels
    q_slots = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    column_ptr = table_ptr + head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    factor = logit_factor(logit_scale_ptr, head, SCALE, COMPUTE)
    q_tokens, q_inside = window_tokens(
        window, q_slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
    )
    q = load_head(image_ptr, q_tokens, q_inside, 3 * channels, first_channel, HEAD_SIZE, TILE_D)  # (M, D)
    grad = _load_grad_out(
        grad_out_ptr, places_ptr, window, first, q_tokens, q_inside, num_queries, num_heads, head, HEAD_SIZE, TILE_D
    )  # (M, D)
    q_sides = cut_sides(q_slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
    cuts = window_cuts(window, windows_h, windows_w)
    q, inverse_q = compared(q, COSINE, COMPUTE, OPERAND)
    row_max = tl.full((TILE_M,), float("-inf"), COMPUTE)
    row_sum = tl.zeros((TILE_M,), COMPUTE)
    delta = tl.zeros((TILE_M,), COMPUTE)
    grad_q = tl.zeros((TILE_M, TILE_D), COMPUTE)

    for first_slot in range(0, TOKENS, TILE_N):
        slots = first_slot + tl.arange(0, TILE_N)
        tokens, inside = window_tokens(
            window, slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
        k, v = load_keys_and_values(
            image_ptr, pad_value_ptr, tokens, inside, slots < TOKENS, num_heads, head, HEAD_SIZE, TILE_D, PADDED
        )  # (N, D) each
        bias = load_bias(column_ptr, 1, q_slots, slots, WINDOW_H, WINDOW_W, COMPUTE)  # (M, N)
        sides = cut_sides(slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
        k = compared(k, COSINE, COMPUTE, OPERAND)[0]
        s = logits(q, k, bias, factor, OPERAND)
        if SHIFTED:
            s = keep_apart(s, q_sides, sides, cuts)
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
        p = tl.exp2(s - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        delta = delta * rescale + tl.sum(p * dot(grad, tl.trans(v), OPERAND), axis=1)
        row_max = new_max

    normaliser = row_max + tl.log2(row_sum)
    delta /= row_sum
    for first_slot in range(0, TOKENS, TILE_N):
        slots = first_slot + tl.arange(0, TILE_N)
        tokens, inside = window_tokens(
            window, slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
        k, v = load_keys_and_values(
            image_ptr, pad_value_ptr, tokens, inside, slots < TOKENS, num_heads, head, HEAD_SIZE, TILE_D, PADDED
        )  # (N, D) each
        bias = load_bias(column_ptr, 1, q_slots, slots, WINDOW_H, WINDOW_W, COMPUTE)
        sides = cut_sides(slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
        k = compared(k, COSINE, COMPUTE, OPERAND)[0]
        s = logits(q, k, bias, factor, OPERAND)
        if SHIFTED:
            s = keep_apart(s, q_sides, sides, cuts)
        grad_s = _weights_and_gradient(s, grad, v, normaliser, delta, OPERAND)[1]
        grad_q += dot(grad_s, k, OPERAND)

    grad_q, along_q = through_norm(grad_q * factor, q, inverse_q, COSINE, COMPUTE)
    store_head(grad_image_ptr, grad_q, q_tokens, q_inside, 3 * channels, first_channel, HEAD_SIZE, TILE_D)
    statistics = tl.program_id(0).to(tl.int64) * TOKENS + q_slots
    tl.store(normaliser_ptr + statistics, normaliser, mask=q_slots < TOKENS)
    tl.store(delta_ptr + statistics, delta, mask=q_slots < TOKENS)
    if logit_scale_partial_ptr is not None:
        partial = (window.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num_heads + head
        tl.store(logit_scale_partial_ptr + partial, tl.sum(along_q, axis=0))


@triton.jit(do_not_specialize=["num_queries"])
def _window_attention_blocked_bwd_keys_kernel(
    grad_out_ptr,  # (B, H, W, C) or (B, K, C)
    qkv_ptr,  # (B, H, W, 3C)
    table_ptr,  # (h, offsets)
    logit_scale_ptr,  # (h) or None
    pad_value_ptr,  # (3C) or None
    places_ptr,  # (B, H, W) or None
    grad_qkv_ptr,  # (B, H, W, 3C)
    normaliser_ptr,  # (windows, h, N)
    delta_ptr,  # (windows, h, N)
    pad_value_partial_ptr,  # (windows x key blocks, 2, C) or None
    num_queries,  # K
    num_heads,  # h
    height,  # H
    width,  # W
    windows_h,
    windows_w,
    shift_h,
    shift_w,
    SCALE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    SHIFTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """The gradients of one block of k and v of a window and head, over blocks of queries.

    Grid: (windows x h, key blocks).
    Reads k and v once, q, grad_out and the rows' statistics once for every key block.
    """
    COSINE: tl.constexpr = logit_scale_ptr is not None
    OPERAND: tl.constexpr = qkv_ptr.dtype.element_ty
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % num_heads
    window = tl.program_id(0) // num_heads
    channels = num_heads * HEAD_SIZE
    first_channel = head * HEAD_SIZE
    first = first_token(window, height, width, windows_h, windows_w)
    image_ptr = qkv_ptr + first * 3 * channels
    grad_image_ptr = grad_qkv_ptr + first * 3 * channels
    slots = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    column_ptr = table_ptr + head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    factor = logit_factor(logit_scale_ptr, head, SCALE, COMPUTE)
    tokens, inside = window_tokens(
        window, slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
    )
    k, v = load_keys_and_values(
        image_ptr, pad_value_ptr, tokens, inside, slots < TOKENS, num_heads, head, HEAD_SIZE, TILE_D, PADDED
    )  # (N, D) each
    sides = cut_sides(slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
    cuts = window_cuts(window, windows_h, windows_w)
    k, inverse_k = compared(k, COSINE, COMPUTE, OPERAND)
    grad_k = tl.zeros((TILE_N, TILE_D), COMPUTE)
    grad_v = tl.zeros((TILE_N, TILE_D), COMPUTE)

    for first_slot in range(0, TOKENS, TILE_M):
        q_slots = first_slot + tl.arange(0, TILE_M)
        q_tokens, q_inside = window_tokens(
            window, q_slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
        q = load_head(image_ptr, q_tokens, q_inside, 3 * channels, first_channel, HEAD_SIZE, TILE_D)  # (M, D)
        grad = _load_grad_out(
            grad_out_ptr, places_ptr, window, first, q_tokens, q_inside, num_queries, num_heads, head, HEAD_SIZE, TILE_D
        )  # (M, D)
        statistics = tl.program_id(0).to(tl.int64) * TOKENS + q_slots
        normaliser = tl.load(normaliser_ptr + statistics, mask=q_slots < TOKENS, other=float("inf"))
        delta = tl.load(delta_ptr + statistics, mask=q_slots < TOKENS, other=0.0)
        bias = load_bias(column_ptr, 1, q_slots, slots, WINDOW_H, WINDOW_W, COMPUTE)  # (M, N)
        q_sides = cut_sides(q_slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
        q = compared(q, COSINE, COMPUTE, OPERAND)[0]
        s = logits(q, k, bias, factor, OPERAND)
        if SHIFTED:
            s = keep_apart(s, q_sides, sides, cuts)
        p, grad_s = _weights_and_gradient(s, grad, v, normaliser, delta, OPERAND)
        grad_v += dot(tl.trans(as_operand(p, OPERAND)), grad, OPERAND)
        grad_k += dot(tl.trans(as_operand(grad_s, OPERAND)), q, OPERAND)

    grad_k, _ = through_norm(grad_k * factor, k, inverse_k, COSINE, COMPUTE)
    k_channel = channels + first_channel
    store_head(grad_image_ptr, grad_k, tokens, inside, 3 * channels, k_channel, HEAD_SIZE, TILE_D)
    store_head(grad_image_ptr, grad_v, tokens, inside, 3 * channels, k_channel + channels, HEAD_SIZE, TILE_D)
    if pad_value_partial_ptr is not None:
        padding = (slots < TOKENS) & (inside == 0)
        row = window.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        partial = pad_value_partial_ptr + row * 2 * channels + first_channel
        store_sum(partial, grad_k, padding, HEAD_SIZE, TILE_D)
        store_sum(partial + channels, grad_v, padding, HEAD_SIZE, TILE_D)


@triton.jit(do_not_specialize=["num_windows", "num_queries"])
def _window_attention_blocked_bwd_pairs_kernel(
    grad_out_ptr,  # (B, H, W, C) or (B, K, C)
    qkv_ptr,  # (B, H, W, 3C)
    table_ptr,  # (h, offsets)
    logit_scale_ptr,  # (h) or None
    pad_value_ptr,  # (3C) or None
    places_ptr,  # (B, H, W) or None
    normaliser_ptr,  # (windows, h, N)
    delta_ptr,  # (windows, h, N)
    table_partial_ptr,  # (chunks, h, N, N)
    num_windows,  # of the batch
    num_queries,  # K
    num_heads,  # h
    height,  # H
    width,  # W
    windows_h,
    windows_w,
    shift_h,
    shift_w,
    SCALE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    SHIFTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """The sums of the logits' gradients over a chunk of windows. Grid: (chunks x h, query blocks, key blocks).

    Reads a block of q, k, v, grad_out and statistics of each window; the sum of a block of pairs stays in registers.
    """
    COSINE: tl.constexpr = logit_scale_ptr is not None
    OPERAND: tl.constexpr = qkv_ptr.dtype.element_ty
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % num_heads
    chunk = tl.program_id(0) // num_heads
    channels = num_heads * HEAD_SIZE
    q_slots = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    slots = tl.program_id(2) * TILE_N + tl.arange(0, TILE_N)
    column_ptr = table_ptr + head * (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    factor = logit_factor(logit_scale_ptr, head, SCALE, COMPUTE)
    q_sides = cut_sides(q_slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
    sides = cut_sides(slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
    bias = load_bias(column_ptr, 1, q_slots, slots, WINDOW_H, WINDOW_W, COMPUTE)  # (M, N)
    table_sum = tl.zeros((TILE_M, TILE_N), COMPUTE)

    for step in range(tl.minimum(WINDOWS, num_windows - chunk * WINDOWS)):
        window = chunk * WINDOWS + step
        first = first_token(window, height, width, windows_h, windows_w)
        image_ptr = qkv_ptr + first * 3 * channels
        q_tokens, q_inside = window_tokens(
            window, q_slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
        q = load_head(image_ptr, q_tokens, q_inside, 3 * channels, head * HEAD_SIZE, HEAD_SIZE, TILE_D)  # (M, D)
        grad = _load_grad_out(
            grad_out_ptr, places_ptr, window, first, q_tokens, q_inside, num_queries, num_heads, head, HEAD_SIZE, TILE_D
        )  # (M, D)
        tokens, inside = window_tokens(
            window, slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
        k, v = load_keys_and_values(
            image_ptr, pad_value_ptr, tokens, inside, slots < TOKENS, num_heads, head, HEAD_SIZE, TILE_D, PADDED
        )  # (N, D) each
        statistics = (window.to(tl.int64) * num_heads + head) * TOKENS + q_slots
        normaliser = tl.load(normaliser_ptr + statistics, mask=q_slots < TOKENS, other=float("inf"))
        delta = tl.load(delta_ptr + statistics, mask=q_slots < TOKENS, other=0.0)
        q = compared(q, COSINE, COMPUTE, OPERAND)[0]
        k = compared(k, COSINE, COMPUTE, OPERAND)[0]
        s = logits(q, k, bias, factor, OPERAND)
        if SHIFTED:
            s = keep_apart(s, q_sides, sides, window_cuts(window, windows_h, windows_w))
        table_sum += _weights_and_gradient(s, grad, v, normaliser, delta, OPERAND)[1]

    pairs = q_slots[:, None] * TOKENS + slots[None, :]
    mask = (q_slots < TOKENS)[:, None] & (slots < TOKENS)[None, :]
    tl.store(table_partial_ptr + tl.program_id(0).to(tl.int64) * TOKENS * TOKENS + pairs, table_sum, mask=mask)
