"""What each update trains on."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from simmim_fast import MaskGenerator
from simmim_fast.data import Sample, UnreadableImage, build_loader
from simmim_fast.train.stream import UpdateStream


class Numbered(Dataset):
    """Eleven images; each pixel of image n is n, and image 3 cannot be read."""

    def __len__(self):
        return 11

    def __getitem__(self, key):
        unreadable = (UnreadableImage("3.png", "broken"),) if key.index == 3 else ()
        return Sample(torch.full((1, 8, 8), float(key.index)), -1, key.index, unreadable)


def stream(batch_size, accumulation_steps, epochs=2, seed=0):
    loader = build_loader(Numbered(), batch_size, epochs=epochs, seed=seed)
    return UpdateStream(loader, MaskGenerator(8, 4, 2, 0.5), accumulation_steps=accumulation_steps, seed=seed)


def joined(update):
    return torch.cat([images for images, _ in update]), torch.cat([mask for _, mask in update])


def test_micro_batches_add_up_to_the_large_batches():
    large, split = stream(4, 1), stream(2, 2)
    assert len(large) == len(split) == 4
    assert large.per_epoch == split.per_epoch == 2
    for one, parts in zip(large, split, strict=True):
        assert [len(images) for images, _ in parts] == [2, 2]
        for whole, part in zip(joined(one), joined(parts), strict=True):
            assert torch.equal(whole, part)


def test_masks_differ_between_updates_and_seeds():
    masks = [joined(update)[1] for update in stream(4, 1)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)
    assert not torch.equal(masks[0], joined(next(iter(stream(4, 1, seed=1))))[1])


def test_unreadable_images_are_remembered_once():
    updates = stream(1, 1, epochs=3)
    assert updates.unreadable == {}
    assert len(list(updates)) == 33
    assert updates.unreadable == {"3.png": "broken"}


def test_an_epoch_must_fill_an_update():
    with pytest.raises(ValueError, match="accumulation_steps must be at most 2, the batches in an epoch, got 3"):
        stream(4, 3)
