"""Other people's fused attention with a bias on the logits, in the places of the ops that compute it here.

Shapes: B batch (of windows), h heads, N tokens, D head size, G windows of an image.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Absent
from simmim_fast.ops.shifted_window_attention import reference
from simmim_fast.ops.shifted_window_attention.reference import MAX_LOGIT_SCALE, bias_and_mask

# (q, k, v (B, h, N, D), bias (h, N, N), mask (G, N, N) or None, scale or None) -> (B, h, N, D)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
ALIGNMENT = 8  # elements, of a row of the bias that xformers takes


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """PyTorch's own, which takes bias and mask as one tensor of the queries' dtype, as timm hands them over."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_joined(bias, mask, q), scale=scale)


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """FlexAttention, which reads bias and mask where it needs them; to be compiled by whoever calls it."""
    from torch.nn.attention.flex_attention import flex_attention

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + bias[h, i, j]
        return score if mask is None else score + mask[b % len(mask), i, j]

    return flex_attention(q, k, v, score_mod=biased, scale=scale)


def xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """xformers' memory-efficient attention, whose bias is a view of rows of aligned length."""
    from xformers.ops import memory_efficient_attention

    tokens = q.shape[-2]
    joined = F.pad(_joined(bias, mask, q), (0, -tokens % ALIGNMENT))[..., :tokens]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return memory_efficient_attention(q, k, v, attn_bias=joined, scale=scale).transpose(1, 2)


def _joined(bias: Tensor, mask: Tensor | None, q: Tensor) -> Tensor:
    """Bias and mask as (B, h, N, N), in q's dtype."""
    joined = bias[None]
    if mask is not None:
        joined = (joined + mask[:, None]).repeat(len(q) // len(mask), 1, 1, 1)
    return joined.to(q.dtype).expand(len(q), -1, -1, -1)


ATTENTIONS: dict[str, Attend] = {"sdpa": sdpa, "flex": flex, "xformers": xformers}


def attention(name: str, device: str) -> Attend:
    """One of `ATTENTIONS`.

    Raises:
        Absent: It does not run here.
    """
    if name == "flex" and device != "cuda":
        raise Absent("FlexAttention has a backward on CUDA alone")
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise Absent("the package xformers is not installed")
    if name == "xformers" and device != "cuda":
        raise Absent("xformers' memory-efficient attention takes CUDA tensors alone")
    return ATTENTIONS[name]


def of_all_tokens(
    attend: Attend,
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """As `biased_attention`.

    Raises:
        Absent: There is no bias, or there are queries.
    """
    if bias is None or queries is not None:
        raise Absent("peers' attention is written here for a bias and all tokens")
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, N, D)
    return attend(q, k, v, bias, None, scale).transpose(1, 2).flatten(2)


def in_windows(
    attend: Attend,
    qkv: Tensor,
    bias_table: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    num_heads: int,
    *,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    position_index: Tensor | None = None,
    attn_mask: Tensor | None = None,
    queries: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """As `shifted_window_attention`; the cosine form is a product of unit vectors, the queries' scaled.

    Raises:
        Absent: Windows do not fill the grid, or there are queries.
    """
    grid = tuple(qkv.shape[1:3])
    if queries is not None or grid[0] % window_size[0] or grid[1] % window_size[1]:
        raise Absent("peers' window attention is written here for all tokens of grids that whole windows fill")
    bias, mask = bias_and_mask(bias_table, grid, window_size, shift, position_index, attn_mask)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if logit_scale is None:
            return attend(q, k, v, bias, mask, scale)
        factor = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().view(-1, 1, 1)
        unit_q, unit_k = (F.normalize(q, dim=-1) * factor).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        return attend(unit_q, unit_k, v, bias, mask, 1.0)

    return reference.in_windows(attended, qkv, window_size, shift, num_heads)
