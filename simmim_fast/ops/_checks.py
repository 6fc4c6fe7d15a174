"""Checks of an op's arguments: metadata only, so they cost no synchronisation and trace under torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from simmim_fast._backends import FLOAT_DTYPES

INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_float(**tensors: Tensor) -> None:
    """Each is a tensor of a floating dtype that the ops know."""
    for name, tensor in tensors.items():
        _check_dtype(name, tensor, FLOAT_DTYPES, "float64, float32, bfloat16 or float16")


def check_optional_float(**tensors: Tensor | None) -> None:
    """Each is None, or a tensor of a floating dtype that the ops know."""
    check_float(**{name: tensor for name, tensor in tensors.items() if tensor is not None})


def check_mask(mask: Tensor) -> None:
    """A tensor, bool or integer. A float mask would ask for a blend and a gradient, and gets neither."""
    _check_dtype("mask", mask, INTEGER_DTYPES, "bool or an integer dtype")


def check_pixels(name: str, pixels: Tensor, mean: Tensor | None, std: Tensor | None) -> None:
    """Pixels (B, channels, H, W): uint8 with mean and std (channels), or floating without. They get no gradient."""
    _check_dtype(name, pixels, (*FLOAT_DTYPES, torch.uint8), "float64, float32, bfloat16, float16 or uint8")
    for stats_name, stats in (("mean", mean), ("std", std)):
        if (stats is not None) != (pixels.dtype == torch.uint8):
            wish = "is needed" if stats is None else "must be None"
            raise ValueError(f"{stats_name} {wish} where {name} is {pixels.dtype}; it belongs to uint8 pixels")
        if stats is not None:
            check_float(**{stats_name: stats})
            check_shape(stats_name, stats, pixels.shape[1:2], "(channels)")
    for tensor_name, tensor in ((name, pixels), ("mean", mean), ("std", std)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{tensor_name} must not require a gradient: it gets none; detach it")


def check_pixel_mask(mask: Tensor, pixels_name: str, pixels: Tensor, patch_size: int) -> None:
    """A mask with an entry for every patch of pixels (B, channels, H, W)."""
    check_mask(mask)
    check_int("patch_size", patch_size, 1)
    batch, _, height, width = pixels.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{pixels_name} must have sides that patch_size = {patch_size} divides; got {(height, width)}")
    check_shape("mask", mask, (batch, height // patch_size, width // patch_size), "(B, H / patch, W / patch)")


def check_indices(name: str, indices: Tensor, batch: int, limit: int, meaning: str) -> Tensor:
    """Indices (B, K) of at most `limit` tokens of each image, as int32; `meaning` says the limit in letters."""
    _check_dtype(name, indices, INTEGER_DTYPES[1:], "an integer tensor")
    if indices.ndim != 2 or indices.shape[0] != batch:
        raise ValueError(f"{name} must have shape (B, K) with B = {batch}; got {tuple(indices.shape)}")
    if indices.shape[1] > limit:
        raise ValueError(f"{name} must list at most {meaning} = {limit} tokens; got K = {indices.shape[1]}")
    if indices.dtype == torch.int64:
        indices = indices.clamp(-1, torch.iinfo(torch.int32).max)  # what int32 cannot hold stays out of range
    return indices.int()


def check_int(name: str, value: int, least: int) -> None:
    """An integer, `least` or more; True and 2.0 are none."""
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more; got {value}")


def check_number(name: str, value: float) -> None:
    """An integer or a float; True is none."""
    if not isinstance(value, int | float | torch.SymInt | torch.SymFloat) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """The tensor has the expected shape; `meaning` says it in letters."""
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}; got {tuple(tensor.shape)}")


def check_channels_last(name: str, tensor: Tensor) -> None:
    """A tensor (..., C) with at least one channel."""
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., C) with C at least 1; got {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """All are on the device of the first."""
    for other_name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{other_name} must be on the device of {name}, {tensor.device}; got {other.device}")


def _check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], expected: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {expected}; got {tensor.dtype}")
