"""The operators of residual_layer_norm by backend, and arguments for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simmim_fast.ops.residual_layer_norm.op import DIFFERENTIABLE
from tests.ops.targets import Target


def operators(target: Target) -> tuple[Any, Any]:
    name = f"residual_layer_norm_{target.backend}"
    return getattr(torch.ops.simmim_fast, name), getattr(torch.ops.simmim_fast, f"{name}_backward")


def operator_arguments(
    inputs: dict[str, Any], forward: Any, *, recompute: bool = False, adds_delta: bool = False
) -> tuple[tuple, tuple]:
    """Arguments of the forward and of the backward operator, all gradients being wanted.

    Args:
        inputs: Of the public function.
        forward: The operator.
        recompute: Whether the backward is asked for the norm's output again.
        adds_delta: Whether it gets x and delta for their sum.
    """
    x, delta, norms_delta = inputs["x"], inputs["delta"], inputs["norm"] == "delta"
    tensors = tuple(inputs[name] for name in ("x", "delta", "weight", "bias", "gamma", "keep", "delta_bias"))
    arguments = (*tensors, 1e-5, norms_delta, (x if delta is None else delta).dtype)
    stream, normed, mean, rstd = (result.detach() for result in forward(*arguments))
    weight, bias, gamma, keep, delta_bias = tensors[2:]
    source = x if adds_delta else delta if norms_delta else x if delta is None else stream
    grad_normed, grad_stream = (stream, None) if norms_delta else (normed, None if delta is None else stream)
    dtypes = [None if tensors[i] is None else tensors[i].dtype for i in DIFFERENTIABLE]
    if norms_delta:
        dtypes[0] = None
    added = delta if adds_delta or gamma is not None else None
    parameters = (weight, bias if recompute else None, gamma, keep, delta_bias)
    kept = (source, added, *parameters, mean, rstd, norms_delta, adds_delta)
    detached = (value.detach() if isinstance(value, Tensor) else value for value in (grad_normed, grad_stream, *kept))
    return arguments, (*detached, *dtypes)
