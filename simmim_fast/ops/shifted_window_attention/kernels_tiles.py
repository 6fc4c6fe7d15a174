"""What the Triton kernels of shifted_window_attention share: where tokens lie, and tiles of one head.

A slot is a token's place in its window, row by row. Logits are kept in units of log 2, so that exp2 gives the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simmim_fast._triton import as_operand, dot, store_rounded
from simmim_fast.ops.shifted_window_attention import reference

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_LOGIT_SCALE = tl.constexpr(reference.MAX_LOGIT_SCALE)
MIN_NORM = tl.constexpr(reference.MIN_NORM)
BETWEEN_REGIONS = tl.constexpr(reference.BETWEEN_REGIONS)


@triton.jit
def window_tokens(
    window, slots, height, width, windows_h, windows_w, shift_h, shift_w, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr
):
    """Where the tokens of a window lie in their image.

    Returns, for each slot: the flat index y W + x, and whether that is in the grid, which padding tokens and slots
    behind the window are not.
    """
    y = (window // windows_w % windows_h * WINDOW_H + slots // WINDOW_W + shift_h) % (windows_h * WINDOW_H)
    x = (window % windows_w * WINDOW_W + slots % WINDOW_W + shift_w) % (windows_w * WINDOW_W)
    inside = (slots < WINDOW_H * WINDOW_W) & (y < height) & (x < width)
    return y * width + x, inside


@triton.jit
def first_token(window, height, width, windows_h, windows_w):
    """Flat index, int64, of the first token of the image that a window lies in."""
    return (window // (windows_h * windows_w)).to(tl.int64) * height * width


@triton.jit
def query_tokens(
    queries_ptr,
    image,
    places,
    num_queries,
    height,
    width,
    shift_h,
    shift_w,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
):
    """Where the tokens named by the queries lie, in a grid of one window.

    Returns, for each place in the list: flat index and whether it is in the grid, as `window_tokens`, and the slot.
    """
    token = tl.load(queries_ptr + image.to(tl.int64) * num_queries + places, mask=places < num_queries, other=-1)
    inside = (token >= 0) & (token < height * width)
    token = tl.where(inside, token, 0)
    row = (token // width + WINDOW_H - shift_h) % WINDOW_H
    column = (token % width + WINDOW_W - shift_w) % WINDOW_W
    return token, inside, row * WINDOW_W + column


@triton.jit
def cut_sides(slots, shift_h, shift_w, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """On which side of the roll's cuts a slot lies where they go through its window: bit 1 rows, bit 0 columns."""
    below = slots // WINDOW_W >= WINDOW_H - shift_h
    right = slots % WINDOW_W >= WINDOW_W - shift_w
    return 2 * below.to(tl.int32) + right.to(tl.int32)


@triton.jit
def window_cuts(window, windows_h, windows_w):
    """Which cuts go through a window: rows in the last row of windows, columns in the last column."""
    last_row = window // windows_w % windows_h == windows_h - 1
    last_column = window % windows_w == windows_w - 1
    return 2 * last_row.to(tl.int32) + last_column.to(tl.int32)


