"""Launchers of the Triton kernels of shifted_window_attention, and the sum of the table's gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from simmim_fast._triton import compute_type, contiguous, on_device_of, store_rounded
from simmim_fast.ops._devices import capability_of
from simmim_fast.ops.shifted_window_attention.kernels_blocked import (
    _window_attention_blocked_bwd_keys_kernel,
    _window_attention_blocked_bwd_pairs_kernel,
    _window_attention_blocked_bwd_queries_kernel,
    _window_attention_blocked_fwd_kernel,
)
from simmim_fast.ops.shifted_window_attention.kernels_tiles import cut_sides, keep_apart, load_bias
from simmim_fast.ops.shifted_window_attention.kernels_whole import (
    _window_attention_bwd_kernel,
    _window_attention_fwd_kernel,
)
from simmim_fast.ops.shifted_window_attention.op import (
    Sizes,
    bias_shape,
    chunk_windows,
    compute_dtype,
    cuts,
    key_blocks,
    partial_shapes,
    program_windows,
    query_blocks,
    sizes,
    statistics_shape,
    tile,
    triton_refusal,
)
from simmim_fast.ops.shifted_window_attention.reference import MAX_LOGIT_SCALE

BLOCK = 16  # offsets, or queries, of one program of the kernels that turn the table into biases and back


class Options(NamedTuple):
    """How a kernel is compiled."""

    num_warps: int
    num_stages: int


class Configuration(NamedTuple):
    """Options of each kernel.

    Attributes:
        plain_forward: Those of the forward where there is neither padding nor the cosine form, if they are others.
    """

    forward: Options
    backward: Options
    blocked_forward: Options
    blocked_backward_queries: Options
    blocked_backward_keys: Options
    blocked_backward_pairs: Options
    plain_forward: Options | None = None


HALF = Configuration(
    forward=Options(4, 2),
    backward=Options(4, 1),
    blocked_forward=Options(4, 2),
    blocked_backward_queries=Options(4, 2),
    blocked_backward_keys=Options(4, 1),
    blocked_backward_pairs=Options(4, 1),
)
HALF_DEEP = HALF._replace(backward=Options(4, 2))
HALF_WIDEST = HALF._replace(blocked_forward=Options(4, 1), blocked_backward_queries=Options(4, 1))
HALF_WIDE = HALF_WIDEST._replace(blocked_backward_keys=Options(8, 1))
SINGLE = Configuration(
    forward=Options(8, 1),
    backward=Options(16, 1),
    blocked_forward=Options(8, 1),
    blocked_backward_queries=Options(8, 1),
    blocked_backward_keys=Options(4, 1),
    blocked_backward_pairs=Options(8, 1),
)
SINGLE_NARROW = SINGLE._replace(blocked_backward_queries=Options(4, 1))
SINGLE_DEEP = SINGLE._replace(forward=Options(8, 2), plain_forward=Options(8, 1))
SINGLE_WIDE = SINGLE._replace(blocked_backward_keys=Options(8, 1))
_WIDE = {(2, 64): HALF_WIDE, (2, 128): HALF_WIDEST, (4, 64): SINGLE_WIDE, (4, 128): SINGLE_WIDE}
# A table for each compute capability, by bytes of an element (float64 as float32) and channels of a padded head. Chosen
# by registers and occupancy, not yet by measurement on a GPU.
CONFIGURATIONS = {
    80: _WIDE
    | {
        (2, 16): HALF,
        (2, 32): HALF,
        (4, 16): SINGLE_NARROW,
        (4, 32): SINGLE_DEEP,
    },
    90: _WIDE
    | {
        (2, 16): HALF_DEEP,
        (2, 32): HALF_DEEP,
        (4, 16): SINGLE_NARROW,
        (4, 32): SINGLE,
    },
    100: _WIDE
    | {
        (2, 16): HALF_DEEP,
        (2, 32): HALF_DEEP,
        (4, 16): SINGLE_NARROW._replace(forward=Options(8, 2)),
        (4, 32): SINGLE_DEEP,
    },
}


def configuration_of(qkv: Tensor, work: Sizes, logit_scale: Tensor | None) -> Configuration:
    """How the kernels are compiled for a call."""
    table = CONFIGURATIONS[capability_of(qkv.device, CONFIGURATIONS)]
    found = table[min(qkv.element_size(), 4), tile(work.head_size)]
    if work.padded or logit_scale is not None:
        return found
    return found._replace(forward=found.plain_forward or found.forward)


@triton.jit
def _window_attention_bias_kernel(
    table_ptr,  # (offsets, h)
    bias_ptr,  # (cuts, h, TILE_N, TILE_N)
    num_heads,  # h
    shift_h,
    shift_w,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Biases, as `load_bias`, with the shift mask of each kind of window. Grid: (h, query blocks, kinds)."""
    head = tl.program_id(0)
    cuts = tl.program_id(2)
    queries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.arange(0, TILE_N)
    bias = load_bias(table_ptr + head, num_heads, queries, slots, WINDOW_H, WINDOW_W, COMPUTE)
    query_sides = cut_sides(queries, shift_h, shift_w, WINDOW_H, WINDOW_W)
    bias = keep_apart(bias, query_sides, cut_sides(slots, shift_h, shift_w, WINDOW_H, WINDOW_W), cuts)
    tile = (cuts * num_heads + head).to(tl.int64) * TILE_N * TILE_N
    tl.store(bias_ptr + tile + queries[:, None] * TILE_N + slots[None, :], bias)


