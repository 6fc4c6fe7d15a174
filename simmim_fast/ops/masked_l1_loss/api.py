"""The public function: checks, choice of backend, call."""

from __future__ import annotations

import torch
from torch import Tensor

from simmim_fast._backends import choose
from simmim_fast.ops._checks import check_device, check_float, check_pixel_mask, check_pixels, check_shape
from simmim_fast.ops.masked_l1_loss.op import OP


def masked_l1_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    patch_size: int,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean absolute error over the masked pixels (arXiv 2111.09886, section 3.4; official models/simmim.py).

        sum over masked pixels and channels of |prediction - target| / (masked pixels + 1e-5) / channels

    The official code multiplies by the mask and adds up; here visible pixels are not read, so that a NaN there is
    dropped.

    Args:
        prediction: (B, channels, H, W), float64, float32, bfloat16 or float16, any strides.
        target: (B, channels, H, W), a floating dtype of its own, or uint8 with `mean` and `std`: then each pixel is
            (target / 255 - mean) / std.
        mask: (B, H / patch, W / patch), bool or integer: non-zero where hidden.
        patch_size: Pixels along the side of a mask entry.
        mean: (channels), floating: mean per channel of pixels in [0, 1]; for uint8 targets, and only there.
        std: (channels), floating: standard deviation likewise.
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back.

    Returns:
        Scalar: float32, or float64 for float64 predictions, under autocast as without. 0 where nothing is masked.

    Raises:
        TypeError: A tensor is none, or of the wrong dtype; float masks are refused; patch_size is no integer.
        ValueError: Shapes or devices disagree, the target, mean or std asks for a gradient, or the backend is unknown.
        RuntimeError: The named backend cannot run; the message says why.

    Numerics:
        Residuals are in the loss's dtype and added up in a fixed order, so that the loss repeats bit for bit. The
        gradient is sign(residual) over the denominator: 0 where the residual is 0.
    """
    check_float(prediction=prediction)
    check_pixels("target", target, mean, std)
    if prediction.ndim != 4:
        raise ValueError(f"prediction must have 4 dimensions (B, channels, H, W); got shape {tuple(prediction.shape)}")
    check_shape("target", target, prediction.shape, "(B, channels, H, W)")
    check_pixel_mask(mask, "target", target, patch_size)
    check_device("prediction", prediction, target=target, mask=mask, mean=mean, std=std)
    backend = choose(OP, backend, prediction.device, prediction.dtype)
    keep_sign = torch.is_grad_enabled() and prediction.requires_grad
    return OP.implementations[backend](prediction, target, mask.bool(), mean, std, patch_size, keep_sign)[0]