@triton.jit
def load_head(pointer, rows, in_bounds, row_size, first_channel, HEAD_SIZE: tl.constexpr, TILE_D: tl.constexpr):
    """One head of some rows: (rows, TILE_D), zero out of bounds."""
    channels = tl.arange(0, TILE_D)
    offsets = rows.to(tl.int64)[:, None] * row_size + (first_channel + channels)[None, :]
    mask = in_bounds[:, None] & (channels < HEAD_SIZE)[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def load_keys_and_values(
    qkv_ptr,
    pad_value_ptr,
    tokens,
    inside,
    in_window,
    num_heads,
    head,
    HEAD_SIZE: tl.constexpr,
    TILE_D: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One head of k and of v: (tokens, TILE_D) each, with the padding value in padding tokens."""
    channels = num_heads * HEAD_SIZE
    k_channel = channels + head * HEAD_SIZE
    k = load_head(qkv_ptr, tokens, inside, 3 * channels, k_channel, HEAD_SIZE, TILE_D)
    v = load_head(qkv_ptr, tokens, inside, 3 * channels, k_channel + channels, HEAD_SIZE, TILE_D)
    if PADDED and pad_value_ptr is not None:
        padding = (in_window & (inside == 0))[:, None]
        head_channels = tl.arange(0, TILE_D)
        in_head = head_channels < HEAD_SIZE
        k_pad = tl.load(pad_value_ptr + k_channel + head_channels, mask=in_head, other=0.0)
        v_pad = tl.load(pad_value_ptr + k_channel + channels + head_channels, mask=in_head, other=0.0)
        k = tl.where(padding, k_pad[None, :], k)
        v = tl.where(padding, v_pad[None, :], v)
    return k, v


@triton.jit
def store_head(
    pointer, values, rows, in_bounds, row_size, first_channel, HEAD_SIZE: tl.constexpr, TILE_D: tl.constexpr
):
    """Store one head of some rows, rounded to the pointer's type."""
    channels = tl.arange(0, TILE_D)
    offsets = rows.to(tl.int64)[:, None] * row_size + (first_channel + channels)[None, :]
    store_rounded(pointer + offsets, values, in_bounds[:, None] & (channels < HEAD_SIZE)[None, :])


@triton.jit
def store_sum(pointer, values, rows, HEAD_SIZE: tl.constexpr, TILE_D: tl.constexpr):
    """Store the sum of some rows of one head."""
    channels = tl.arange(0, TILE_D)
    tl.store(pointer + channels, tl.sum(tl.where(rows[:, None], values, 0.0), axis=0), mask=channels < HEAD_SIZE)


@triton.jit
def load_bias(
    column_ptr, stride, query_slots, key_slots, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, COMPUTE: tl.constexpr
):
    """Position bias of each pair of slots, in units of log 2: (queries, keys), minus infinity behind the window.

    A head's column of the table starts at `column_ptr`; `stride` lies between its elements.
    """
    ROW: tl.constexpr = 2 * WINDOW_W - 1
    tokens = WINDOW_H * WINDOW_W
    query_offsets = query_slots // WINDOW_W * ROW + query_slots % WINDOW_W + (WINDOW_H - 1) * ROW + WINDOW_W - 1
    key_offsets = key_slots // WINDOW_W * ROW + key_slots % WINDOW_W
    offsets = (query_offsets[:, None] - key_offsets[None, :]) * stride
    in_window = (query_slots < tokens)[:, None] & (key_slots < tokens)[None, :]
    bias = tl.load(column_ptr + offsets, mask=in_window, other=0.0).to(COMPUTE) * LOG2_E
    return tl.where((key_slots < tokens)[None, :], bias, float("-inf"))


@triton.jit
def logit_factor(logit_scale_ptr, head, SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """What a product q k', or with a logit scale a cosine, is multiplied by."""
    if logit_scale_ptr is None:
        factor = tl.full((), SCALE, COMPUTE)
    else:
        factor = tl.exp(tl.minimum(tl.load(logit_scale_ptr + head).to(COMPUTE), tl.full((), MAX_LOGIT_SCALE, COMPUTE)))
    return factor


@triton.jit
def compared(x, COSINE: tl.constexpr, COMPUTE: tl.constexpr, OPERAND: tl.constexpr):
    """The vectors that the logits compare, x or with the cosine x / max(|x|, 1e-12), and 1 / |x|, 0 below 1e-12."""
    inverse = tl.full((x.shape[0],), 1.0, COMPUTE)
    if COSINE:
        wide = x.to(COMPUTE)
        norm = tl.sqrt(tl.sum(wide * wide, axis=1))
        least = tl.full((), MIN_NORM, COMPUTE)
        inverse = 1.0 / tl.maximum(norm, least)
        x = as_operand(wide * inverse[:, None], OPERAND)
        inverse = tl.where(norm < least, 0.0, inverse)
    return x, inverse


@triton.jit
def logits(q, k, bias, factor, OPERAND: tl.constexpr):
    """Logits (queries, keys) in units of log 2, of vectors that `compared` has given."""
    return dot(q, tl.trans(k), OPERAND) * (factor * LOG2_E) + bias


@triton.jit
def keep_apart(logits, query_sides, key_sides, cuts):
    """The shift mask: -100 between regions, in units of log 2."""
    apart = (query_sides & cuts)[:, None] != (key_sides & cuts)[None, :]
    return tl.where(apart, logits + BETWEEN_REGIONS * LOG2_E, logits)


@triton.jit
def through_norm(grad, compared, inverse, COSINE: tl.constexpr, COMPUTE: tl.constexpr):
    """The gradient of x from that of its compared vector, and for each row the product of the two, which with the
    cosine sums up to the gradient of the logit scale."""
    compared = compared.to(COMPUTE)
    along = tl.sum(grad * compared, axis=1)
    if COSINE:
        grad = (grad - compared * along[:, None]) * inverse[:, None]
        grad = tl.where((inverse > 0)[:, None], grad, 0.0)
    return grad, along
