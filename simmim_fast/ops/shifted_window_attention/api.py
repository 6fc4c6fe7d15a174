"""The public function: checks, choice of backend, call."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from simmim_fast._backends import choose
from simmim_fast.ops._checks import (
    check_device,
    check_float,
    check_indices,
    check_int,
    check_number,
    check_optional_float,
    check_shape,
)
from simmim_fast.ops.shifted_window_attention.op import OP, size_refusal


def shifted_window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int],
    num_heads: int,
    *,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    pad_value: Tensor | None = None,
    queries: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head self-attention inside shifted windows (arXiv 2103.14030, section 3.2; 2111.09883, section 3.3).

        softmax(scale q k' + bias + mask) v,  or with `logit_scale`  softmax(exp(logit_scale) cos(q, k) + bias + mask) v

    The grid is rolled up and left by `shift`, cut into windows and rolled back, all in index arithmetic. Between tokens
    that the roll has brought together from opposite borders the mask is -100, as in the official code
    (models/swin_transformer.py). A grid that the window does not divide is padded at the bottom and right, then rolled,
    as in Hugging Face's Swin; padding tokens are attended to like any other.

    Args:
        qkv: (B, H, W, 3C), float64, float32, bfloat16 or float16, any strides: q, k and v as the linear layer writes
            them, each head by head. C is heads x head size.
        bias_table: ((2 wh - 1)(2 ww - 1), heads), a floating dtype of its own: a row for each offset of two tokens.
        window_size: Tokens of a window, (wh, ww) or one int for both.
        shift: Rows and columns of the roll, or one int for both, each from 0 to below the window.
        num_heads: Heads.
        scale: Factor of the logits, head size ** -0.5 by default; unused with `logit_scale`.
        logit_scale: (heads), a floating dtype of its own: the cosine form of Swin V2, clamped at log 100. Vectors are
            divided by max(norm, 1e-12), and those shorter than that have gradient 0.
        pad_value: (3C), a floating dtype of its own: q, k and v of a padding token, which is the bias of the linear
            layer; zeros by default.
        queries: (B, K) integer: the distinct flat tokens y W + x whose outputs are wanted. Only where the padded grid
            is one window. A token outside the grid is an error on the CPU, and NaN in its row on CUDA.
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back. "auto" passes over a
            backend that does not take this size of window or head.

    Returns:
        (B, H, W, C), or (B, K, C) with `queries`, contiguous, in qkv's dtype, under autocast as without.

    Raises:
        TypeError: A tensor is none, or of the wrong dtype; a size is no integer, or scale no number.
        ValueError: Shapes or devices disagree, a size is out of range, or the backend is unknown.
        RuntimeError: The named backend cannot run; the message says why.

    Numerics:
        Logits, softmax and all sums are in float32 (float64 for float64); products take qkv's dtype. The gradients of
        table, logit scale and padding value add up in a fixed order, so that they repeat bit for bit.
    """
    check_float(qkv=qkv, bias_table=bias_table)
    check_optional_float(logit_scale=logit_scale, pad_value=pad_value)
    window_h, window_w = window = _pair("window_size", window_size, 1)
    shift_h, shift_w = shift = _pair("shift", shift, 0)
    check_int("num_heads", num_heads, 1)
    if scale is not None:
        check_number("scale", scale)
    _check_sizes(qkv, window, shift, num_heads)
    offsets = (2 * window_h - 1) * (2 * window_w - 1)
    check_shape("bias_table", bias_table, (offsets, num_heads), "((2wh-1)(2ww-1), heads)")
    if logit_scale is not None:
        check_shape("logit_scale", logit_scale, (num_heads,), "(heads)")
    if pad_value is not None:
        check_shape("pad_value", pad_value, qkv.shape[3:], "(3C)")
    if queries is not None:
        queries = _check_queries(queries, qkv, window)
    check_device("qkv", qkv, bias_table=bias_table, logit_scale=logit_scale, pad_value=pad_value, queries=queries)
    head_size = qkv.shape[3] // (3 * num_heads)
    size = {"tokens": window_h * window_w, "head_size": head_size, "dtype": qkv.dtype}
    refusal = partial(size_refusal, device_type=qkv.device.type, **size)
    backend = choose(OP, backend, qkv.device, qkv.dtype, refusal)
    scale = head_size**-0.5 if scale is None else float(scale)
    return OP.implementations[backend](
        qkv, bias_table, logit_scale, pad_value, queries, window_h, window_w, shift_h, shift_w, num_heads, scale
    )


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or a pair of them; got {value!r}")
    for size in pair:
        check_int(name, size, least)
    return pair


def _check_sizes(qkv: Tensor, window: tuple[int, int], shift: tuple[int, int], num_heads: int) -> None:
    if qkv.ndim != 4:
        raise ValueError(f"qkv must have 4 dimensions (B, H, W, 3C); got shape {tuple(qkv.shape)}")
    if qkv.shape[3] == 0 or qkv.shape[3] % (3 * num_heads):
        raise ValueError(f"qkv must have 3 x num_heads x head size channels; got {qkv.shape[3]} for {num_heads} heads")
    if any(by >= size for by, size in zip(shift, window, strict=True)):
        raise ValueError(f"shift must be below window_size = {window}; got {shift}")


def _check_queries(queries: Tensor, qkv: Tensor, window: tuple[int, int]) -> Tensor:
    batch, height, width, _ = qkv.shape
    if not (0 < height <= window[0] and 0 < width <= window[1]):
        raise ValueError(f"queries need a grid of one window, at most {window} tokens; got {(height, width)}")
    return check_indices("queries", queries, batch, height * width, "H W")
