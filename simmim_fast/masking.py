"""How SimMIM hides cells of an image (paper, section 3.2): sampling, token indices, and the AvgDist measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from simmim_fast._arguments import positive_int, size_pair


class MaskGenerator:
    """Hides ``ceil(mask_ratio * cells)`` randomly chosen square cells of every image (official ``data_simmim.py``).

    Args:
        input_size: Image size in pixels, one number or (height, width); a multiple of the cell.
        mask_patch_size: Side of a cell in pixels; a multiple of the patch.
        model_patch_size: Side of the encoder's patch in pixels.
        mask_ratio: Share of the cells to hide, from 0 to 1.
        encoder_stride: Pixels per side of an output token of the encoder. ``None`` means that of the official encoders:
            32 for patches below 16 pixels (Swin), otherwise the patch (ViT).

    Attributes:
        input_size: (height, width) in pixels.
        grid: Rows and columns of cells.
        scale: Patches per side of a cell.
        mask_count: Hidden cells per image.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is not positive or not a multiple of the smaller one, or the ratio is outside [0, 1].
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 192,
        mask_patch_size: int = 32,
        model_patch_size: int = 4,
        mask_ratio: float = 0.6,
        *,
        encoder_stride: int | None = None,
    ) -> None:
        self.input_size = size_pair("input_size", input_size)
        self.mask_patch_size = positive_int("mask_patch_size", mask_patch_size)
        self.model_patch_size = positive_int("model_patch_size", model_patch_size)
        if encoder_stride is None:
            encoder_stride = 32 if self.model_patch_size < 16 else self.model_patch_size
        self.encoder_stride = positive_int("encoder_stride", encoder_stride)
        _check_multiple("mask_patch_size", self.mask_patch_size, "model_patch_size", self.model_patch_size)
        for side in self.input_size:
            _check_multiple("input_size", side, "mask_patch_size", self.mask_patch_size)
        _check_multiple("encoder_stride", self.encoder_stride, "model_patch_size", self.model_patch_size)
        if not (isinstance(mask_ratio, Real) and 0 <= mask_ratio <= 1):
            raise ValueError(f"mask_ratio must be a number from 0 to 1, got {mask_ratio!r}")
        self.mask_ratio = mask_ratio
        self.grid = (self.input_size[0] // self.mask_patch_size, self.input_size[1] // self.mask_patch_size)
        self.scale = self.mask_patch_size // self.model_patch_size
        self.mask_count = math.ceil(math.prod(self.grid) * mask_ratio)

    @property
    def counts(self) -> tuple[int, int | None]:
        """(visible patches, encoder tokens with a masked pixel) per image.

        The second is ``None`` where it differs from mask to mask: the cell is not a multiple of the encoder's stride.
        """
        visible_patches = (math.prod(self.grid) - self.mask_count) * self.scale**2
        if self.mask_patch_size % self.encoder_stride:
            return visible_patches, None
        return visible_patches, self.mask_count * (self.mask_patch_size // self.encoder_stride) ** 2

    def __call__(self) -> np.ndarray:
        """Draws one mask from NumPy's global generator, as the official code does.

        Returns:
            (H / patch, W / patch) integers, 1 = hidden.
        """
        cells = np.zeros(math.prod(self.grid), dtype=int)
        cells[np.random.permutation(cells.size)[: self.mask_count]] = 1
        return cells.reshape(self.grid).repeat(self.scale, axis=0).repeat(self.scale, axis=1)

    def batch(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws the masks of a whole batch at once, without synchronising with the host.

        Args:
            batch_size: Number of masks, B.
            generator: Source of the randomness; the masks are drawn on its device. ``None``: torch's default one.
            device: Where the masks are returned. ``None``: the generator's device, or the CPU without a generator.

        Returns:
            (B, H / patch, W / patch) bool, True = hidden.

        Raises:
            TypeError, ValueError: ``batch_size`` is not a positive integer.
        """
        batch_size = positive_int("batch_size", batch_size)
        if device is None:
            device = "cpu" if generator is None else generator.device
        noise = torch.rand(
            batch_size,
            math.prod(self.grid),
            generator=generator,
            device=device if generator is None else generator.device,
        )
        # A sort of noise is a uniform permutation: exactly mask_count of its entries are below mask_count.
        hidden = noise.argsort(dim=1, stable=True) < self.mask_count
        rows, columns = self.grid
        hidden = hidden.view(batch_size, rows, 1, columns, 1).expand(-1, -1, self.scale, -1, self.scale)
        return hidden.reshape(batch_size, rows * self.scale, columns * self.scale).to(device)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_size={self.input_size}, mask_patch_size={self.mask_patch_size}, "
            f"model_patch_size={self.model_patch_size}, mask_ratio={self.mask_ratio}, "
            f"encoder_stride={self.encoder_stride})"
        )


def token_index(selected: Tensor, count: int) -> Tensor:
    """Lists the selected tokens of every image by a sort, without synchronising with the host.

    Args:
        selected: (B, ...) bool or integer, non-zero = selected; every image selects ``count`` tokens. Where an image
            selects fewer, unselected tokens follow; where it selects more, the last ones are left out.
        count: Tokens per image, K.

    Returns:
        (B, K) int32: flat row-major token indices, ascending.

    Raises:
        ValueError: ``count`` is negative or exceeds the tokens of an image.
    """
    flat = selected.flatten(1).ne(0)
    if not 0 <= count <= flat.shape[1]:
        raise ValueError(f"count must be 0 to {flat.shape[1]} tokens per image, got {count}")
    return flat.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count].to(torch.int32)


def average_distance(mask: Tensor | np.ndarray, patch_size: int) -> float:
    """AvgDist: the mean Euclidean distance of the masked pixels to the nearest visible one.

    The paper's measure of a masking strategy (section 4.1, ablation of the masking strategy).

    Args:
        mask: (h, w) or (B, h, w) bool or integer, non-zero = hidden; distances stay within their own image.
        patch_size: Side in pixels of one entry of the mask.

    Returns:
        Pixels, the mean over all masked pixels of all images; 0 where nothing is hidden.

    Raises:
        ValueError: ``mask`` has another number of dimensions, or an image has no visible pixel.
    """
    from scipy.ndimage import distance_transform_edt

    hidden = torch.as_tensor(mask).ne(0).cpu().numpy()
    if hidden.ndim not in (2, 3):
        raise ValueError(f"mask must have shape (h, w) or (B, h, w), got {hidden.shape}")
    images = hidden.reshape(-1, *hidden.shape[-2:]).repeat(patch_size, axis=1).repeat(patch_size, axis=2)
    if images.all(axis=(1, 2)).any():
        raise ValueError("mask must have a visible entry in every image, got an image that is hidden entirely")
    distances = [distance_transform_edt(image)[image] for image in images]
    return float(np.concatenate(distances).mean()) if images.any() else 0.0


def _check_multiple(name: str, value: int, unit_name: str, unit: int) -> None:
    if value % unit:
        raise ValueError(f"{name} must be a multiple of {unit_name} ({unit}), got {value}")
