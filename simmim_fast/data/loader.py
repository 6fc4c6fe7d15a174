"""The loader: one stream of batches over all epochs, which can start at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler

from simmim_fast.data.images import Batch, ImageFolder, Sample, SampleKey


class EpochStream(Sampler[list[SampleKey]]):
    """The keys of every batch of every epoch, in one stream: workers load across the end of an epoch.

    Order and sharding are those of torch's ``DistributedSampler``, as in the official code. Batch number k over all
    ranks holds the same samples for any ``world_size`` with the same ``batch_size * world_size``.

    Args:
        size: Number of samples in the data set.
        batch_size: Samples per batch and rank.
        epochs: Number of epochs of the whole run.
        start_batch: Batches of this rank to pass over, where a run is resumed.
        seed: Seed of the order and, through the keys, of the augmentation.
        shuffle: Draw a new order every epoch.
        drop_last: Leave out the last batch of an epoch where it is not full.
        rank: This process's number.
        world_size: Number of processes. Where it does not divide ``size``, the first samples of an epoch are repeated.

    Attributes:
        batches_per_epoch: Batches per epoch and rank.

    Raises:
        ValueError: A number is out of range, or the samples do not fill a single batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        epochs: int = 1,
        start_batch: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1), ("epochs", epochs, 0), ("start_batch", start_batch, 0), ("seed", seed, 0),
            ("world_size", world_size, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        self._order = DistributedSampler(range(size), world_size, rank, shuffle=shuffle, seed=seed)
        self._batches = BatchSampler(self._order, batch_size, drop_last)
        self.batches_per_epoch = len(self._batches)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"batch_size: expected at most the {len(self._order)} images that each of {world_size} processes has, "
                f"got {batch_size}"
            )
        self.epochs = epochs
        self.start_batch = start_batch
        self.seed = seed

    def __len__(self) -> int:
        """Batches left."""
        return max(0, self.epochs * self.batches_per_epoch - self.start_batch)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        start_epoch, skip = divmod(self.start_batch, self.batches_per_epoch)
        for epoch in range(start_epoch, self.epochs):
            self._order.set_epoch(epoch)
            for indices in islice(self._batches, skip, None):
                yield [SampleKey(index, epoch, self.seed) for index in indices]
            skip = 0


def build_loader(
    dataset: ImageFolder,
    batch_size: int,
    *,
    epochs: int = 1,
    start_batch: int = 0,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Batch]:
    """Builds the loader of a whole run; its batches are the same for any number of workers.

    Args:
        dataset: Takes a ``SampleKey`` and returns a ``Sample``.
        num_workers: Processes that load images; 0 loads in the caller's own.
        pin_memory: Copy batches to pinned memory, from which transfers to a GPU do not wait.

    The other arguments and the errors are those of ``EpochStream``, which is the loader's ``batch_sampler``.

    Returns:
        A loader of ``Batch``; its length is the number of batches left.
    """
    stream = EpochStream(
        len(dataset),
        batch_size,
        epochs=epochs,
        start_batch=start_batch,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        rank=rank,
        world_size=world_size,
    )
    return DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(seed),  # else the loader draws from the caller's default generator
    )


def _collate(samples: list[Sample]) -> Batch:
    return Batch(
        images=torch.stack([sample.image for sample in samples]),
        labels=torch.tensor([sample.label for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
        unreadable=tuple(image for sample in samples for image in sample.unreadable),
    )
