"""Operators of bias_gelu: schemas, fakes, autograd, cost. The formulas are derived in README.md.

Shapes: x, grad_out (..., C); bias (C). Rows are the positions of the axes before the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simmim_fast.ops._registration import Direction, define_op, unrounded_nbytes
from simmim_fast.ops.bias_gelu.reference import bias_gelu

# The gradient of the bias goes by chunks of 128 rows: the chunks are added up first, then their sums.
CHUNK_ROWS = 128


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums over tensors of `dtype` accumulate."""
    return torch.promote_types(dtype, torch.float32)


def partial_shape(x: Tensor) -> tuple[int, int]:
    """Shape of the partial sums of grad_bias; the first axis is the one to sum over."""
    return -(-math.prod(x.shape[:-1]) // CHUNK_ROWS), x.shape[-1]


def _fake(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    bias: Tensor,
    recompute: bool,
    x_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both gradients, and the forward's result, to `recompute`, each empty where it is not wanted."""
    return (
        x.new_empty(0) if x_dtype is None else x.new_empty(x.shape, dtype=x_dtype),
        x.new_empty(0) if bias_dtype is None else x.new_empty(bias.shape, dtype=bias_dtype),
        x.new_empty(x.shape if recompute else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.dtypes = [inputs[i].dtype if ctx.needs_input_grad[i] else None for i in (0, 1)]


def _gradients(ctx: Any, backward: Callable, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, _ = backward(grad_out, *ctx.saved_tensors, False, *ctx.dtypes)
    return tuple(None if dtype is None else grad for grad, dtype in zip(gradients, ctx.dtypes, strict=True))


def _no_flops(*args: Any) -> int:
    return 0


def _bytes_moved(x: Tensor, bias: Tensor) -> tuple[int, int]:
    return x.nbytes + bias.nbytes, x.nbytes


def _bytes_moved_backward(
    grad_out: Tensor,
    x: Tensor,
    bias: Tensor,
    recompute: bool,
    x_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[int, int]:
    """The partial sums are written once and read once, and so is their sum where it is rounded."""
    dtype = sum_dtype(x.dtype)
    results = _fake_backward(grad_out, x.to("meta"), bias, recompute, x_dtype, bias_dtype)
    partials = math.prod(partial_shape(x)) if bias_dtype else 0
    workspace = partials * dtype.itemsize + unrounded_nbytes(dtype, results[1])
    return grad_out.nbytes + x.nbytes + bias.nbytes + workspace, workspace + sum(t.nbytes for t in results)


OP = define_op(
    "bias_gelu",
    reference=bias_gelu,
    forward=Direction(
        schema="(Tensor x, Tensor bias) -> Tensor", fake=_fake, flops=_no_flops, bytes_moved=_bytes_moved
    ),
    backward=Direction(
        schema="(Tensor grad_out, Tensor x, Tensor bias, bool recompute, ScalarType? x_dtype, ScalarType? bias_dtype)"
        " -> (Tensor, Tensor, Tensor)",
        fake=_fake_backward,
        flops=_no_flops,
        bytes_moved=_bytes_moved_backward,
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    backends={"native": None, "triton": "simmim_fast.ops.bias_gelu.kernels"},
)
