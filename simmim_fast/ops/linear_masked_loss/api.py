"""The public function: checks, choice of backend, call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simmim_fast._backends import choose
from simmim_fast.ops._checks import (
    check_device,
    check_float,
    check_indices,
    check_pixel_mask,
    check_pixels,
    check_shape,
)
from simmim_fast.ops.linear_masked_loss.op import LOSSES, OP
from simmim_fast.ops.linear_masked_loss.reference import are_masked_tokens


def linear_masked_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    patch_size: int,
    loss: str = "l1",
    tokens: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Predict an image by a linear layer, and take the loss over masked pixels (arXiv 2111.09886, sections 3.3, 3.4).

        sum over masked pixels of |PixelShuffle(features W' + b) - target| / (masked pixels + 1e-5) / channels

    The official code (models/simmim.py) predicts the whole image and multiplies by the mask; here only what the loss
    reads is predicted, and it is never stored at full resolution. Visible pixels are not read, so that a NaN there is
    dropped.

    Args:
        features: (B, h, w, D), float64, float32, bfloat16 or float16, any strides.
        weight: (s^2 channels, D), the 1 x 1 head, in the features' dtype; output c s^2 + i s + j is pixel (i, j) of
            channel c under a token.
        bias: (s^2 channels), in the features' dtype.
        target: (B, channels, h s, w s), a floating dtype of its own, or uint8 with `mean` and `std`: then each pixel is
            (target / 255 - mean) / std.
        mask: (B, h s / patch, w s / patch), bool or integer: non-zero where hidden. Finer or coarser than s.
        patch_size: Pixels along the side of a mask entry.
        loss: "l1", "l2" (squared error) or "smooth_l1" (with beta 1).
        tokens: (B, K) integer, ascending: every token with a masked pixel, as `masking.token_index` lists them. The
            head then computes these alone. Wrong ones are an error on the CPU and a NaN loss on CUDA, which is not
            synchronised. Without it the CPU finds them in the mask, and CUDA computes all tokens.
        mean: (channels), floating: mean per channel of pixels in [0, 1]; for uint8 targets, and only there.
        std: (channels), floating: standard deviation likewise.
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back.

    Returns:
        Scalar: float32, or float64 for float64 features. 0 where nothing is masked.

    Raises:
        TypeError: A tensor is none, or of the wrong dtype; float masks are refused; patch_size is no integer.
        ValueError: Shapes or devices disagree, wrong tokens on the CPU, the target, mean or std asks for a gradient, or
            the loss or backend is unknown.
        RuntimeError: The named backend cannot run; the message says why.

    Numerics:
        Features, weight and bias take autocast's dtype under autocast, as in a linear layer. The prediction stays in
        float32 (float64 for float64), where a linear layer rounds it to the features' dtype. All sums are in a fixed
        order. The slope of L1 is sign(residual), 0 where the residual is 0.
    """
    check_float(features=features, weight=weight, bias=bias)
    check_pixels("target", target, mean, std)
    _check_shapes(features, weight, bias, target)
    check_pixel_mask(mask, "target", target, patch_size)
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    if tokens is not None:
        tokens = check_indices("tokens", tokens, features.shape[0], features.shape[1] * features.shape[2], "h w")
    others = {"bias": bias, "target": target, "mask": mask, "tokens": tokens, "mean": mean, "std": std}
    check_device("features", features, weight=weight, **others)
    features, weight, bias = _operands(features, weight, bias)
    backend = choose(OP, backend, features.device, features.dtype)
    mask = mask.bool()
    if type(tokens) is Tensor and tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_listed(tokens, mask, patch_size, math.isqrt(weight.shape[0] // target.shape[1]))
    keep_slope = torch.is_grad_enabled() and any(t.requires_grad for t in (features, weight, bias))
    arguments = (features, weight, bias, target, mask, tokens, mean, std, patch_size, LOSSES.index(loss), keep_slope)
    return OP.implementations[backend](*arguments)[0]


def _check_shapes(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> None:
    if features.ndim != 4:
        raise ValueError(f"features must have 4 dimensions (B, h, w, D); got shape {tuple(features.shape)}")
    if target.ndim != 4:
        raise ValueError(f"target must have 4 dimensions (B, channels, H, W); got shape {tuple(target.shape)}")
    batch, height, width, depth = features.shape
    channels = target.shape[1]
    if weight.ndim != 2 or channels == 0 or weight.shape[0] == 0 or weight.shape[0] % channels:
        raise ValueError(
            f"weight must have shape (s^2 channels, D) with {channels} channels; got {tuple(weight.shape)}"
        )
    stride = math.isqrt(weight.shape[0] // channels)
    check_shape("weight", weight, (stride**2 * channels, depth), "(s^2 channels, D)")
    check_shape("bias", bias, weight.shape[:1], "(s^2 channels)")
    check_shape("target", target, (batch, channels, height * stride, width * stride), "(B, channels, h s, w s)")


def _check_listed(tokens: Tensor, mask: Tensor, patch_size: int, stride: int) -> None:
    if not are_masked_tokens(tokens, mask, patch_size, stride):
        raise ValueError(
            "tokens must list, in ascending order, every token with a masked pixel;"
            f" got {tokens.shape[1]} tokens an image that do not fit the mask"
        )


def _operands(features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in autocast's dtype under autocast; otherwise they must share one."""
    device_type = features.device.type
    if torch.is_autocast_enabled(device_type) and features.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return features.to(dtype), weight.to(dtype), bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype != features.dtype:
            raise TypeError(f"{name} must have the dtype of features, {features.dtype}; got {tensor.dtype}")
    return features, weight, bias
