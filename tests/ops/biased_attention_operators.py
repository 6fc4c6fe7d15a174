"""The operators of biased_attention by backend, and arguments for them."""

from __future__ import annotations

from typing import Any

import torch

from simmim_fast.testing import biased_attention_inputs
from tests.ops.targets import Target


def operators(target: Target) -> tuple[Any, Any]:
    name = f"biased_attention_{target.backend}"
    return getattr(torch.ops.simmim_fast, name), getattr(torch.ops.simmim_fast, f"{name}_backward")


def operator_arguments(
    shape: tuple, dtype: torch.dtype, bias_dtype: torch.dtype, device: str, **variant: Any
) -> tuple[tuple, tuple]:
    """Arguments of the forward and of the backward operator, with what the forward gives left uncomputed."""
    inputs = biased_attention_inputs(shape, dtype, bias_dtype, device=device, **variant)
    images, tokens, heads, head_size = shape
    qkv, bias, queries = inputs["qkv"], inputs["bias"], inputs.get("queries")
    rows = tokens if queries is None else queries.shape[1]
    out = torch.ones(images, rows, heads * head_size, dtype=dtype, device=device)
    lse = torch.ones(images, heads, rows, dtype=torch.promote_types(dtype, torch.float32), device=device)
    constants = (heads, head_size**-0.5)
    return (qkv, bias, queries, *constants), (torch.ones_like(out), qkv, bias, queries, out, lse, *constants, True)
