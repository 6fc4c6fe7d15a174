"""Operators of masked_l1_loss: schemas, fakes, autograd, cost. The formulas are derived in README.md.

Shapes: prediction, target and sign (B, channels, H, W); mask (B, H / patch, W / patch) bool; mean and std (channels);
loss and scale (). The forward keeps the sign of the residual where masked, 0 elsewhere, as int8, and the factor `scale`
of the loss: they are all that the backward reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simmim_fast.ops._registration import Direction, define_op
from simmim_fast.ops.masked_l1_loss import reference

# Rows (of one channel of one image) whose residuals are added up before their sums are.
CHUNK_ROWS = 16


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the loss for predictions of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def chunk_count(prediction: Tensor) -> int:
    """Partial sums of the forward: a float64 and an int64 each."""
    return -(-prediction.shape[0] * prediction.shape[1] * prediction.shape[2] // CHUNK_ROWS)


def _reference(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    patch_size: int,
    keep_sign: bool,
) -> tuple[Tensor]:
    return (reference.masked_l1_loss(prediction, target, mask, patch_size, mean=mean, std=std),)


def _fake(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    patch_size: int,
    keep_sign: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, scale = (prediction.new_empty((), dtype=loss_dtype(prediction.dtype)) for _ in range(2))
    return loss, prediction.new_empty(prediction.shape if keep_sign else (0,), dtype=torch.int8), scale


def _fake_backward(grad_loss: Tensor, sign: Tensor, scale: Tensor, prediction_dtype: torch.dtype) -> Tensor:
    return sign.new_empty(sign.shape, dtype=prediction_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, sign, scale = output
    ctx.mark_non_differentiable(sign, scale)
    ctx.save_for_backward(sign, scale)
    ctx.prediction_dtype = inputs[0].dtype


def _gradients(ctx: Any, backward: Callable, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    return backward(grad_loss, *ctx.saved_tensors, ctx.prediction_dtype), *[None] * 6


def _no_flops(*args: Any) -> int:
    return 0


def _bytes_moved(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    patch_size: int,
    keep_sign: bool,
) -> tuple[int, int]:
    """All pixels count as read, though the kernels leave out the visible ones. Partial sums: written and read once."""
    partial = 16 * chunk_count(prediction)
    read = prediction.nbytes + target.nbytes + mask.nbytes + sum(t.nbytes for t in (mean, std) if t is not None)
    scalars = 2 * loss_dtype(prediction.dtype).itemsize
    return read + partial, partial + scalars + (prediction.numel() if keep_sign else 0)


def _bytes_moved_backward(
    grad_loss: Tensor, sign: Tensor, scale: Tensor, prediction_dtype: torch.dtype
) -> tuple[int, int]:
    return grad_loss.nbytes + sign.nbytes + scale.nbytes, sign.numel() * prediction_dtype.itemsize


OP = define_op(
    "masked_l1_loss",
    reference=_reference,
    forward=Direction(
        schema="(Tensor prediction, Tensor target, Tensor mask, Tensor? mean, Tensor? std, int patch_size,"
        " bool keep_sign) -> (Tensor, Tensor, Tensor)",
        fake=_fake,
        flops=_no_flops,
        bytes_moved=_bytes_moved,
    ),
    backward=Direction(
        schema="(Tensor grad_loss, Tensor sign, Tensor scale, ScalarType prediction_dtype) -> Tensor",
        fake=_fake_backward,
        flops=_no_flops,
        bytes_moved=_bytes_moved_backward,
    ),
    setup_context=_setup_context,
    gradients=_gradients,
    backends={"native": None, "triton": "simmim_fast.ops.masked_l1_loss.kernels"},
    native_devices=("cpu", "cuda"),
)
