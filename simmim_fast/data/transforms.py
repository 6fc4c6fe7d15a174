"""From a decoded image to the model's input, and back. Pillow and torchvision are imported where they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simmim_fast._arguments import size_pair

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Transform = Callable[["Image.Image"], Tensor]


def pretrain_transform(
    img_size: int | Sequence[int],
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: tuple[float, float] = (0.67, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Transform:
    """Builds SimMIM's augmentation (official ``SimMIMTransform``): random resized crop, flip, normalisation.

    The randomness is torch's default CPU generator.

    Args:
        img_size: Size of the result in pixels, one number or (height, width).
        channels: Channels of the images.
        mean: Mean per channel of pixels in [0, 1]; ``None`` is ImageNet's, see ``channel_stats``.
        std: Standard deviation likewise.
        scale: Least and greatest area of the crop, as a share of the image.
        ratio: Least and greatest width / height of the crop.

    Returns:
        A function from a Pillow image to a (C, H, W) float32 tensor.

    Raises:
        TypeError, ValueError: As ``size_pair`` and ``channel_stats``.
    """
    from torchvision.transforms import v2

    size = size_pair("img_size", img_size)
    augment = [v2.RandomResizedCrop(size, scale=scale, ratio=ratio), v2.RandomHorizontalFlip()]
    return v2.Compose([*augment, *_to_normalised(channels, mean, std)])


def eval_transform(
    img_size: int | Sequence[int],
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Transform:
    """Builds the deterministic transform: resize to cover ``img_size``, centre crop, normalisation.

    Arguments, result and errors are those of ``pretrain_transform``.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms import v2

    height, width = size_pair("img_size", img_size)
    cover = partial(ImageOps.fit, size=(width, height), method=Image.Resampling.BILINEAR)
    return v2.Compose([cover, *_to_normalised(channels, mean, std)])


def denormalize(images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Undoes the normalisation of images (..., C, H, W): photographs return to [0, 1], nothing is clamped.

    Raises:
        ValueError: As ``channel_stats``, for the channels of ``images``.
    """
    mean, std = channel_stats(images.shape[-3], mean, std)
    return images * images.new_tensor(std).view(-1, 1, 1) + images.new_tensor(mean).view(-1, 1, 1)


def channel_stats(
    channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel: those given, or ImageNet's, averaged for a single channel.

    Raises:
        ValueError: One is not given and there are neither 1 nor 3 channels; there is not one number per channel; a
            deviation is not positive.
    """
    mean = _imagenet("mean", IMAGENET_MEAN, channels) if mean is None else tuple(mean)
    std = _imagenet("std", IMAGENET_STD, channels) if std is None else tuple(std)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name}: expected one number for each of {channels} channels, got {values}")
    if min(std) <= 0:
        raise ValueError(f"std: expected positive numbers, got {std}")
    return mean, std


def _imagenet(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if channels not in (1, 3):
        raise ValueError(f"{name}: expected {channels} numbers, as ImageNet's serve 1 or 3 channels only, got None")
    return values if channels == 3 else (sum(values) / 3,)


def _to_normalised(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> list[torch.nn.Module]:
    from torchvision.transforms import v2

    mean, std = channel_stats(channels, mean, std)
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
