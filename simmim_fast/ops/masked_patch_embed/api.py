"""The public function: checks, choice of backend, call."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from simmim_fast._backends import choose
from simmim_fast.ops._checks import (
    check_device,
    check_float,
    check_indices,
    check_number,
    check_optional_float,
    check_pixel_mask,
    check_pixels,
    check_shape,
)
from simmim_fast.ops.masked_patch_embed.op import OP, size_refusal
from simmim_fast.ops.masked_patch_embed.reference import compute_dtype, output_dtype


def masked_patch_embed(
    image: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask_token: Tensor,
    pos_embed: Tensor | None = None,
    *,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    visible: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Embed the visible patches of an image, mask tokens in the place of the others (arXiv 2111.09886, section 3.1).

        where(mask, mask_token, norm(weight patch + bias)) + pos_embed

    What the official models/simmim.py does in a strided convolution, a LayerNorm, a blend and an addition. Hidden
    patches are dropped before they are computed: what lies there, NaN included, reaches neither output nor gradients.

    Args:
        image: (B, channels, H, W), float64, float32, bfloat16 or float16, any strides, or uint8 with `mean` and `std`:
            then each pixel is (image / 255 - mean) / std. It gets no gradient.
        mask: (B, H / p, W / p), bool or integer: non-zero where hidden.
        weight: (C, channels, p, p), a floating dtype, as nn.Conv2d holds it.
        bias: (C), a floating dtype of its own.
        norm_weight: (C), a floating dtype of its own: the factor of a LayerNorm. None for no norm.
        norm_bias: (C), likewise: its offset.
        mask_token: (C), a floating dtype of its own.
        pos_embed: (H / p, W / p, C), a floating dtype of its own, or None.
        eps: What the LayerNorm adds to the variance.
        mean: (channels), floating: mean per channel of pixels in [0, 1]; for uint8 images, and only there.
        std: (channels), floating: standard deviation likewise.
        visible: (B, K) integer: the distinct flat patches y W / p + x to embed, where the caller knows them, so that a
            GPU computes no others. Each patch that is not hidden must be among them: one that is missing is an error
            on the CPU, and NaN in its row on CUDA.
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back. "auto" passes over a
            backend that does not take this size.

    Returns:
        (B, H / p, W / p, C), contiguous. Dtype: what the embedding, the mask token and the positions promote to; the
        embedding has the dtype that image and weight promote to (uint8: the weight's). Under autocast it has the
        autocast dtype, but float32 after a norm on CUDA: as for conv2d, layer_norm and where one after the other.

    Raises:
        TypeError: A tensor is none, or of the wrong dtype; float masks are refused; eps is no number.
        ValueError: Shapes or devices disagree, image, mean or std asks for a gradient, only one of the norm's
            parameters is given, `visible` misses a patch (on the CPU), or the backend is unknown.
        RuntimeError: The named backend cannot run; the message says why.

    Numerics:
        Products take operands in the embedding's dtype (under autocast, the autocast dtype) or a wider one; sums, norm
        and positions are in float32 (float64 for float64), rounded once at the end. Gradients of parameters add up in a
        fixed order, so that they repeat bit for bit.
    """
    _check_parameters(weight, bias, norm_weight, norm_bias, mask_token)
    _check_image(image, mean, std, weight)
    check_pixel_mask(mask, "image", image, weight.shape[3])
    check_optional_float(pos_embed=pos_embed)
    check_number("eps", eps)
    if pos_embed is not None:
        check_shape("pos_embed", pos_embed, (*mask.shape[1:], weight.shape[0]), "(H / p, W / p, C)")
    if visible is not None:
        visible = check_indices("visible", visible, mask.shape[0], mask.shape[1] * mask.shape[2], "(H / p)(W / p)")
    parameters = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias, "mask_token": mask_token}
    others = {"mask": mask, "weight": weight, "pos_embed": pos_embed, "mean": mean, "std": std, "visible": visible}
    check_device("image", image, **others, **parameters)
    compute = compute_dtype(image, weight)
    refusal = partial(size_refusal, channels=weight.shape[0], norm=norm_weight is not None)
    backend = choose(OP, backend, image.device, compute, refusal)
    output = output_dtype(image, weight, norm_weight, mask_token, pos_embed)
    optional = (pos_embed, mean, std, visible)
    return OP.implementations[backend](
        image, mask.bool(), weight, *parameters.values(), *optional, float(eps), compute, output
    )


def _check_image(image: Tensor, mean: Tensor | None, std: Tensor | None, weight: Tensor) -> None:
    check_pixels("image", image, mean, std)
    if image.ndim != 4:
        raise ValueError(f"image must have 4 dimensions (B, channels, H, W); got shape {tuple(image.shape)}")
    channels = weight.shape[1]
    if image.shape[1] != channels:
        raise ValueError(f"image must have as many channels as weight, {channels}; got shape {tuple(image.shape)}")


def _check_parameters(
    weight: Tensor, bias: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, mask_token: Tensor
) -> None:
    check_float(weight=weight, bias=bias, mask_token=mask_token)
    check_optional_float(norm_weight=norm_weight, norm_bias=norm_bias)
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or 0 in weight.shape:
        raise ValueError(f"weight must have shape (C, channels, p, p), none of them 0; got {tuple(weight.shape)}")
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing} must be given where the norm's other parameter is; got None")
    for name, tensor in (
        ("bias", bias),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
        ("mask_token", mask_token),
    ):
        if tensor is not None:
            check_shape(name, tensor, weight.shape[:1], "(C)")
