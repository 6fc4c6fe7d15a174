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
from simmim_fast.ops.biased_attention.op import OP, size_refusal


def biased_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    queries: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head self-attention over all tokens, with a bias on the logits that the batch shares.

        softmax(scale q k' + bias) v

    The attention of BEiT (arXiv 2106.08254), as in the official code (models/vision_transformer.py). The logits of all
    pairs of tokens are never stored, in either direction.

    Args:
        qkv: (B, N, 3C), float64, float32, bfloat16 or float16, any strides: q, k and v as the linear layer writes them,
            each head by head. C is heads x head size.
        bias: (heads, N, N), a floating dtype of its own, or None.
        num_heads: Heads.
        scale: Factor of the logits, head size ** -0.5 by default.
        queries: (B, K) integer: the distinct tokens whose outputs are wanted. A token outside 0 .. N - 1 is an error on
            the CPU, and NaN in its row on CUDA.
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back. "auto" passes over a
            backend that does not take this call.

    Returns:
        (B, N, C), or (B, K, C) with `queries`, contiguous, in qkv's dtype, under autocast as without.

    Raises:
        TypeError: A tensor is none, or of the wrong dtype; num_heads is no integer, or scale no number.
        ValueError: Shapes or devices disagree, a size is out of range, or the backend is unknown.
        RuntimeError: The named backend cannot run; the message says why.

    Numerics:
        Logits, softmax and all sums are in float32 (float64 for float64); products take qkv's dtype. The gradient of
        the bias adds up over the batch in a fixed order, so that it repeats bit for bit.
    """
    _check_attention(qkv, bias, num_heads)
    if scale is not None:
        check_number("scale", scale)
    if queries is not None:
        queries = check_indices("queries", queries, qkv.shape[0], qkv.shape[1], "N")
    check_device("qkv", qkv, bias=bias, queries=queries)
    tokens, channels = qkv.shape[1], qkv.shape[2] // 3
    scale = (channels // num_heads) ** -0.5 if scale is None else float(scale)
    sizes = {"tokens": tokens, "channels": channels, "num_heads": num_heads}
    backend = choose(OP, backend, qkv.device, qkv.dtype, partial(size_refusal, **sizes))
    return OP.implementations[backend](qkv, bias, queries, num_heads, scale)[0]


def _check_attention(qkv: Tensor, bias: Tensor | None, num_heads: int) -> None:
    check_float(qkv=qkv)
    check_optional_float(bias=bias)
    check_int("num_heads", num_heads, 1)
    if qkv.ndim != 3:
        raise ValueError(f"qkv must have 3 dimensions (B, N, 3C); got shape {tuple(qkv.shape)}")
    tokens, channels = qkv.shape[1:]
    if channels == 0 or channels % (3 * num_heads):
        raise ValueError(f"qkv must have 3 x num_heads x head size channels; got {channels} for {num_heads} heads")
    if bias is not None:
        check_shape("bias", bias, (num_heads, tokens, tokens), "(heads, N, N)")
