"""Other people's fused attention with a bias on the logits, in the places of the ops that compute it here.

Shapes: B images, G windows of an image, h heads, N tokens of a window, D head size, H and W the token grid, C = h D.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Absent
from simmim_fast.ops.shifted_window_attention.reference import MAX_LOGIT_SCALE, bias_and_mask

# (q, k, v (B, G, h, N, D), bias (h, N, N), mask (G, N, N) or None, scale or None) -> (B, G, h, N, D)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]
ALIGNMENT = 8  # elements, of a row of the bias that xformers takes


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """PyTorch's own, which takes bias and mask as one tensor of the queries' dtype, as timm hands them over."""
    joined, axis = _joined(bias, mask, q)
    out = F.scaled_dot_product_attention(*_flat(q, k, v, axis), attn_mask=joined, scale=scale)
    return out.unflatten(axis, q.shape[axis : axis + 2])


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """FlexAttention, which reads bias and mask where it needs them; to be compiled by whoever calls it."""
    from torch.nn.attention.flex_attention import flex_attention

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + bias[h, i, j]
        return score if mask is None else score + mask[b % len(mask), i, j]

    return flex_attention(*_flat(q, k, v, 0), score_mod=biased, scale=scale).unflatten(0, q.shape[:2])


def xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """xformers' memory-efficient attention, whose bias is a view of rows of aligned length."""
    from xformers.ops import memory_efficient_attention

    joined, axis = _joined(bias, mask, q)
    tokens, flat = q.shape[-2], [one.transpose(1, 2) for one in _flat(q, k, v, axis)]
    joined = F.pad(joined, (0, -tokens % ALIGNMENT))[..., :tokens].expand(len(flat[0]), -1, -1, -1)
    out = memory_efficient_attention(*flat, attn_bias=joined, scale=scale).transpose(1, 2)
    return out.unflatten(axis, q.shape[axis : axis + 2])


def _joined(bias: Tensor, mask: Tensor | None, q: Tensor) -> tuple[Tensor, int]:
    """Bias and mask as one tensor in q's dtype, to be broadcast over the images, and the axis that windows go to.

    Without a mask windows are as images, axis 0, under (1, h, N, N); with one they are as heads, axis 1, under
    (1, G h, N, N), so that nothing is repeated for each image.
    """
    if mask is None:
        return bias[None].to(q.dtype), 0
    return (bias + mask[:, None]).to(q.dtype).flatten(0, 1)[None], 1


def _flat(q: Tensor, k: Tensor, v: Tensor, axis: int) -> tuple[Tensor, ...]:
    """q, k and v with the windows joined to the images, axis 0, or to the heads, axis 1; as views."""
    return tuple(one.flatten(axis, axis + 1) for one in (q, k, v))


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
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unsqueeze(2)  # (B, 1, h, N, D)
    return attend(q, k, v, bias, None, scale).squeeze(1).transpose(1, 2).flatten(2)


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
    qkv = torch.roll(qkv, shifts=(-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else qkv
    q, k, v = _windows(qkv, window_size, num_heads)
    if logit_scale is not None:
        factor, scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().view(-1, 1, 1), 1.0
        q, k = (F.normalize(q, dim=-1) * factor).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
    out = _grid(attend(q, k, v, bias, mask, scale), grid, window_size)
    return torch.roll(out, shifts=shift, dims=(1, 2)) if any(shift) else out


def _windows(qkv: Tensor, window_size: tuple[int, int], num_heads: int) -> Tensor:
    """(B, H, W, 3C) to (3, B, G, h, N, D), contiguous, in the one copy that cutting windows takes anyway."""
    rows, columns = window_size
    cut = qkv.unflatten(3, (3, num_heads, -1)).unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    return cut.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 3)


def _grid(out: Tensor, grid: tuple[int, int], window_size: tuple[int, int]) -> Tensor:
    """(B, G, h, N, D) to (B, H, W, C)."""
    rows, columns = window_size
    cut = out.unflatten(3, window_size).unflatten(1, (grid[0] // rows, grid[1] // columns))
    return cut.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