@triton.jit
def _window_attention_bwd_table_kernel(
    pairs_ptr,  # (h, N, N): sums over all windows
    grad_table_ptr,  # (offsets, h)
    num_heads,  # h
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """The sum over the pairs of tokens that are some offsets apart. Grid: (offset blocks, h). Reads each pair once."""
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    ROW: tl.constexpr = 2 * WINDOW_W - 1
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    in_table = offsets < (2 * WINDOW_H - 1) * ROW
    keys = tl.arange(0, TILE_N)
    rows = (offsets // ROW - (WINDOW_H - 1))[:, None] + (keys // WINDOW_W)[None, :]  # of the query, (offsets, keys)
    columns = (offsets % ROW - (WINDOW_W - 1))[:, None] + (keys % WINDOW_W)[None, :]
    mask = in_table[:, None] & (keys < TOKENS)[None, :]
    mask &= (rows >= 0) & (rows < WINDOW_H) & (columns >= 0) & (columns < WINDOW_W)
    pairs = (rows * WINDOW_W + columns) * TOKENS + keys[None, :]
    values = tl.load(pairs_ptr + head * TOKENS * TOKENS + pairs, mask=mask, other=0.0)
    store_rounded(grad_table_ptr + offsets * num_heads + head, tl.sum(values, axis=1), in_table)


def forward(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    queries: Tensor | None,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    num_heads: int,
    scale: float,
) -> Tensor:
    """The operator's forward: out (B, H, W, C), or (B, K, C) with queries."""
    work = sizes(qkv, queries, window_h, window_w, num_heads)
    _check_limits(work)
    grid = qkv.shape[:3] if queries is None else queries.shape
    out = qkv.new_empty((*grid, num_heads * work.head_size))
    if out.numel() == 0:
        return out
    configuration = configuration_of(qkv, work, logit_scale)
    with on_device_of(qkv):
        arguments = _arguments(
            qkv, bias_table, logit_scale, pad_value, window_h, window_w, shift_h, shift_w, scale, work, kinds=1
        )
        arguments |= {"queries_ptr": contiguous(queries), "out_ptr": out, "num_heads": num_heads}
        if not work.whole:
            blocks = triton.cdiv(work.rows, work.query_block)
            _window_attention_blocked_fwd_kernel[(work.windows * num_heads, blocks)](
                **arguments,
                TILE_M=work.query_block,
                TILE_N=work.key_block,
                **configuration.blocked_forward._asdict(),
            )
        else:
            windows = program_windows(work, num_heads)
            _window_attention_fwd_kernel[(triton.cdiv(work.windows, windows) * num_heads,)](
                **arguments,
                num_windows=work.windows,
                program_windows=windows,
                TILE_M=tile(work.rows),
                TILE_N=tile(work.tokens),
                **configuration.forward._asdict(),
            )
    return out


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    queries: Tensor | None,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    num_heads: int,
    scale: float,
    needs_table: bool,
    needs_logit_scale: bool,
    needs_pad_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's backward: gradients of qkv, table, logit scale and padding value, each in its tensor's dtype."""
    work = sizes(qkv, queries, window_h, window_w, num_heads)
    _check_limits(work)
    needs_logit_scale = needs_logit_scale and logit_scale is not None
    needs_pad_value = needs_pad_value and pad_value is not None
    needs = {"table": needs_table, "logit_scale": needs_logit_scale, "pad_value": needs_pad_value and work.padded}
    partials = {
        name: qkv.new_empty(shape, dtype=compute_dtype(qkv.dtype)) if needs[name] else None
        for name, shape in partial_shapes(work, num_heads).items()
    }
    grad_qkv = qkv.new_empty(qkv.shape)
    if qkv.numel() > 0:
        with on_device_of(qkv):
            kinds = cuts(shift_h, shift_w)
            arguments = _arguments(
                qkv, bias_table, logit_scale, pad_value, window_h, window_w, shift_h, shift_w, scale, work, kinds
            )
            arguments |= {
                "grad_out_ptr": grad_out.contiguous(),
                "grad_qkv_ptr": grad_qkv,
                "places_ptr": None if queries is None else _places(queries, qkv.shape[1] * qkv.shape[2]),
                "num_heads": num_heads,
            }
            launch = _launch_backward if work.whole else _launch_blocked_backward
            launch(arguments, partials, work, configuration_of(qkv, work, logit_scale))
    return (
        grad_qkv,
        _table_gradient(partials["table"], bias_table, window_h, window_w) if needs_table else grad_out.new_empty(0),
        _scale_gradient(partials["logit_scale"], logit_scale) if needs_logit_scale else grad_out.new_empty(0),
        _pad_gradient(partials["pad_value"], pad_value) if needs_pad_value else grad_out.new_empty(0),
    )


def _launch_backward(
    arguments: dict[str, Any], partials: dict[str, Tensor | None], work: Sizes, configuration: Configuration
) -> None:
    num_heads = arguments["num_heads"]
    windows = chunk_windows(work, num_heads)
    _window_attention_bwd_kernel[(triton.cdiv(work.windows, windows) * num_heads,)](
        **arguments,
        table_partial_ptr=partials["table"],
        logit_scale_partial_ptr=partials["logit_scale"],
        pad_value_partial_ptr=partials["pad_value"],
        num_windows=work.windows,
        WINDOWS=windows,
        TILE_N=tile(work.tokens),
        **configuration.backward._asdict(),
    )


def _launch_blocked_backward(
    arguments: dict[str, Any], partials: dict[str, Tensor | None], work: Sizes, configuration: Configuration
) -> None:
    num_heads, qkv = arguments["num_heads"], arguments["qkv_ptr"]
    normaliser, delta = qkv.new_empty(statistics_shape(work, num_heads), dtype=compute_dtype(qkv.dtype))
    arguments |= {
        "normaliser_ptr": normaliser,
        "delta_ptr": delta,
        "TILE_M": work.query_block,
        "TILE_N": work.key_block,
    }
    queries, keys = query_blocks(work), key_blocks(work)
    _window_attention_blocked_bwd_queries_kernel[(work.windows * num_heads, queries)](
        **arguments,
        logit_scale_partial_ptr=partials["logit_scale"],
        **configuration.blocked_backward_queries._asdict(),
    )
    _window_attention_blocked_bwd_keys_kernel[(work.windows * num_heads, keys)](
        **arguments,
        pad_value_partial_ptr=partials["pad_value"],
        **configuration.blocked_backward_keys._asdict(),
    )
    if partials["table"] is None:
        return
    windows = chunk_windows(work, num_heads)
    del arguments["grad_qkv_ptr"]
    _window_attention_blocked_bwd_pairs_kernel[(triton.cdiv(work.windows, windows) * num_heads, queries, keys)](
        **arguments,
        table_partial_ptr=partials["table"],
        num_windows=work.windows,
        WINDOWS=windows,
        **configuration.blocked_backward_pairs._asdict(),
    )


def _arguments(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    work: Sizes,
    kinds: int,
) -> dict[str, Any]:
    """What every kernel takes. The table goes in as tiles of biases for `kinds` of windows, or as its columns."""
    dtype = compute_dtype(qkv.dtype)
    if work.whole:
        bias = {"bias_ptr": _bias_tiles(bias_table, window_h, window_w, shift_h, shift_w, work, kinds, dtype)}
    else:
        bias = {"table_ptr": bias_table.t().to(dtype).contiguous()}
    return bias | {
        "qkv_ptr": qkv.contiguous(),
        "logit_scale_ptr": contiguous(logit_scale),
        "pad_value_ptr": None if pad_value is None else pad_value.to(qkv.dtype).contiguous(),
        "num_queries": work.rows,
        "height": qkv.shape[1],
        "width": qkv.shape[2],
        "windows_h": work.windows_h,
        "windows_w": work.windows_w,
        "shift_h": shift_h,
        "shift_w": shift_w,
        "SCALE": scale,
        "WINDOW_H": window_h,
        "WINDOW_W": window_w,
        "HEAD_SIZE": work.head_size,
        "PADDED": work.padded,
        "SHIFTED": shift_h > 0 or shift_w > 0,
        "COMPUTE": compute_type(qkv.dtype),
        "TILE_D": tile(work.head_size),
    }


def _bias_tiles(
    bias_table: Tensor,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    work: Sizes,
    kinds: int,
    dtype: torch.dtype,
) -> Tensor:
    num_heads = bias_table.shape[1]
    bias = bias_table.new_empty(bias_shape(work, num_heads, kinds), dtype=dtype)
    size = bias.shape[-1]
    _window_attention_bias_kernel[(num_heads, size // BLOCK, kinds)](
        bias_table.contiguous(),
        bias,
        num_heads,
        shift_h,
        shift_w,
        WINDOW_H=window_h,
        WINDOW_W=window_w,
        COMPUTE=compute_type(dtype),
        TILE_N=size,
        BLOCK=BLOCK,
    )
    return bias


def _check_limits(work: Sizes) -> None:
    reason = triton_refusal(work.tokens, work.head_size)
    if reason is not None:
        raise RuntimeError(f"shifted_window_attention on triton: {reason}")


def _places(queries: Tensor, tokens: int) -> Tensor:
    """Where each token stands among the queries of its image: (B, tokens) int32, -1 where it does not."""
    batch, count = queries.shape
    columns = torch.where((queries >= 0) & (queries < tokens), queries, tokens).long()
    places = queries.new_full((batch, tokens + 1), -1)
    order = torch.arange(count, dtype=queries.dtype, device=queries.device).expand(batch, count)
    return places.scatter_(1, columns, order)[:, :tokens].contiguous()


def _table_gradient(partial: Tensor, bias_table: Tensor, window_h: int, window_w: int) -> Tensor:
    pairs = partial.sum(0)  # (h, N, N)
    grad = bias_table.new_empty(bias_table.shape)
    offsets, num_heads = grad.shape
    with on_device_of(grad):
        _window_attention_bwd_table_kernel[(triton.cdiv(offsets, BLOCK), num_heads)](
            pairs, grad, num_heads, window_h, window_w, BLOCK=BLOCK, TILE_N=tile(window_h * window_w)
        )
    return grad


def _scale_gradient(partial: Tensor, logit_scale: Tensor) -> Tensor:
    return torch.where(logit_scale <= MAX_LOGIT_SCALE, partial.sum(0), 0).to(logit_scale.dtype)


def _pad_gradient(partial: Tensor | None, pad_value: Tensor) -> Tensor:
    """No output of a padding token is kept, so its query has no gradient."""
    if partial is None:
        return torch.zeros_like(pad_value)
    key_and_value = partial.sum(0).flatten()
    return torch.cat([key_and_value.new_zeros(pad_value.shape[0] // 3), key_and_value]).to(pad_value.dtype)
