"""Random arguments for the ops, by name, one function an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor


def substitute_mask_tokens_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    *,
    pos_embed: bool = True,
    hidden: float = 0.6,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Arguments of `ops.substitute_mask_tokens` by name.

    Args:
        shape: (B, H, W, C) of x.
        dtype: Of x.
        parameter_dtype: Of the mask token and the positions; x's by default.
        pos_embed: With positions or with None.
        hidden: Share of the tokens that the mask hides; 0 and 1 are exact.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = parameter_dtype or dtype
    return {
        "x": random_tensor(shape, dtype, generator).to(device),
        "mask": (torch.rand(shape[:3], generator=generator) < hidden).to(device),
        "mask_token": random_tensor(shape[3:], parameter_dtype, generator).to(device),
        "pos_embed": random_tensor(shape[1:], parameter_dtype, generator).to(device) if pos_embed else None,
    }


def bias_gelu_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of `ops.bias_gelu` by name.

    Args:
        shape: (..., C) of x.
        dtype: Of x.
        parameter_dtype: Of the bias; x's by default.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": random_tensor(shape, dtype, generator).to(device),
        "bias": random_tensor(shape[-1:], parameter_dtype or dtype, generator).to(device),
    }


def biased_attention_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    *,
    bias: bool = True,
    queries: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.biased_attention` by name.

    Args:
        shape: (B, N, heads, D).
        dtype: Of qkv.
        parameter_dtype: Of the bias; qkv's by default.
        bias: With a bias or with None.
        queries: Distinct tokens of each image whose outputs are wanted, in random order; None for all.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    images, tokens, heads, head_size = shape
    arguments = {
        "qkv": random_tensor((images, tokens, 3 * heads * head_size), dtype, generator).to(device),
        "bias": random_tensor((heads, tokens, tokens), parameter_dtype or dtype, generator).to(device)
        if bias
        else None,
        "num_heads": heads,
    }
    if queries is not None:
        order = torch.rand((images, tokens), generator=generator).argsort(dim=1)
        arguments["queries"] = order[:, :queries].int().to(device)
    return arguments


def shifted_window_attention_inputs(
    shape: tuple[int, int, int, int, int],
    window_size: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    *,
    cosine: bool = False,
    pad_value: bool = True,
    queries: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.shifted_window_attention` by name.

    Args:
        shape: (B, H, W, heads, D).
        window_size: Height and width of a window.
        shift: Rows and columns of the roll.
        dtype: Of qkv.
        parameter_dtype: Of table, logit scale and padding value; qkv's by default.
        cosine: With a logit scale or with None.
        pad_value: With a padding value, where the window does not divide the grid, or with None.
        queries: Distinct tokens of each image whose outputs are wanted, in random order; None for all.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = parameter_dtype or dtype
    images, height, width, heads, head_size = shape
    pad_value = pad_value and (height % window_size[0] != 0 or width % window_size[1] != 0)
    channels = 3 * heads * head_size
    offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
    order = torch.rand((images, height * width), generator=generator).argsort(dim=1)
    logit_scale = 2 + random_tensor((heads,), parameter_dtype, generator)
    return {
        "qkv": random_tensor((images, height, width, channels), dtype, generator).to(device),
        "bias_table": random_tensor((offsets, heads), parameter_dtype, generator).to(device),
        "window_size": window_size,
        "shift": shift,
        "num_heads": heads,
        "logit_scale": logit_scale.to(device) if cosine else None,
        "pad_value": random_tensor((channels,), parameter_dtype, generator).to(device) if pad_value else None,
        "queries": None if queries is None else order[:, :queries].int().to(device),
    }


def residual_layer_norm_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    delta_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
    *,
    delta: bool = True,
    gamma: bool = True,
    keep: bool = True,
    delta_bias: bool = False,
    norm: str = "output",
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.residual_layer_norm` by name.

    Args:
        shape: (B, ..., C) of x.
        dtype: Of x.
        delta_dtype: Of delta; x's by default.
        parameter_dtype: Of weight, bias, gamma, keep and delta_bias; x's by default.
        delta: With a delta, or with None and neither gamma, keep nor delta_bias.
        gamma: With layer scale, where `norm` is "output", or with None.
        keep: With factors of the samples, about a third of them 0, or with None.
        delta_bias: With a bias of delta, or with None.
        norm: What is normalised.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    delta_dtype, parameter_dtype = delta_dtype or dtype, parameter_dtype or dtype
    channels = shape[-1:]
    kept = (torch.rand(shape[0], generator=generator) < 0.7) / 0.7
    return {
        "x": random_tensor(shape, dtype, generator).to(device),
        "delta": random_tensor(shape, delta_dtype, generator).to(device) if delta else None,
        "weight": random_tensor(channels, parameter_dtype, generator).to(device),
        "bias": random_tensor(channels, parameter_dtype, generator).to(device),
        "gamma": random_tensor(channels, parameter_dtype, generator).to(device)
        if gamma and delta and norm == "output"
        else None,
        "keep": kept.to(device, parameter_dtype) if keep and delta else None,
        "delta_bias": random_tensor(channels, parameter_dtype, generator).to(device) if delta_bias and delta else None,
        "norm": norm,
    }


def masked_patch_embed_inputs(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    *,
    image_dtype: torch.dtype | None = None,
    norm: bool = True,
    pos_embed: bool = True,
    visible: bool = False,
    hidden: float = 0.6,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.masked_patch_embed` by name.

    Args:
        shape: (B, H / p, W / p, channels of the image, p, C).
        dtype: Of the weight.
        parameter_dtype: Of bias, norm, mask token and positions; the weight's by default.
        image_dtype: The weight's by default; uint8 comes with mean and std.
        norm: With a norm or without.
        pos_embed: With positions or with None.
        visible: With the list of visible patches, in random order, or with None.
        hidden: Share of the patches of each image that the mask hides, the same number in every image.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    images, height, width, planes, patch, channels = shape
    image_dtype = image_dtype or dtype
    parameter = partial(random_tensor, dtype=parameter_dtype or dtype, generator=generator)
    image = random_pixels((images, planes, height * patch, width * patch), image_dtype, generator)
    shown, mask = _shown_and_mask(images, height, width, hidden, generator)
    weight = random_tensor((channels, planes, patch, patch), torch.float32, generator) / (planes**0.5 * patch)
    arguments = {
        "image": image,
        "mask": mask,
        "weight": weight.to(dtype),
        "bias": parameter((channels,)),
        "norm_weight": parameter((channels,)) if norm else None,
        "norm_bias": parameter((channels,)) if norm else None,
        "mask_token": parameter((channels,)),
        "pos_embed": parameter((height, width, channels)) if pos_embed else None,
        "mean": torch.rand(planes, generator=generator) if image_dtype == torch.uint8 else None,
        "std": torch.rand(planes, generator=generator) + 0.5 if image_dtype == torch.uint8 else None,
        "visible": shown.int() if visible else None,
    }
    return {name: None if value is None else value.to(device) for name, value in arguments.items()}


def _shown_and_mask(
    images: int, height: int, width: int, hidden: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The patches of each image that are shown, in random order, and a mask (B, height, width) of the others."""
    order = torch.rand((images, height * width), generator=generator).argsort(dim=1)
    shown = order[:, round(hidden * height * width) :]
    mask = torch.ones((images, height * width), dtype=torch.bool).scatter_(1, shown, False)
    return shown, mask.view(images, height, width)


