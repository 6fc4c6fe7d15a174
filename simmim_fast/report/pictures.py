"""`reconstruction.png`: photographs, what the model saw of them, and what it made of the rest."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simmim_fast.data import denormalize
from simmim_fast.models import SimMIM
from simmim_fast.models.targets import local_statistics
from simmim_fast.report.figures import INK, MUTED, new_figure, save_figure

# Shade of the hidden cells in the middle column, between black and white.
HIDDEN_SHADE = 0.5
LEVELS = 255
HEADINGS = ("original", "masked", "reconstructed")
# Above this many images, two of them stand side by side.
MOST_ROWS = 4
# Inches: side of a panel, between panels, between groups, text under a panel, above the first one, a line of the title.
PANEL, GAP, GROUP_GAP, CAPTION, HEADING, LINE = 1.5, 0.05, 0.2, 0.22, 0.32, 0.18
# Characters above one group of three panels.
LINE_LENGTH = 60


@dataclass(frozen=True)
class Reconstruction:
    """Images with pixels from 0 to 1, (B, C, H, W), and errors per image, (B), in grey levels of 255.

    Attributes:
        original: The images.
        masked: The images with their hidden cells in grey.
        filled: The model's prediction in the hidden cells, the images elsewhere.
        model_error: Mean absolute error of the model over the hidden pixels.
        mean_error: The same for filling in the mean colour of the visible pixels.
        informed: The model predicts locally normalised pixels, and took their mean and deviation from the original.
    """

    original: Tensor
    masked: Tensor
    filled: Tensor
    model_error: Tensor
    mean_error: Tensor
    informed: bool = False

    def summary(self) -> str:
        """Both errors over all images, in one line."""
        model, mean = self.model_error.mean(), self.mean_error.mean()
        text = f"mean absolute error of the hidden pixels, of 255: model {model:.1f}, mean visible colour {mean:.1f}"
        return f"{text} (the model is given local mean and contrast)" if self.informed else text


@torch.inference_mode()
def reconstruct(
    model: SimMIM,
    images: Tensor,
    mask: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Reconstruction:
    """Lets a model fill in the hidden cells of images.

    A model that was trained on locally normalised targets predicts those; its prediction takes mean and deviation of
    each pixel's surroundings from the original.

    Args:
        model: In evaluation mode; on the device of the images.
        images: (B, C, H, W), normalised.
        mask: (B, H / patch, W / patch), non-zero = hidden.
        mean: Per channel, as in the normalisation; ImageNet's if None.
        std: As mean.
    """
    original = denormalize(images, mean, std)
    prediction = model.reconstruct(images, mask)
    if model.norm_target:
        prediction = _undo_norm_target(prediction, images, model.norm_target_patch_size)
    prediction = denormalize(prediction, mean, std)
    hidden = mask.ne(0)[:, None].repeat_interleave(model.patch_size, 2).repeat_interleave(model.patch_size, 3)
    visible_mean = _mean_over(original, ~hidden)
    return Reconstruction(
        original=original,
        masked=torch.where(hidden, HIDDEN_SHADE, original),
        filled=torch.where(hidden, prediction.clamp(0, 1), original),
        model_error=LEVELS * _mean_over((prediction - original).abs(), hidden).mean((1, 2, 3)),
        mean_error=LEVELS * _mean_over((visible_mean - original).abs(), hidden).mean((1, 2, 3)),
        informed=model.norm_target,
    )


def _mean_over(pixels: Tensor, where: Tensor) -> Tensor:
    """Mean of each image's channels over the pixels in `where` (B, 1, H, W): (B, C, 1, 1)."""
    return (pixels * where).sum((2, 3), keepdim=True) / where.sum((2, 3), keepdim=True).clamp(min=1)


def _undo_norm_target(prediction: Tensor, images: Tensor, window: int) -> Tensor:
    """Inverse of `norm_targets`, whose statistics are those of `images`."""
    mean, deviation = local_statistics(images, window)
    return prediction * deviation + mean


def draw_reconstruction(reconstruction: Reconstruction, path: str | os.PathLike[str], *, title: str = "") -> Path:
    """Writes a picture: original, masked and reconstructed side by side, one group for each image.

    Args:
        reconstruction: From `reconstruct`.
        path: The PNG file; its folder exists.
        title: First line of the picture.
    """
    height, width = reconstruction.original.shape[-2:]
    groups = 2 if len(reconstruction.original) > MOST_ROWS else 1
    rows = -(-len(reconstruction.original) // groups)
    lines = (textwrap.fill(line, groups * LINE_LENGTH) for line in (title, reconstruction.summary()) if line)
    heading = "\n".join(lines)
    top = HEADING + LINE * (heading.count("\n") + 1)
    across, down = PANEL + GAP, PANEL * height / width + CAPTION  # inches from one panel to the next
    size = groups * (3 * across + GROUP_GAP) - GROUP_GAP + GAP, top + rows * down
    figure = new_figure(*size)
    figure.set_layout_engine("none")
    for number, columns in enumerate(zip(*_columns(reconstruction), strict=True)):
        group, row = divmod(number, rows)
        for column, (name, pixels) in enumerate(zip(HEADINGS, columns, strict=True)):
            left = GAP + group * (3 * across + GROUP_GAP) + column * across
            bottom = size[1] - top - (row + 1) * down + CAPTION
            box = left / size[0], bottom / size[1], PANEL / size[0], (down - CAPTION) / size[1]
            axes = figure.add_axes(box, frame_on=False, xticks=[], yticks=[])
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            if row == 0:
                axes.set_title(name, fontsize=8, color=INK, pad=4)
        errors = reconstruction.model_error[number], reconstruction.mean_error[number]
        axes.set_xlabel("error {:.1f}, mean colour {:.1f}".format(*errors), fontsize=6.5, color=MUTED, labelpad=2)
    figure.text(0.5, 1 - 0.08 / size[1], heading, ha="center", va="top", fontsize=8.5, color=INK, linespacing=1.5)
    return save_figure(figure, path)


def _columns(reconstruction: Reconstruction) -> Iterator[np.ndarray]:
    """Original, masked and filled as (B, H, W, 3), or (B, H, W) where there are not three channels."""
    for images in (reconstruction.original, reconstruction.masked, reconstruction.filled):
        pixels = images.float().clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        yield pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
