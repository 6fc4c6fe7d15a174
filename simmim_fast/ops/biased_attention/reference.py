"""Attention over all tokens with an additive bias, in plain PyTorch. The oracle."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from simmim_fast.ops._queries import query_rows


def biased_attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    queries: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head self-attention with a bias on the logits: softmax(scale q k' + bias) v.

    Args:
        qkv: (B, N, 3C) as the linear layer writes it: q, k, v, each head by head.
        bias: (heads, N, N), shared by the batch, or None.
        num_heads: Heads; C is heads x head size.
        scale: Factor of the logits; head size ** -0.5 by default.
        queries: (B, K) integer, the tokens whose outputs are wanted; all by default.
        dropout: Rate at which attention weights are dropped.

    Returns:
        (B, N, C), or (B, K, C) with `queries`, in qkv's dtype.

    Raises:
        ValueError: On the CPU: a query is no token, or a token is named twice.
    """
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, N, D) each
    logits = (q * (scale if scale is not None else q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    weights = F.dropout(logits.softmax(dim=-1), dropout, training=dropout > 0).to(v.dtype)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return out if queries is None else query_rows(out, queries)
