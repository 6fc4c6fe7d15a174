"""The public function: checks, choice of backend, call."""

from __future__ import annotations

from torch import Tensor

from simmim_fast._backends import choose
from simmim_fast.ops._checks import check_channels_last, check_device, check_float, check_shape
from simmim_fast.ops.bias_gelu.op import OP


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Add a bias and apply the exact GELU (arXiv 1606.08415) in one pass: z Phi(z) with z = x + bias.

    What follows the product of an MLP's first layer (Mlp in the official models/swin_transformer.py), whose bias and
    activation are these. Phi is the normal distribution function by erf, not an approximation by tanh.

    Args:
        x: (..., C), float64, float32, bfloat16 or float16, any strides: the layer's product without its bias.
        bias: (C), a floating dtype of its own.
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back.

    Returns:
        (..., C) in x's dtype, under autocast as without; contiguous, except that the reference keeps x's strides.

    Raises:
        TypeError: A tensor is none, or of the wrong dtype.
        ValueError: Shapes or devices disagree; the backend is unknown.
        RuntimeError: The named backend cannot run; the message says why.

    Numerics:
        Computed in float32 (float64 where x is float64) and rounded once. The backward recomputes from x and bias; the
        gradient of the bias adds up what has not been rounded, in a fixed order, so that it repeats bit for bit.
    """
    check_float(x=x, bias=bias)
    check_channels_last("x", x)
    check_shape("bias", bias, x.shape[-1:], "(C)")
    check_device("x", x, bias=bias)
    backend = choose(OP, backend, x.device, x.dtype)
    return OP.implementations[backend](x, bias)
