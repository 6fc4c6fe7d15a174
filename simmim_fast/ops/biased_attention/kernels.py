"""Triton kernels of biased_attention and their launchers.

A program handles a tile of rows (queries) or of keys of one head of one image, and loops over tiles of the other; that
of the bias's gradient handles a tile of rows by keys of one head and loops over images. Logits and their gradients live
in registers. N need not be a multiple of anything. Offsets are int64: a tensor may have more than 2^31 elements.

Letters as in op.py. Where the rows are queries, a row's token is looked up; a token that does not exist gives a row of
NaN and no gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_fast._triton import compute_type, dot, on_device_of, store_rounded
from simmim_fast.ops.biased_attention.op import CHUNK_IMAGES, compute_dtype, tile, workspace_shapes

OPERAND_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
MIN_DOT_SIZE = 16
NUM_STAGES = 2


@triton.jit
def _row_tokens(queries_ptr, image, rows, num_rows, num_tokens):
    """The token of each row (int64), and whether there are both row and token."""
    tokens, valid = rows.to(tl.int64), rows < num_rows
    if queries_ptr is not None:
        tokens = tl.load(queries_ptr + image * num_rows + rows, mask=valid, other=-1).to(tl.int64)
        valid = (tokens >= 0) & (tokens < num_tokens)
    return tokens, valid


@triton.jit
def _load_rows(pointer, rows, stride, valid, channels, HEAD_SIZE: tl.constexpr):
    """Rows of D channels, (rows, D), 0 where not valid."""
    offsets = rows[:, None] * stride + channels[None, :]
    return tl.load(pointer + offsets, mask=valid[:, None] & (channels < HEAD_SIZE)[None, :], other=0.0)


@triton.jit
def _load_bias(bias_ptr, head, tokens, valid, keys, num_tokens, COMPUTE: tl.constexpr):
    """The bias of tokens (R, 1) and keys (1, K), or the other way round; -inf beyond the last key."""
    bias = tl.where(keys < num_tokens, 0.0, float("-inf")).to(COMPUTE)
    if bias_ptr is not None:
        offsets = (head * num_tokens + tokens) * num_tokens + keys
        bias += tl.load(bias_ptr + offsets, mask=valid & (keys < num_tokens), other=0.0).to(COMPUTE)
    return bias


@triton.jit
def _biased_attention_fwd_kernel(
    qkv_ptr,  # (B, N, 3C)
    bias_ptr,  # (h, N, N) or None
    queries_ptr,  # (B, K) or None
    out_ptr,  # (B, R, C)
    lse_ptr,  # (B, h, R)
    num_tokens,  # N
    num_rows,  # R
    num_heads,  # h
    num_channels,  # C
    SCALE: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One tile of rows of one head. Grid: B x h x row tiles. The softmax is corrected as larger logits turn up."""
    row_tiles = tl.cdiv(num_rows, TILE_R)
    head = ((tl.program_id(0) // row_tiles) % num_heads).to(tl.int64)
    image = (tl.program_id(0) // (row_tiles * num_heads)).to(tl.int64)
    rows = (tl.program_id(0) % row_tiles) * TILE_R + tl.arange(0, TILE_R)
    channels = tl.arange(0, TILE_D)
    tokens, valid = _row_tokens(queries_ptr, image, rows, num_rows, num_tokens)
    q_ptr = qkv_ptr + image * num_tokens * 3 * num_channels + head * HEAD_SIZE
    q = _load_rows(q_ptr, tokens, 3 * num_channels, valid, channels, HEAD_SIZE)
    scale = tl.full((), SCALE, COMPUTE)

    maximum = tl.full((TILE_R,), float("-inf"), COMPUTE)
    total = tl.zeros((TILE_R,), COMPUTE)
    out = tl.zeros((TILE_R, TILE_D), COMPUTE)
    for first_key in range(0, num_tokens, TILE_K):
        keys = (first_key + tl.arange(0, TILE_K)).to(tl.int64)
        k = _load_rows(q_ptr + num_channels, keys, 3 * num_channels, keys < num_tokens, channels, HEAD_SIZE)
        v = _load_rows(q_ptr + 2 * num_channels, keys, 3 * num_channels, keys < num_tokens, channels, HEAD_SIZE)
        bias = _load_bias(bias_ptr, head, tokens[:, None], valid[:, None], keys[None, :], num_tokens, COMPUTE)
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
    out_rows = (image * num_rows + rows)[:, None] * num_channels + head * HEAD_SIZE + channels[None, :]
    store_rounded(out_ptr + out_rows, out, in_bounds[:, None] & (channels < HEAD_SIZE)[None, :])
    tl.store(lse_ptr + (image * num_heads + head) * num_rows + rows, maximum + tl.log(total), mask=in_bounds)


@triton.jit
def _biased_attention_bwd_q_kernel(
    grad_out_ptr,  # (B, R, C)
    qkv_ptr,  # (B, N, 3C)
    bias_ptr,  # (h, N, N) or None
    queries_ptr,  # (B, K) or None
    out_ptr,  # (B, R, C)
    lse_ptr,  # (B, h, R)
    delta_ptr,  # (B, h, R)
    grad_qkv_ptr,  # (B, N, 3C)
    num_tokens,  # N
    num_rows,  # R
    num_heads,  # h
    num_channels,  # C
    SCALE: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """The gradient of q, and delta, for one tile of rows of one head. Grid: B x h x row tiles."""
    row_tiles = tl.cdiv(num_rows, TILE_R)
    head = ((tl.program_id(0) // row_tiles) % num_heads).to(tl.int64)
    image = (tl.program_id(0) // (row_tiles * num_heads)).to(tl.int64)
    rows = (tl.program_id(0) % row_tiles) * TILE_R + tl.arange(0, TILE_R)
    channels = tl.arange(0, TILE_D)
    tokens, valid = _row_tokens(queries_ptr, image, rows, num_rows, num_tokens)
    q_ptr = qkv_ptr + image * num_tokens * 3 * num_channels + head * HEAD_SIZE
    q = _load_rows(q_ptr, tokens, 3 * num_channels, valid, channels, HEAD_SIZE)
    out_rows = image * num_rows + rows
    grad_out = _load_rows(grad_out_ptr + head * HEAD_SIZE, out_rows, num_channels, valid, channels, HEAD_SIZE)
    out = _load_rows(out_ptr + head * HEAD_SIZE, out_rows, num_channels, valid, channels, HEAD_SIZE)
    delta = tl.sum(out.to(COMPUTE) * grad_out.to(COMPUTE), axis=1)  # (R)
    statistics = (image * num_heads + head) * num_rows + rows
    tl.store(delta_ptr + statistics, delta, mask=rows < num_rows)
    lse = tl.load(lse_ptr + statistics, mask=valid, other=float("inf"))  # which makes weights of 0
    scale = tl.full((), SCALE, COMPUTE)

    grad_q = tl.zeros((TILE_R, TILE_D), COMPUTE)
    for first_key in range(0, num_tokens, TILE_K):
        keys = (first_key + tl.arange(0, TILE_K)).to(tl.int64)
        k = _load_rows(q_ptr + num_channels, keys, 3 * num_channels, keys < num_tokens, channels, HEAD_SIZE)
        v = _load_rows(q_ptr + 2 * num_channels, keys, 3 * num_channels, keys < num_tokens, channels, HEAD_SIZE)
        bias = _load_bias(bias_ptr, head, tokens[:, None], valid[:, None], keys[None, :], num_tokens, COMPUTE)
        weights = tl.exp(dot(q, tl.trans(k), OPERAND) * scale + bias - lse[:, None])  # (R, K)
        grad_logits = weights * (dot(grad_out, tl.trans(v), OPERAND) - delta[:, None])
        grad_q += dot(grad_logits, k, OPERAND)

    token_rows = (image * num_tokens + tokens)[:, None] * 3 * num_channels + head * HEAD_SIZE + channels[None, :]
    store_rounded(grad_qkv_ptr + token_rows, grad_q * scale, valid[:, None] & (channels < HEAD_SIZE)[None, :])


@triton.jit
def _biased_attention_bwd_kv_kernel(
    grad_out_ptr,  # (B, R, C)
    qkv_ptr,  # (B, N, 3C)
    bias_ptr,  # (h, N, N) or None
    queries_ptr,  # (B, K) or None
    lse_ptr,  # (B, h, R)
    delta_ptr,  # (B, h, R)
    grad_qkv_ptr,  # (B, N, 3C)
    num_tokens,  # N
    num_rows,  # R
    num_heads,  # h
    num_channels,  # C
    SCALE: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """The gradients of k and v for one tile of keys of one head. Grid: B x h x key tiles. Logits are transposed."""
    key_tiles = tl.cdiv(num_tokens, TILE_K)
    head = ((tl.program_id(0) // key_tiles) % num_heads).to(tl.int64)
    image = (tl.program_id(0) // (key_tiles * num_heads)).to(tl.int64)
    keys = ((tl.program_id(0) % key_tiles) * TILE_K + tl.arange(0, TILE_K)).to(tl.int64)
    channels = tl.arange(0, TILE_D)
    q_ptr = qkv_ptr + image * num_tokens * 3 * num_channels + head * HEAD_SIZE
    k = _load_rows(q_ptr + num_channels, keys, 3 * num_channels, keys < num_tokens, channels, HEAD_SIZE)
    v = _load_rows(q_ptr + 2 * num_channels, keys, 3 * num_channels, keys < num_tokens, channels, HEAD_SIZE)
    scale = tl.full((), SCALE, COMPUTE)

    grad_k = tl.zeros((TILE_K, TILE_D), COMPUTE)
    grad_v = tl.zeros((TILE_K, TILE_D), COMPUTE)
    for first_row in range(0, num_rows, TILE_R):
        rows = first_row + tl.arange(0, TILE_R)
        tokens, valid = _row_tokens(queries_ptr, image, rows, num_rows, num_tokens)
        q = _load_rows(q_ptr, tokens, 3 * num_channels, valid, channels, HEAD_SIZE)
        out_rows = image * num_rows + rows
        grad_out = _load_rows(grad_out_ptr + head * HEAD_SIZE, out_rows, num_channels, valid, channels, HEAD_SIZE)
        statistics = (image * num_heads + head) * num_rows + rows
        lse = tl.load(lse_ptr + statistics, mask=valid, other=float("inf"))  # which makes weights of 0
        delta = tl.load(delta_ptr + statistics, mask=valid, other=0.0)
        bias = _load_bias(bias_ptr, head, tokens[None, :], valid[None, :], keys[:, None], num_tokens, COMPUTE)
        weights = tl.exp(dot(k, tl.trans(q), OPERAND) * scale + bias - lse[None, :])  # (K, R)
        grad_v += dot(weights, grad_out, OPERAND)
        grad_logits = weights * (dot(v, tl.trans(grad_out), OPERAND) - delta[None, :])
        grad_k += dot(grad_logits, q, OPERAND)

    grad_rows = (image * num_tokens + keys)[:, None] * 3 * num_channels + head * HEAD_SIZE + channels[None, :]
    in_bounds = (keys < num_tokens)[:, None] & (channels < HEAD_SIZE)[None, :]
    store_rounded(grad_qkv_ptr + grad_rows + num_channels, grad_k * scale, in_bounds)
    store_rounded(grad_qkv_ptr + grad_rows + 2 * num_channels, grad_v, in_bounds)


@triton.jit(do_not_specialize=["num_images"])
def _biased_attention_bwd_bias_kernel(
    grad_out_ptr,  # (B, R, C)
    qkv_ptr,  # (B, N, 3C)
    bias_ptr,  # (h, N, N)
    positions_ptr,  # (B, N + 1), the row of each token or -1; None where rows are tokens
    lse_ptr,  # (B, h, R)
    delta_ptr,  # (B, h, R)
    partial_ptr,  # (chunks, h, N, N)
    num_images,  # B
    num_tokens,  # N
    num_rows,  # R
    num_heads,  # h
    num_channels,  # C
    IMAGES: tl.constexpr,
    SCALE: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One tile of tokens by keys of one head through a chunk of images. Grid: (chunks x h x token tiles, key tiles)."""
    token_tiles = tl.cdiv(num_tokens, TILE_R)
    head = ((tl.program_id(0) // token_tiles) % num_heads).to(tl.int64)
    chunk = (tl.program_id(0) // (token_tiles * num_heads)).to(tl.int64)
    tokens = ((tl.program_id(0) % token_tiles) * TILE_R + tl.arange(0, TILE_R)).to(tl.int64)
    keys = (tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)).to(tl.int64)
    channels = tl.arange(0, TILE_D)
    in_tokens = tokens < num_tokens
    bias = _load_bias(bias_ptr, head, tokens[:, None], in_tokens[:, None], keys[None, :], num_tokens, COMPUTE)
    scale = tl.full((), SCALE, COMPUTE)

    grad_bias = tl.zeros((TILE_R, TILE_K), COMPUTE)
    first_image = chunk * IMAGES
    for image in range(first_image, tl.minimum(first_image + IMAGES, num_images)):
        rows = tokens
        if positions_ptr is not None:
            rows = tl.load(positions_ptr + image * (num_tokens + 1) + tokens, mask=in_tokens, other=-1).to(tl.int64)
        valid = in_tokens & (rows >= 0)
        q_ptr = qkv_ptr + image * num_tokens * 3 * num_channels + head * HEAD_SIZE
        q = _load_rows(q_ptr, tokens, 3 * num_channels, valid, channels, HEAD_SIZE)
        k = _load_rows(q_ptr + num_channels, keys, 3 * num_channels, keys < num_tokens, channels, HEAD_SIZE)
        v = _load_rows(q_ptr + 2 * num_channels, keys, 3 * num_channels, keys < num_tokens, channels, HEAD_SIZE)
        out_rows = image * num_rows + rows
        grad_out = _load_rows(grad_out_ptr + head * HEAD_SIZE, out_rows, num_channels, valid, channels, HEAD_SIZE)
        statistics = (image * num_heads + head) * num_rows + rows
        lse = tl.load(lse_ptr + statistics, mask=valid, other=float("inf"))  # which makes weights of 0
        delta = tl.load(delta_ptr + statistics, mask=valid, other=0.0)
        weights = tl.exp(dot(q, tl.trans(k), OPERAND) * scale + bias - lse[:, None])  # (R, K)
        grad_bias += weights * (dot(grad_out, tl.trans(v), OPERAND) - delta[:, None])

    offsets = ((chunk * num_heads + head) * num_tokens + tokens[:, None]) * num_tokens + keys[None, :]
    tl.store(partial_ptr + offsets, grad_bias, mask=in_tokens[:, None] & (keys < num_tokens)[None, :])


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
    tiles = tile(qkv.dtype)
    row_tiles = triton.cdiv(rows, tiles.own)
    with on_device_of(qkv):
        _biased_attention_fwd_kernel[(images * num_heads * row_tiles,)](
            qkv.contiguous(),
            _contiguous(bias),
            _contiguous(queries),
            out,
            lse,
            tokens,
            rows,
            num_heads,
            channels // 3,
            TILE_R=tiles.own,
            TILE_K=tiles.step,
            **_constants(qkv, num_heads, scale),
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
    images, tokens, channels = qkv.shape
    rows = grad_out.shape[1]
    shapes = workspace_shapes(qkv, bias, queries, num_heads, needs_bias)
    grad_qkv = qkv.new_empty(qkv.shape)
    if queries is not None:
        grad_qkv[..., : channels // 3].zero_()
    delta = torch.empty_like(lse)
    grad_out, qkv, bias, queries = grad_out.contiguous(), qkv.contiguous(), _contiguous(bias), _contiguous(queries)
    sizes = (tokens, rows, num_heads, channels // 3)
    constants = _constants(qkv, num_heads, scale)
    (own, step), heads = tile(qkv.dtype), images * num_heads
    by_rows, by_keys = {"TILE_R": own, "TILE_K": step}, {"TILE_R": step, "TILE_K": own}
    with on_device_of(qkv):
        if delta.numel() > 0:
            _biased_attention_bwd_q_kernel[(heads * triton.cdiv(rows, own),)](
                grad_out, qkv, bias, queries, out, lse, delta, grad_qkv, *sizes, **by_rows, **constants
            )
        if qkv.numel() > 0:
            _biased_attention_bwd_kv_kernel[(heads * triton.cdiv(tokens, own),)](
                grad_out, qkv, bias, queries, lse, delta, grad_qkv, *sizes, **by_keys, **constants
            )
        if "bias" not in shapes:
            return grad_qkv, grad_out.new_empty(0)
        partial = qkv.new_empty(shapes["bias"], dtype=delta.dtype)
        positions = None if queries is None else _positions(queries, shapes["positions"])
        if partial.numel() > 0:
            grid = (partial.shape[0] * num_heads * triton.cdiv(tokens, own), triton.cdiv(tokens, step))
            constants |= {"IMAGES": CHUNK_IMAGES, **by_rows}
            _biased_attention_bwd_bias_kernel[grid](
                grad_out, qkv, bias, positions, lse, delta, partial, images, *sizes, **constants
            )
    return grad_qkv, partial.sum(0).to(bias.dtype)


def _positions(queries: Tensor, shape: tuple[int, int]) -> Tensor:
    """The row of each token, or -1; queries that do not exist leave their rows in a column of their own, the last."""
    tokens = shape[1] - 1
    exists = (queries >= 0) & (queries < tokens)
    rows = torch.arange(queries.shape[1], dtype=torch.int32, device=queries.device).expand(queries.shape)
    positions = queries.new_empty(shape).fill_(-1)
    return positions.scatter_(1, torch.where(exists, queries, tokens).long(), rows)


def _constants(qkv: Tensor, num_heads: int, scale: float) -> dict[str, object]:
    """Arguments that all kernels share. With 4 warps float32 and the narrowest and widest heads spill registers."""
    head_size = qkv.shape[2] // (3 * num_heads)
    tile_channels = max(MIN_DOT_SIZE, triton.next_power_of_2(head_size))
    return {
        "SCALE": scale,
        "OPERAND": OPERAND_TYPES[qkv.dtype],
        "COMPUTE": compute_type(qkv.dtype),
        "HEAD_SIZE": head_size,
        "TILE_D": tile_channels,
        "num_warps": 4 if qkv.dtype.itemsize == 2 and 32 <= tile_channels <= 64 else 8,
        "num_stages": NUM_STAGES,
    }


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