def masked_l1_loss_inputs(
    shape: tuple[int, int, int, int],
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    *,
    hidden: float = 0.6,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.masked_l1_loss` by name. Residuals stay away from 0, where the gradient jumps.

    Args:
        shape: (B, channels, H, W).
        patch_size: Pixels along the side of a mask entry; divides H and W.
        dtype: Of the prediction.
        target_dtype: The prediction's by default; uint8 comes with mean and std.
        hidden: Share of the mask's entries that are set; 0 and 1 are exact.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    prediction = random_tensor(shape, dtype, generator) / 2
    arguments = {"prediction": prediction, "patch_size": patch_size}
    arguments |= _pixels(prediction.double(), patch_size, target_dtype or dtype, hidden, generator)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def linear_masked_loss_inputs(
    shape: tuple[int, int, int, int, int, int],
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    *,
    tokens: bool = False,
    loss: str = "l1",
    hidden: float = 0.6,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ops.linear_masked_loss` by name. Residuals stay away from 0, where the gradient of L1 jumps.

    Args:
        shape: (B, h, w, D, stride, channels).
        patch_size: Pixels along the side of a mask entry; divides h and w times the stride.
        dtype: Of features, weight and bias.
        target_dtype: Theirs by default; uint8 comes with mean and std.
        tokens: With the list of masked tokens, or with None. The mask then hides whole tokens, as many in each image.
        loss: Its name.
        hidden: Share of the mask's entries, or of the tokens, that is hidden.
        device: Where the tensors are; they are drawn on the CPU, so they are the same everywhere.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    images, height, width, depth, stride, channels = shape
    weight = random_tensor((stride**2 * channels, depth), torch.float32, generator) / (2 * max(depth, 1) ** 0.5)
    features = random_tensor((images, height, width, depth), dtype, generator)
    bias = random_tensor((stride**2 * channels,), torch.float32, generator) / 4
    arguments = {"features": features, "weight": weight.to(dtype), "bias": bias.to(dtype), "patch_size": patch_size}
    prediction = features.double() @ weight.to(dtype).double().T + bias.to(dtype).double()
    prediction = prediction.view(images, height, width, channels, stride, stride).permute(0, 3, 1, 4, 2, 5)
    prediction = prediction.reshape(images, channels, height * stride, width * stride)
    arguments |= {"loss": loss} | _pixels(prediction, patch_size, target_dtype or dtype, hidden, generator)
    if tokens:
        order = torch.rand((images, height * width), generator=generator).argsort(dim=1)
        listed = order[:, : round(hidden * height * width)].sort(dim=1).values
        masked = torch.zeros((images, height * width), dtype=torch.bool).scatter_(1, listed, True)
        whole = masked.view(images, height, 1, width, 1).expand(-1, -1, stride, -1, stride)
        whole = whole.reshape(images, height * stride, width * stride)
        arguments |= {"tokens": listed.int(), "mask": whole[:, ::patch_size, ::patch_size]}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


# Sizes beside the batch, as the factories above take them, that cost next to nothing.
_SMALL: dict[str, Callable[..., dict[str, Any]]] = {
    "bias_gelu": lambda batch, **options: bias_gelu_inputs((batch, 3, 4, 8), **options),
    "biased_attention": lambda batch, **options: biased_attention_inputs((batch, 7, 2, 16), **options),
    "linear_masked_loss": lambda batch, **options: linear_masked_loss_inputs((batch, 2, 3, 16, 4, 3), 4, **options),
    "masked_l1_loss": lambda batch, **options: masked_l1_loss_inputs((batch, 3, 8, 12), 4, **options),
    "masked_patch_embed": lambda batch, **options: masked_patch_embed_inputs((batch, 3, 4, 3, 4, 8), **options),
    "residual_layer_norm": lambda batch, **options: residual_layer_norm_inputs((batch, 3, 4, 8), **options),
    "shifted_window_attention": lambda batch, **options: shifted_window_attention_inputs(
        (batch, 4, 6, 2, 32), (2, 3), (1, 1), **options
    ),
    "substitute_mask_tokens": lambda batch, **options: substitute_mask_tokens_inputs((batch, 3, 4, 8), **options),
}
_NOT_DIFFERENTIABLE = ("image", "target", "mean", "std", "keep")


def small_inputs(op: str, batch: int, **options: Any) -> dict[str, Any]:
    """Arguments of any op by name, so few that only the way to the kernel takes time. Options as its own."""
    return _SMALL[op](batch, **options)


def differentiable(inputs: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that get a gradient."""
    floating = (name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point())
    return [name for name in floating if name not in _NOT_DIFFERENTIABLE]


def _pixels(
    prediction: Tensor, patch_size: int, dtype: torch.dtype, hidden: float, generator: torch.Generator
) -> dict[str, Tensor | None]:
    """Target, mask, mean and std for a prediction (B, channels, H, W), from which the target differs by 0.5 to 1.5."""
    images, channels, height, width = prediction.shape
    sign = torch.randint(0, 2, prediction.shape, generator=generator) * 2 - 1
    target = prediction + sign * (0.5 + torch.rand(prediction.shape, generator=generator))
    mask = torch.rand((images, height // patch_size, width // patch_size), generator=generator) < hidden
    if dtype != torch.uint8:
        return {"target": target.to(dtype), "mask": mask, "mean": None, "std": None}
    mean = torch.rand(channels, generator=generator) / 10 + 0.45
    std = torch.rand(channels, generator=generator) / 50 + 0.1
    target = ((target * std[:, None, None] + mean[:, None, None]) * 255).round().clamp(0, 255).to(torch.uint8)
    return {"target": target, "mask": mask, "mean": mean, "std": std}


def random_pixels(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bytes, or standard normal values of a floating dtype."""
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    return random_tensor(shape, dtype, generator)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal values, drawn in float32 for every dtype."""
    return torch.randn(shape, generator=generator).to(dtype)


def permuted(tensor: Tensor) -> Tensor:
    """The same values with the last axis outermost in memory, as a convolution leaves its channels."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
