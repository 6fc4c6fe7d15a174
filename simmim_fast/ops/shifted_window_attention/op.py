"""Operators of shifted_window_attention: schemas, fakes, autograd, cost. The formulas are derived in README.md.

Shapes: B batch, H and W the token grid, h heads of D channels (C = h D), N tokens of a window, K queries of an image;
qkv (B, H, W, 3C); bias_table (offsets, h); out and grad_out (B, H, W, C), or (B, K, C) with queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simmim_fast.ops._devices import ENOUGH_PROGRAMS
from simmim_fast.ops._registration import Direction, define_op
from simmim_fast.ops.shifted_window_attention import reference

# Sizes of the Triton kernels' tiles. A window of at most WHOLE_TOKENS with heads of at most WHOLE_HEAD_SIZE channels is
# one tile. Any other is cut into blocks of (queries, keys), by the bytes of an element.
WHOLE_TOKENS = 64
WHOLE_HEAD_SIZE = 32
HALF_BLOCKS = {32: (64, 64), 64: (32, 64), 128: (32, 32)}  # by the most channels of a head
SINGLE_BLOCKS = {64: (32, 32), 128: (16, 16)}
BLOCKS = {2: HALF_BLOCKS, 4: SINGLE_BLOCKS, 8: {128: (16, 16)}}  # by bytes of an element
MAX_TOKENS = 256
MAX_HEAD_SIZE = 128
CUDA_HEAD_SIZE = 32  # of the CUDA C++ kernels, whose windows are whole tiles
FORWARD_WINDOWS = 8  # of one program of the forward in whole windows, at most
# Windows of a chunk, whose gradients of the parameters are added up before they are stored: the most that leave enough
# programs to fill a GPU, or else the last.
CHUNKS = (32, 16, 8, 4)


class Sizes(NamedTuple):
    """What the arguments of a call say about its work.

    Attributes:
        windows_h: Windows along the height of the padded grid.
        windows_w: Windows along its width.
        windows: Windows of the batch.
        tokens: Tokens of a window, N.
        offsets: Rows of the bias table.
        rows: Queries of a window: N, or K.
        head_size: D.
        padded: Whether the grid needs padding.
        query_block: Queries of a block, 0 where a window and head is one tile.
        key_block: Keys of a block, likewise.
    """

    windows_h: int
    windows_w: int
    windows: int
    tokens: int
    offsets: int
    rows: int
    head_size: int
    padded: bool
    query_block: int
    key_block: int

    @property
    def whole(self) -> bool:
        """Whether a window and head is one tile."""
        return self.query_block == 0


def sizes(qkv: Tensor, queries: Tensor | None, window_h: int, window_w: int, num_heads: int) -> Sizes:
    """The sizes of a call."""
    batch, height, width, channels = qkv.shape
    windows_h, windows_w = -(-height // window_h), -(-width // window_w)
    tokens, head_size, itemsize = window_h * window_w, channels // (3 * num_heads), qkv.dtype.itemsize
    whole = tokens <= WHOLE_TOKENS and head_size <= WHOLE_HEAD_SIZE
    blocks = next((blocks for most, blocks in BLOCKS[itemsize].items() if head_size <= most), (0, 0))
    query_block, key_block = (0, 0) if whole else blocks
    return Sizes(
        windows_h,
        windows_w,
        windows=batch * windows_h * windows_w,
        tokens=tokens,
        offsets=(2 * window_h - 1) * (2 * window_w - 1),
        rows=tokens if queries is None else queries.shape[1],
        head_size=head_size,
        padded=height % window_h != 0 or width % window_w != 0,
        query_block=query_block,
        key_block=key_block,
    )


def key_blocks(work: Sizes) -> int:
    """Blocks into which the kernels cut the keys of a window."""
    return 1 if work.whole else -(-work.tokens // work.key_block)


def query_blocks(work: Sizes) -> int:
    """Blocks into which the kernels cut all tokens of a window as queries."""
    return 1 if work.whole else -(-work.tokens // work.query_block)


def chunk_windows(work: Sizes, num_heads: int) -> int:
    """Windows of a chunk. It depends on sizes alone, so the sums repeat from GPU to GPU."""
    programs_of_window = num_heads * query_blocks(work) * key_blocks(work)
    return next((n for n in CHUNKS if -(-work.windows // n) * programs_of_window >= ENOUGH_PROGRAMS), CHUNKS[-1])


def program_windows(work: Sizes, num_heads: int) -> int:
    """Windows of one program of the forward in whole windows: fewer where the most leave too few programs."""
    return max(1, min(FORWARD_WINDOWS, work.windows * num_heads // ENOUGH_PROGRAMS))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits, softmax and sums for activations of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def cuts(shift_h: int, shift_w: int) -> int:
    """Kinds of windows that the shift mask tells apart: cut by the roll along rows, columns, both or not at all."""
    return 4 if shift_h > 0 or shift_w > 0 else 1


def tile(size: int) -> int:
    """The least power of two, from 16, that holds so many elements."""
    return max(16, 1 << (size - 1).bit_length())


def bias_shape(work: Sizes, num_heads: int, kinds: int) -> tuple[int, ...]:
    """Shape of the biases as the kernels read them, in `compute_dtype`: tiles, or the table's columns."""
    if not work.whole:
        return (num_heads, work.offsets)
    return (kinds, num_heads, tile(work.tokens), tile(work.tokens))


