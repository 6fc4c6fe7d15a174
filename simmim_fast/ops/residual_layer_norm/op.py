"""Operators of residual_layer_norm: schemas, fakes, autograd, cost. The formulas are derived in README.md.

Shapes: x, delta, y and the norm (B, ..., C); weight, bias, gamma, delta_bias (C); keep (B); mean, rstd (B, ...). Rows
are the positions of all axes but the last. The source is what is normalised: y, or x without a delta, or delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simmim_fast.ops._registration import Direction, define_op, unrounded_nbytes
from simmim_fast.ops.residual_layer_norm import reference
from simmim_fast.ops.residual_layer_norm.reference import stream_dtype

MAX_CHANNELS = 4096  # that a Triton program holds
DIFFERENTIABLE = (0, 1, 2, 3, 4, 6)  # of the forward's arguments; the backward's gradients come in this order


def size_refusal(backend: str, *, channels: int) -> str | None:
    """Why the kernels of a backend do not take so many channels; None where they do."""
    if backend == "triton" and channels > MAX_CHANNELS:
        return f"it takes at most {MAX_CHANNELS} channels; got {channels}"
    return None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums over tensors of `dtype` accumulate."""
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(channels: int) -> int:
    """Rows whose gradients of the parameters one program adds up."""
    return next(rows for rows in (128, 64, 32) if rows == 32 or rows * channels <= 32768)


