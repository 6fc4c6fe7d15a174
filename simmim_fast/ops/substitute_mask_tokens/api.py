"""The public function: checks, choice of backend, call."""

from __future__ import annotations

from torch import Tensor

from simmim_fast._backends import choose
from simmim_fast.ops._checks import check_device, check_float, check_mask, check_optional_float, check_shape
from simmim_fast.ops.substitute_mask_tokens.op import OP


def substitute_mask_tokens(
    x: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Put the mask token where the mask is set, then add the position embedding (arXiv 2111.09886, section 3.1).

        where(mask, mask_token, x) + pos_embed

    A selection where the official code (models/simmim.py) blends, x (1 - w) + token w: equal for finite x, but what
    lies under the mask is dropped here even if it is NaN or infinite.

    Args:
        x: (B, H, W, C), float64, float32, bfloat16 or float16, any strides.
        mask: (B, H, W), bool or integer: non-zero where hidden.
        mask_token: (C), a floating dtype of its own.
        pos_embed: (H, W, C), a floating dtype of its own, or None.
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back.

    Returns:
        (B, H, W, C) in the dtype that x, token and positions promote to, under autocast as without; contiguous, except
        that the reference keeps x's strides.

    Raises:
        TypeError: A tensor is none, or of the wrong dtype; float masks are refused.
        ValueError: Shapes or devices disagree; the backend is unknown.
        RuntimeError: The named backend cannot run; the message says why.

    Numerics:
        The output and the gradient of x are exact, each rounded once to its dtype. The gradients of token and positions
        accumulate in float32 (float64 for float64) in a fixed order, so that they repeat bit for bit.
    """
    check_float(x=x, mask_token=mask_token)
    check_optional_float(pos_embed=pos_embed)
    check_mask(mask)
    if x.ndim != 4:
        raise ValueError(f"x must have 4 dimensions (B, H, W, C); got shape {tuple(x.shape)}")
    check_shape("mask", mask, x.shape[:3], "(B, H, W)")
    check_shape("mask_token", mask_token, x.shape[3:], "(C)")
    if pos_embed is not None:
        check_shape("pos_embed", pos_embed, x.shape[1:], "(H, W, C)")
    check_device("x", x, mask=mask, mask_token=mask_token, pos_embed=pos_embed)
    backend = choose(OP, backend, x.device, x.dtype)
    return OP.implementations[backend](x, mask.bool(), mask_token, pos_embed)