def partial_shapes(work: Sizes, num_heads: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the partial gradients of the parameters, in `compute_dtype`; the first axis is the one to sum over."""
    chunks = -(-work.windows // chunk_windows(work, num_heads))
    return {
        "table": (chunks, num_heads, work.tokens, work.tokens),
        "logit_scale": (work.windows * query_blocks(work), num_heads),
        "pad_value": (work.windows * key_blocks(work) if work.padded else 0, 2, num_heads * work.head_size),
    }


def statistics_shape(work: Sizes, num_heads: int) -> tuple[int, ...]:
    """Shape of the two numbers for each row of weights that the backward keeps, for windows cut into blocks."""
    return (2, 0 if work.whole else work.windows, num_heads, work.tokens)


def size_refusal(backend: str, *, device_type: str, tokens: int, head_size: int, dtype: torch.dtype) -> str | None:
    """Why a backend does not take windows of so many tokens and heads of so many channels; None where it does."""
    if backend == "triton":
        return triton_refusal(tokens, head_size)
    if backend != "native" or device_type != "cuda":
        return None
    if dtype == torch.float64:
        return f"it has no CUDA kernel for {dtype}"
    if tokens > WHOLE_TOKENS or head_size != CUDA_HEAD_SIZE:
        limits = f"windows of at most {WHOLE_TOKENS} tokens and heads of {CUDA_HEAD_SIZE} channels"
        return f"it takes {limits}; got {tokens} and {head_size}"
    return None


def triton_refusal(tokens: int, head_size: int) -> str | None:
    """`size_refusal` of Triton, which is the same on every device."""
    if tokens > MAX_TOKENS:
        return f"it takes windows of at most {MAX_TOKENS} tokens; got {tokens}"
    if head_size > MAX_HEAD_SIZE:
        return f"it takes heads of at most {MAX_HEAD_SIZE} channels; got {head_size}"
    return None


def _reference(
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
    return reference.shifted_window_attention(
        qkv,
        bias_table,
        (window_h, window_w),
        (shift_h, shift_w),
        num_heads,
        scale=scale,
        logit_scale=logit_scale,
        pad_value=pad_value,
        queries=queries,
    ).contiguous()


def _fake(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    queries: Tensor | None,
    *geometry: float,
) -> Tensor:
    grid = qkv.shape[:3] if queries is None else queries.shape
    return qkv.new_empty((*grid, qkv.shape[3] // 3))


def _fake_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    queries: Tensor | None,
    *geometry_and_needs: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = zip((bias_table, logit_scale, pad_value), geometry_and_needs[-3:], strict=True)
    return (
        qkv.new_empty(qkv.shape),
        *(
            parameter.new_empty(parameter.shape) if needed and parameter is not None else grad_out.new_empty(0)
            for parameter, needed in parameters
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.geometry = inputs[5:]
    ctx.needs = ctx.needs_input_grad[1:4]


def _gradients(ctx: Any, backward: Callable, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_qkv, *parameters = backward(grad_out, *ctx.saved_tensors, *ctx.geometry, *ctx.needs)
    wanted = [grad if needed else None for grad, needed in zip(parameters, ctx.needs, strict=True)]
    return grad_qkv if ctx.needs_input_grad[0] else None, *wanted, *[None] * (1 + len(ctx.geometry))


def _products(qkv: Tensor, queries: Tensor | None, window_h: int, window_w: int, num_heads: int) -> int:
    """FLOPs of one product over all windows and heads: queries by keys by D."""
    work = sizes(qkv, queries, window_h, window_w, num_heads)
    return 2 * work.windows * num_heads * work.rows * work.tokens * work.head_size


def _flops(
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
) -> int:
    """Two products: q k' and p v."""
    return 2 * _products(qkv, queries, window_h, window_w, num_heads)


def _flops_backward(
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
    *needs: bool,
) -> int:
    """Five products: q k' again, dO v', p' dO, ds k and ds' q."""
    return 5 * _products(qkv, queries, window_h, window_w, num_heads)


def _bytes_moved(
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
    *,
    every_load: bool = False,
) -> tuple[int, int]:
    """Every block of queries loads k and v, every program its biases, every head the queries."""
    work = sizes(qkv, queries, window_h, window_w, num_heads)
    out, itemsize = (
        _fake(qkv.to("meta"), bias_table, logit_scale, pad_value, queries),
        compute_dtype(qkv.dtype).itemsize,
    )
    if out.numel() == 0:
        return 0, 0
    biases, keys_and_values = math.prod(bias_shape(work, num_heads, 1)) * itemsize, 2 * (qkv.nbytes // 3)
    read = out.nbytes + keys_and_values + _parameters_nbytes(logit_scale, pad_value)
    if not every_load:
        of_queries = num_heads * work.tokens * tile(work.tokens) * itemsize  # no rows behind the window
        read_biases = of_queries if work.whole and queries is not None else biases
        return read + _nbytes(bias_table, queries) + read_biases, out.nbytes + biases
    other_blocks = 0 if work.whole else -(-work.rows // work.query_block) - 1
    read += other_blocks * keys_and_values + num_heads * _nbytes(queries) + _table_loads(work, bias_table, 1)
    return read + _forward_bias_loads(work, num_heads, queries) * itemsize, out.nbytes + biases


def _parameters_nbytes(logit_scale: Tensor | None, pad_value: Tensor | None) -> int:
    """Bytes that a kernel reads of them; of the padding value the thirds of k and v."""
    return _nbytes(logit_scale) + _nbytes(pad_value) // 3 * 2


def _table_loads(work: Sizes, bias_table: Tensor, kinds: int) -> int:
    """Bytes of the table that are read to make tiles of biases, or its columns."""
    pairs = kinds * bias_table.shape[1] * work.tokens**2
    return pairs * bias_table.itemsize if work.whole else bias_table.nbytes


def _forward_bias_loads(work: Sizes, num_heads: int, queries: Tensor | None) -> int:
    """Biases that the programs of the forward load: a tile of a head each, with queries for every window."""
    if not work.whole:
        rows = work.rows if queries is None else -(-work.rows // work.query_block) * work.query_block
        return work.windows * num_heads * rows * work.tokens
    tiles = work.windows if queries is not None else -(-work.windows // program_windows(work, num_heads))
    return tiles * num_heads * tile(work.rows) * tile(work.tokens)


def _backward_bias_loads(work: Sizes, num_heads: int, needs_table: bool) -> int:
    """Biases that the programs of the backward load: a tile for every window, or all pairs by three kernels."""
    if work.whole:
        return work.windows * num_heads * tile(work.tokens) ** 2
    chunks = -(-work.windows // chunk_windows(work, num_heads)) if needs_table else 0
    return (3 * work.windows + chunks) * num_heads * work.tokens**2


def _bytes_moved_backward(
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
    *needs: bool,
    every_load: bool = False,
) -> tuple[int, int]:
    """Activations and biases for each kernel, and for every block that loads them; partial gradients and sums once."""
    work = sizes(qkv, queries, window_h, window_w, num_heads)
    if qkv.numel() == 0:
        return 0, 0
    third, itemsize, kinds = qkv.nbytes // 3, compute_dtype(qkv.dtype).itemsize, cuts(shift_h, shift_w)
    sums = _sums_numel(work, num_heads, (bias_table, logit_scale, pad_value), needs)
    biases, statistics = math.prod(bias_shape(work, num_heads, kinds)), math.prod(statistics_shape(work, num_heads))
    places = 0 if queries is None else queries.element_size() * math.prod(qkv.shape[:3])
    kernels = 1 if work.whole else 2 + needs[0]
    of_keys, of_queries, passes, heads = (
        (key_blocks(work), query_blocks(work), 2, num_heads) if every_load else (1, 1, 1, 1)
    )
    by_keys, by_queries = of_keys * (grad_out.nbytes + third), of_queries * 2 * third
    read, grad_out_loads = grad_out.nbytes + 3 * third, 1
    if not work.whole:
        read += passes * by_queries + by_keys + needs[0] * (by_keys + by_queries)
        grad_out_loads += (kernels - 1) * of_keys
    loaded = sums + (kernels - 1) * of_keys * statistics
    loaded += _backward_bias_loads(work, num_heads, needs[0]) if every_load else kernels * biases
    read += _table_loads(work, bias_table, kinds) if every_load else bias_table.nbytes
    read += kernels * _parameters_nbytes(logit_scale, pad_value)
    read += loaded * itemsize + grad_out_loads * heads * places + _nbytes(queries)
    written = (sums + biases + statistics) * itemsize + places
    results = _fake_backward(grad_out.to("meta"), qkv.to("meta"), bias_table, logit_scale, pad_value, queries, *needs)
    return read, written + _nbytes(*results)


def _sums_numel(work: Sizes, num_heads: int, parameters: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> int:
    """Elements of the wanted partial gradients of the parameters, and of their sums."""
    shapes = zip(parameters, partial_shapes(work, num_heads).values(), needs, strict=True)
    return sum(
        math.prod(shape) + math.prod(shape[1:])
        for parameter, shape, needed in shapes
        if parameter is not None and needed and shape[0] > 0
    )


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


_ARGUMENTS = (
    "Tensor qkv, Tensor bias_table, Tensor? logit_scale, Tensor? pad_value, Tensor? queries,"
    " int window_h, int window_w, int shift_h, int shift_w, int num_heads, float scale"
)

OP = define_op(
    "shifted_window_attention",
    reference=_reference,
    forward=Direction(
        schema=f"({_ARGUMENTS}) -> Tensor",
        fake=_fake,
        flops=_flops,
        bytes_moved=_bytes_moved,
        bytes_loaded=partial(_bytes_moved, every_load=True),
    ),
    backward=Direction(
        schema=f"(Tensor grad_out, {_ARGUMENTS}, bool needs_table, bool needs_logit_scale, bool needs_pad_value)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        fake=_fake_backward,
        flops=_flops_backward,
        bytes_moved=_bytes_moved_backward,
        bytes_loaded=partial(_bytes_moved_backward, every_load=True),
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    backends={"native": None, "triton": "simmim_fast.ops.shifted_window_attention.kernels"},
    native_devices=("cpu", "cuda"),
)
