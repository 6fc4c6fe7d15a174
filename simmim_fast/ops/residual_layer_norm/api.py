"""The public function: checks, choice of backend, call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from simmim_fast._backends import choose
from simmim_fast.ops._checks import (
    check_channels_last,
    check_device,
    check_float,
    check_number,
    check_optional_float,
    check_shape,
)
from simmim_fast.ops.residual_layer_norm.op import OP, size_refusal
from simmim_fast.ops.residual_layer_norm.reference import norm_dtype, stream_dtype


def residual_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    delta_bias: Tensor | None = None,
    norm: str = "output",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise, in one pass per direction.

        norm="output":  y = x + keep gamma (delta + delta_bias), LN(y)     (a Swin or ViT block, up to the next product)
        norm="delta":   x + keep LN(delta + delta_bias)                    (Swin V2, arXiv 2111.09883, section 3.2)

    Stochastic depth (arXiv 1603.09382), layer scale (arXiv 2103.17239), the addition and the LayerNorm of the official
    models/swin_transformer.py, vision_transformer.py and swin_transformer_v2.py.

    Args:
        x: (B, ..., C), float64, float32, bfloat16 or float16, any strides: the residual stream.
        delta: (B, ..., C), a floating dtype of its own: what the branch yields. None with "output" for the first norm
            of a stage: y is then x itself.
        weight: (C), a floating dtype of its own: the factor of the LayerNorm.
        bias: (C), likewise: its offset.
        eps: What the LayerNorm adds to the variance.
        gamma: (C), a floating dtype of its own: layer scale of the branch, with "output" alone, or None.
        keep: (B), a floating dtype of its own: 0 for the samples whose branch is dropped, 1 / (1 - p) for the others,
            or None. It gets no gradient.
        delta_bias: (C), a floating dtype of its own: the bias of the product that yields delta, or None.
        norm: "output" or "delta".
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back. "auto" passes over a
            backend that does not take this size.

    Returns:
        "output": y and LN(y); "delta": the sum. Contiguous, but for a y that is x. y and the sum have the dtype that x
        and delta promote to, whatever gamma's. LN(y) has delta's dtype (x's where delta is None), but for a float32 one
        under autocast: then the autocast dtype, in which the next product takes it.

    Raises:
        TypeError: A tensor is none, or of the wrong dtype; eps is no number.
        ValueError: Shapes or devices disagree, keep asks for a gradient, a tensor is given where it has no meaning or
            missing where it has, or norm or backend is unknown.
        RuntimeError: The named backend cannot run; the message says why.

    Numerics:
        Computed in float32 (float64 where y is float64), y and LN rounded once each; LN is of y as it is rounded. The
        gradients of the parameters accumulate in a fixed order, so that they repeat bit for bit.
    """
    parameters = {"weight": weight, "bias": bias, "gamma": gamma, "delta_bias": delta_bias}
    _check_tensors(x, delta, keep, parameters)
    _check_form(delta, gamma, keep, delta_bias, norm)
    check_number("eps", eps)
    check_device("x", x, delta=delta, keep=keep, **parameters)
    refusal = partial(size_refusal, channels=x.shape[-1])
    backend = choose(OP, backend, x.device, stream_dtype(x, delta), refusal)
    y, normed, *_ = OP.implementations[backend](
        x, delta, weight, bias, gamma, keep, delta_bias, float(eps), norm == "delta", norm_dtype(x, delta)
    )
    if norm == "delta":
        return y
    return (x if delta is None else y), normed


def _check_tensors(
    x: Tensor, delta: Tensor | None, keep: Tensor | None, parameters: Mapping[str, Tensor | None]
) -> None:
    check_float(x=x, weight=parameters["weight"], bias=parameters["bias"])
    check_optional_float(delta=delta, keep=keep, gamma=parameters["gamma"], delta_bias=parameters["delta_bias"])
    check_channels_last("x", x)
    if delta is not None:
        check_shape("delta", delta, x.shape, "of x")
    for name, tensor in parameters.items():
        if tensor is not None:
            check_shape(name, tensor, x.shape[-1:], "(C)")
    if keep is None:
        return
    if x.ndim < 2:
        raise ValueError(f"keep must be None where x has no batch axis; x has shape {tuple(x.shape)}")
    check_shape("keep", keep, x.shape[:1], "(B)")
    if keep.requires_grad and torch.is_grad_enabled():
        raise ValueError("keep must not require a gradient: it gets none; detach it")


def _check_form(
    delta: Tensor | None, gamma: Tensor | None, keep: Tensor | None, delta_bias: Tensor | None, norm: str
) -> None:
    if norm not in ("output", "delta"):
        raise ValueError(f"norm must be 'output' or 'delta'; got {norm!r}")
    if norm == "delta" and delta is None:
        raise ValueError("delta must be given with norm='delta', which normalises it; got None")
    if norm == "delta" and gamma is not None:
        raise ValueError("gamma must be None with norm='delta', whose weight does the same")
    for name, tensor in (("gamma", gamma), ("keep", keep), ("delta_bias", delta_bias)):
        if delta is None and tensor is not None:
            raise ValueError(f"{name} must be None where delta is None: there is no branch for it")
