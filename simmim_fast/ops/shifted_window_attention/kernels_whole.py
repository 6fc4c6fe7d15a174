"""Triton kernels of shifted_window_attention for windows of at most 64 tokens: a window and head is one tile."""

from __future__ import annotations

import triton
import triton.language as tl

from simmim_fast._triton import as_operand, dot
from simmim_fast.ops.shifted_window_attention.kernels_tiles import (
    compared,
    cut_sides,
    first_token,
    keep_apart,
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


@triton.jit(do_not_specialize=["num_windows", "program_windows", "num_queries"])
def _window_attention_fwd_kernel(
    qkv_ptr,  # (B, H, W, 3C)
    bias_ptr,  # (h, TILE_N, TILE_N), in units of log 2, minus infinity behind the window
    logit_scale_ptr,  # (h) or None
    pad_value_ptr,  # (3C) or None
    queries_ptr,  # (B, K) or None
    out_ptr,  # (B, H, W, C) or (B, K, C)
    num_windows,  # of the batch
    program_windows,
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
    """One head of some windows, one after the other. Grid: (window groups x h).

    Reads q, k and v, writes out, each once; rounds at the store.
    """
    COSINE: tl.constexpr = logit_scale_ptr is not None
    OPERAND: tl.constexpr = qkv_ptr.dtype.element_ty
    head = tl.program_id(0) % num_heads
    first_window = tl.program_id(0) // num_heads * program_windows
    channels = num_heads * HEAD_SIZE
    first_channel = head * HEAD_SIZE
    slots = tl.arange(0, TILE_N)
    places = tl.arange(0, TILE_M)
    in_window = slots < WINDOW_H * WINDOW_W
    factor = logit_factor(logit_scale_ptr, head, SCALE, COMPUTE)
    sides = cut_sides(slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
    if queries_ptr is None:
        q_sides = cut_sides(places, shift_h, shift_w, WINDOW_H, WINDOW_W)
        bias = tl.load(bias_ptr + (head * TILE_N + places[:, None]) * TILE_N + slots[None, :])  # (M, N)

    for step in range(tl.minimum(program_windows, num_windows - first_window)):
        window = first_window + step
        first = first_token(window, height, width, windows_h, windows_w)
        image_ptr = qkv_ptr + first * 3 * channels
        tokens, inside = window_tokens(
            window, slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
        if queries_ptr is None:
            q_tokens, q_inside = window_tokens(
                window, places, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
            )
        else:
            q_tokens, q_inside, q_slots = query_tokens(
                queries_ptr, window, places, num_queries, height, width, shift_h, shift_w, WINDOW_H, WINDOW_W
            )
            q_sides = cut_sides(q_slots, shift_h, shift_w, WINDOW_H, WINDOW_W)
            bias = tl.load(bias_ptr + (head * TILE_N + q_slots[:, None]) * TILE_N + slots[None, :])
        q = load_head(image_ptr, q_tokens, q_inside, 3 * channels, first_channel, HEAD_SIZE, TILE_D)  # (M, D)
        k, v = load_keys_and_values(
            image_ptr, pad_value_ptr, tokens, inside, in_window, num_heads, head, HEAD_SIZE, TILE_D, PADDED
        )  # (N, D) each
        q = compared(q, COSINE, COMPUTE, OPERAND)[0]
        k = compared(k, COSINE, COMPUTE, OPERAND)[0]
        s = logits(q, k, bias, factor, OPERAND)
        if SHIFTED:
            s = keep_apart(s, q_sides, sides, window_cuts(window, windows_h, windows_w))
        p = tl.exp2(s - tl.max(s, axis=1)[:, None])  # (M, N)
        out = dot(p, v, OPERAND) / tl.sum(p, axis=1)[:, None]
        if queries_ptr is None:
            store_head(out_ptr + first * channels, out, q_tokens, q_inside, channels, first_channel, HEAD_SIZE, TILE_D)
        else:
            out = tl.where(q_inside[:, None], out, float("nan"))
            rows_ptr = out_ptr + window.to(tl.int64) * num_queries * channels
            store_head(rows_ptr, out, places, places < num_queries, channels, first_channel, HEAD_SIZE, TILE_D)


@triton.jit(do_not_specialize=["num_windows", "num_queries"])
def _window_attention_bwd_kernel(
    grad_out_ptr,  # (B, H, W, C) or (B, K, C)
    qkv_ptr,  # (B, H, W, 3C)
    bias_ptr,  # (cuts, h, TILE_N, TILE_N), the same, with the shift mask for no cut, columns, rows and both
    logit_scale_ptr,  # (h) or None
    pad_value_ptr,  # (3C) or None
    places_ptr,  # (B, H, W): a token's place among the queries, -1 where it is none; or None
    grad_qkv_ptr,  # (B, H, W, 3C)
    table_partial_ptr,  # (chunks, h, N, N) or None
    logit_scale_partial_ptr,  # (windows, h) or None
    pad_value_partial_ptr,  # (windows, 2, C) or None
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
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One head of a chunk of windows, one after the other. Grid: (chunks x h).

    Reads grad_out, q, k and v, writes grad_qkv, each once, and the chunk's sums; computes the weights again. The bias
    comes from the cache for every window: in registers it would leave no room for the sum of its gradient. In the
    cosine form nothing is hoisted out of the loop: it would be spilled.
    """
    COSINE: tl.constexpr = logit_scale_ptr is not None
    OPERAND: tl.constexpr = qkv_ptr.dtype.element_ty
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    head = tl.program_id(0) % num_heads
    chunk = tl.program_id(0) // num_heads
    channels = num_heads * HEAD_SIZE
    first_channel = head * HEAD_SIZE
    slots = tl.arange(0, TILE_N)
    in_window = slots < TOKENS
    factor = logit_factor(logit_scale_ptr, head, SCALE, COMPUTE)
    pairs = slots[:, None] * TILE_N + slots[None, :]  # (N, N)
    table_sum = tl.zeros((TILE_N, TILE_N), COMPUTE)

    for step in tl.range(0, tl.minimum(WINDOWS, num_windows - chunk * WINDOWS), disable_licm=COSINE):
        window = chunk * WINDOWS + step
        first = first_token(window, height, width, windows_h, windows_w)
        image_ptr = qkv_ptr + first * 3 * channels
        grad_image_ptr = grad_qkv_ptr + first * 3 * channels
        tokens, inside = window_tokens(
            window, slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H, WINDOW_W
        )
        q = load_head(image_ptr, tokens, inside, 3 * channels, first_channel, HEAD_SIZE, TILE_D)  # (N, D)
        k, v = load_keys_and_values(
            image_ptr, pad_value_ptr, tokens, inside, in_window, num_heads, head, HEAD_SIZE, TILE_D, PADDED
        )  # (N, D) each
        rows, in_rows, rows_ptr = tokens, inside, grad_out_ptr + first * channels
        if places_ptr is not None:
            places = tl.load(places_ptr + first + tokens, mask=inside, other=-1)
            rows, in_rows = places, places >= 0
            rows_ptr = grad_out_ptr + window.to(tl.int64) * num_queries * channels
        grad = load_head(rows_ptr, rows, in_rows, channels, first_channel, HEAD_SIZE, TILE_D)  # (N, D)

        q, inverse_q = compared(q, COSINE, COMPUTE, OPERAND)
        k, inverse_k = compared(k, COSINE, COMPUTE, OPERAND)
        cuts = window_cuts(window, windows_h, windows_w) if SHIFTED else 0
        bias = tl.load(bias_ptr + (cuts * num_heads + head) * TILE_N * TILE_N + pairs)
        s = logits(q, k, bias, factor, OPERAND)
        grad_p = dot(grad, tl.trans(v), OPERAND)  # after grad_v, v would wait at a barrier for shared memory
        p = tl.exp2(s - tl.max(s, axis=1)[:, None])
        p /= tl.sum(p, axis=1)[:, None]  # (N, N)
        grad_v = dot(tl.trans(as_operand(p, OPERAND)), grad, OPERAND)
        store_head(
            grad_image_ptr, grad_v, tokens, inside, 3 * channels, 2 * channels + first_channel, HEAD_SIZE, TILE_D
        )
        if pad_value_partial_ptr is not None:
            padding = in_window & (inside == 0)
            partial = pad_value_partial_ptr + window.to(tl.int64) * 2 * channels + first_channel
            store_sum(partial + channels, grad_v, padding, HEAD_SIZE, TILE_D)
        grad_s = p * (grad_p - tl.sum(p * grad_p, axis=1)[:, None])
        if table_partial_ptr is not None:
            table_sum += grad_s
        grad_s = as_operand(grad_s, OPERAND)
        grad_q, along_q = through_norm(dot(grad_s, k, OPERAND) * factor, q, inverse_q, COSINE, COMPUTE)
        store_head(grad_image_ptr, grad_q, tokens, inside, 3 * channels, first_channel, HEAD_SIZE, TILE_D)
        if logit_scale_partial_ptr is not None:
            tl.store(logit_scale_partial_ptr + window.to(tl.int64) * num_heads + head, tl.sum(along_q, axis=0))
        grad_k, _ = through_norm(dot(tl.trans(grad_s), q, OPERAND) * factor, k, inverse_k, COSINE, COMPUTE)
        store_head(grad_image_ptr, grad_k, tokens, inside, 3 * channels, channels + first_channel, HEAD_SIZE, TILE_D)
        if pad_value_partial_ptr is not None:
            store_sum(partial, grad_k, padding, HEAD_SIZE, TILE_D)

    program = tl.program_id(0).to(tl.int64)
    if table_partial_ptr is not None:
        pairs = slots[:, None] * TOKENS + slots[None, :]
        mask = in_window[:, None] & in_window[None, :]
        tl.store(table_partial_ptr + program * TOKENS * TOKENS + pairs, table_sum, mask=mask)