def partial_shape(source: Tensor) -> tuple[int, int]:
    """Shape of the partial sums of a parameter's gradient; the first axis is the one to sum over."""
    channels = source.shape[-1]
    return -(-math.prod(source.shape[:-1]) // chunk_rows(channels)), channels


def _reference(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    delta_bias: Tensor | None,
    eps: float,
    norms_delta: bool,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    norm = "delta" if norms_delta else "output"
    result = reference.residual_layer_norm(
        x, delta, weight, bias, eps, gamma=gamma, keep=keep, delta_bias=delta_bias, norm=norm
    )
    return (result, None) if norms_delta else result


def _fake(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    delta_bias: Tensor | None,
    eps: float,
    norms_delta: bool,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream, where there is a delta, the norm, where it is a result, and mean and 1 / deviation of the source."""
    dtype = stream_dtype(x, delta)
    statistics = (x.new_empty(x.shape[:-1], dtype=sum_dtype(dtype)) for _ in range(2))
    return (
        x.new_empty(0 if delta is None else x.shape, dtype=dtype),
        x.new_empty(0 if norms_delta else x.shape, dtype=norm_dtype),
        *statistics,
    )


def _fake_backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    source: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    delta_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norms_delta: bool,
    adds_delta: bool,
    *gradient_dtypes: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """Gradients of x, delta and the four parameters, and, where bias is given, the norm again; empty if not wanted.

    With `adds_delta` the source is x, and delta is added to it as in the forward.
    """
    shapes = (source.shape, source.shape, *[weight.shape] * 4, source.shape)
    dtypes = (*gradient_dtypes, None if bias is None else grad_normed.dtype)
    return tuple(
        source.new_empty(0) if dtype is None else source.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, delta, weight, _, gamma, keep, delta_bias, _, ctx.norms_delta, ctx.norm_dtype = inputs
    stream, _, mean, rstd = output
    dtypes = [inputs[i].dtype if ctx.needs_input_grad[i] else None for i in DIFFERENTIABLE]
    ctx.x_dtype, ctx.delta_dtype, *ctx.parameter_dtypes = dtypes
    ctx.has_delta, ctx.scales = delta is not None, gamma is not None or keep is not None
    source = delta if ctx.norms_delta else x if delta is None else stream
    added, added_bias = (
        (delta, delta_bias) if ctx.needs_input_grad[4] else (None, delta_bias if ctx.norms_delta else None)
    )
    ctx.save_for_backward(source, added, weight, None, gamma, keep, added_bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # a gradient that is not there is not read


def _gradients(
    ctx: Any, backward: Callable, grad_stream: Tensor | None, grad_normed: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad_stream is None and grad_normed is None:
        return (None,) * 10
    kept, dtypes = ctx.saved_tensors, (ctx.x_dtype, ctx.delta_dtype, *ctx.parameter_dtypes)
    if ctx.norms_delta:
        grad_x = None if ctx.x_dtype is None else grad_stream.to(ctx.x_dtype)  # most often the tensor itself
        return _in_order(grad_x, *_wanted(backward, grad_stream, None, kept, True, (None, *dtypes[1:]))[1:])
    if grad_normed is None:
        grad_normed = kept[0].new_zeros(kept[0].shape, dtype=ctx.norm_dtype)
    if not ctx.has_delta:
        grad_stream = None
    if ctx.scales or ctx.x_dtype != ctx.delta_dtype:
        return _in_order(*_wanted(backward, grad_normed, grad_stream, kept, False, dtypes))
    gradients = _wanted(backward, grad_normed, grad_stream, kept, False, (dtypes[0], None, *dtypes[2:]))
    return _in_order(gradients[0], gradients[0], *gradients[2:])  # x and delta get one tensor, as those of a sum


def _in_order(
    grad_x: Tensor | None, grad_delta: Tensor | None, *parameters: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients as the forward's arguments come, of which `keep` and the last three have none."""
    *norm_and_gamma, grad_delta_bias = parameters
    return grad_x, grad_delta, *norm_and_gamma, None, grad_delta_bias, None, None, None


def _wanted(
    backward: Callable,
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    kept: tuple[Tensor | None, ...],
    norms_delta: bool,
    dtypes: tuple[torch.dtype | None, ...],
) -> list[Tensor | None]:
    """The backward operator's gradients, None where they have no dtype."""
    *gradients, _ = backward(grad_normed, grad_stream, *kept, norms_delta, False, *dtypes)
    return [None if dtype is None else gradient for gradient, dtype in zip(gradients, dtypes, strict=True)]


def _no_flops(*args: Any) -> int:
    return 0


def _nbytes(*tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _bytes_moved(*args: Any) -> tuple[int, int]:
    tensors = (tensor.to("meta") if isinstance(tensor, Tensor) else tensor for tensor in args)
    return _nbytes(*args), _nbytes(*_fake(*tensors))


def _bytes_moved_backward(*args: Any) -> tuple[int, int]:
    """The partial sums are written once and read once, and so are their sums where these are rounded."""
    source, mean, parameter_dtypes = args[2], args[9], args[15:]
    tensors = (tensor.to("meta") if isinstance(tensor, Tensor) else tensor for tensor in args)
    results = _fake_backward(*tensors)
    partials = math.prod(partial_shape(source)) * sum(dtype is not None for dtype in parameter_dtypes)
    workspace = partials * mean.itemsize + unrounded_nbytes(mean.dtype, *results[2:6])
    return _nbytes(*args) + workspace, workspace + _nbytes(*results)


OP = define_op(
    "residual_layer_norm",
    reference=_reference,
    forward=Direction(
        schema="(Tensor x, Tensor? delta, Tensor weight, Tensor bias, Tensor? gamma, Tensor? keep, Tensor? delta_bias,"
        " float eps, bool norms_delta, ScalarType norm_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
        fake=_fake,
        flops=_no_flops,
        bytes_moved=_bytes_moved,
    ),
    backward=Direction(
        schema="(Tensor grad_normed, Tensor? grad_stream, Tensor source, Tensor? delta, Tensor weight, Tensor? bias,"
        " Tensor? gamma, Tensor? keep, Tensor? delta_bias, Tensor mean, Tensor rstd, bool norms_delta, bool adds_delta,"
        " ScalarType? x_dtype, ScalarType? delta_dtype, ScalarType? weight_dtype, ScalarType? bias_dtype,"
        " ScalarType? gamma_dtype, ScalarType? delta_bias_dtype)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        fake=_fake_backward,
        flops=_no_flops,
        bytes_moved=_bytes_moved_backward,
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    backends={"native": None, "triton": "simmim_fast.ops.residual_layer_norm.kernels"},
)
