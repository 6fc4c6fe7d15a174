"""The operators of residual_layer_norm by backend, and arguments for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.ops.targets import Target


def operators(target: Target) -> tuple[Any, Any]:
    name = f"residual_layer_norm_{target.backend}"
    return getattr(torch.ops.simmim_fast, name), getattr(torch.ops.simmim_fast, f"{name}_backward")


def operator_arguments(inputs: dict[str, Any], forward: Any) -> tuple[tuple, tuple]:
    """Arguments of the forward and of the backward operator, all gradients being wanted."""
    x, delta, norms_delta = inputs["x"], inputs["delta"], inputs["norm"] == "delta"
    tensors = tuple(inputs[name] for name in ("x", "delta", "weight", "bias", "gamma", "keep"))
    arguments = (*tensors, 1e-5, norms_delta, (x if delta is None else delta).dtype)
    stream, normed, mean, rstd = (result.detach() for result in forward(*arguments))
    weight, gamma, keep = (inputs[name] for name in ("weight", "gamma", "keep"))
    source = delta if norms_delta else x if delta is None else stream
    grad_normed, grad_stream = (stream, None) if norms_delta else (normed, None if delta is None else stream)
    dtypes = [None if value is None else value.dtype for value in tensors[:5]]
    if norms_delta:
        dtypes[0] = None
    kept = (source, None if gamma is None else delta, weight, gamma, keep, mean, rstd, norms_delta)
    detached = (value.detach() if isinstance(value, Tensor) else value for value in (grad_normed, grad_stream, *kept))
    return arguments, (*detached, *dtypes)
