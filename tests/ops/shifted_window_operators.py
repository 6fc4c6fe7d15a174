"""The operators of shifted_window_attention by backend, and arguments for them."""

from __future__ import annotations

from typing import Any

import torch

from simmim_fast.testing import shifted_window_attention_inputs as make_inputs
from tests.ops.targets import Target


def operators(target: Target) -> tuple[Any, Any]:
    name = f"shifted_window_attention_{target.backend}"
    return getattr(torch.ops.simmim_fast, name), getattr(torch.ops.simmim_fast, f"{name}_backward")


def operator_arguments(**case: Any) -> tuple[tuple, tuple]:
    """Arguments of the forward and of the backward operator."""
    inputs = make_inputs(**case)
    qkv, heads = inputs["qkv"], inputs["num_heads"]
    tensors = [inputs[name] for name in ("qkv", "bias_table", "logit_scale", "pad_value", "queries")]
    arguments = (*tensors, *inputs["window_size"], *inputs["shift"], heads, case["shape"][4] ** -0.5)
    grid = qkv.shape[:3] if inputs["queries"] is None else inputs["queries"].shape
    return arguments, (qkv.new_ones((*grid, qkv.shape[3] // 3)), *arguments, True, True, True)
