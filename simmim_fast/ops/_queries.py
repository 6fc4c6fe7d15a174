"""The rows of queries, as the references of the attentions take them."""

from __future__ import annotations

import torch
from torch import Tensor


def query_rows(out: Tensor, queries: Tensor) -> Tensor:
    """The rows (B, K, C) of out (B, N, C) that queries (B, K) name; NaN where there is no such token.

    On the CPU, where reading them costs no synchronisation, wrong queries are an error, unless a graph is compiled.

    Raises:
        ValueError: A query is no token, or a token is named twice (on the CPU).
    """
    tokens, has_data = out.shape[1], type(queries) is Tensor and not torch.compiler.is_compiling()
    if has_data and queries.device.type == "cpu":
        _check_queries(queries, tokens)
    valid = ((queries >= 0) & (queries < tokens))[..., None]
    rows = torch.take_along_dim(out, queries.long().clamp(0, tokens - 1)[..., None], dim=1)
    return torch.where(valid, rows, float("nan"))


def _check_queries(queries: Tensor, tokens: int) -> None:
    wrong = queries[(queries < 0) | (queries >= tokens)]
    if wrong.numel() > 0:
        raise ValueError(f"queries must be tokens from 0 to {tokens - 1}; got {int(wrong[0])}")
    ascending = queries.sort(dim=1).values
    twice = ascending[:, 1:][ascending[:, 1:] == ascending[:, :-1]]
    if twice.numel() > 0:
        raise ValueError(f"queries must be distinct tokens; got {int(twice[0])} twice in an image")
