"""What each update trains on: its batches of images, and masks that were drawn for all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simmim_fast.data import Batch, stream_seed
from simmim_fast.masking import MaskGenerator
from simmim_fast.train.interrupt import ctrl_c_withheld

MicroBatch = tuple[Tensor, Tensor]


class UpdateStream:
    """For every update of a run its micro-batches: images (B, C, H, W) on the CPU, mask (B, H/patch, W/patch).

    An update has the same images and masks for any number of workers, and for any split into micro-batches.

    Args:
        loader: From `build_loader`; one of its batches is one micro-batch.
        masks: Draws the masks.
        accumulation_steps: Micro-batches in one update. What an epoch has beyond whole updates is left out, as from an
            epoch of large batches.
        seed: Of the masks.
        device: Where the masks are drawn.

    Attributes:
        per_epoch: Updates in one epoch.
        unreadable: Reason by path of every image met that could not be read.

    Raises:
        ValueError: an epoch does not fill a single update.
    """

    def __init__(
        self,
        loader: DataLoader[Batch],
        masks: MaskGenerator,
        *,
        accumulation_steps: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        batches = loader.batch_sampler.batches_per_epoch
        if batches < accumulation_steps:
            raise ValueError(
                f"accumulation_steps must be at most {batches}, the batches in an epoch, got {accumulation_steps}"
            )
        self.per_epoch = batches // accumulation_steps
        self.unreadable: dict[str, str] = {}
        self._loader = loader
        self._masks = masks
        self._accumulation_steps = accumulation_steps
        self._left_over = batches % accumulation_steps
        self._seed = seed
        self._generator = torch.Generator(device)

    def __len__(self) -> int:
        return self._loader.batch_sampler.epochs * self.per_epoch

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        with ctrl_c_withheld():  # from the workers
            batches = iter(self._loader)
        for update in range(len(self)):
            if update and update % self.per_epoch == 0:
                self._take(batches, self._left_over)
            images = [batch.images for batch in self._take(batches, self._accumulation_steps)]
            self._generator.manual_seed(stream_seed(self._seed, "mask", update))
            masks = self._masks.batch(sum(map(len, images)), generator=self._generator)
            yield list(zip(images, masks.split(len(images[0])), strict=True))

    def _take(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        taken = list(islice(batches, count))
        for batch in taken:
            self.unreadable.update(batch.unreadable)
        return taken
