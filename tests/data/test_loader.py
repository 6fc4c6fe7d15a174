"""The loader: one stream of batches, the same for any number of workers, ranks and restarts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler

from simmim_fast.data import Batch, EpochStream, ImageFolder, SampleKey, build_loader, pretrain_transform


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> ImageFolder:
    """23 photographs in 3 classes, one of them unreadable."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(23):
        folder = root / f"class-{number % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    (root / "class-1" / "04.png").write_bytes(b"not an image")
    return ImageFolder(root, pretrain_transform(16))


def same(first: Batch, second: Batch) -> bool:
    tensors = all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    return tensors and first.unreadable == second.unreadable


def test_batches_do_not_depend_on_the_number_of_workers(dataset):
    alone = list(build_loader(dataset, 5, epochs=2, seed=3))
    shared = list(build_loader(dataset, 5, epochs=2, seed=3, num_workers=2))
    assert len(alone) == len(shared) == 2 * (23 // 5)
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert sum(len(batch.unreadable) for batch in alone) >= 1


@pytest.mark.parametrize("start", [0, 1, 3, 4, 6, 8])
def test_a_stream_resumes_at_any_batch(dataset, start):
    whole = list(build_loader(dataset, 5, epochs=2, seed=3))
    rest = build_loader(dataset, 5, epochs=2, seed=3, start_batch=start)
    assert len(rest) == len(whole) - start
    assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_a_batch_holds_what_the_model_takes(dataset):
    loader = build_loader(dataset, 5)
    batch, keys = next(iter(loader)), next(iter(loader.batch_sampler))
    assert batch.images.shape == (5, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.labels.tolist() == dataset.labels[batch.indices].tolist()
    assert torch.equal(batch.images, torch.stack([dataset[key].image for key in keys]))


def test_an_epoch_shows_every_image_once_in_a_new_order(dataset):
    keys = [key for batch in EpochStream(23, 4, epochs=3, drop_last=False, seed=1) for key in batch]
    orders = [[key.index for key in keys if key.epoch == epoch] for epoch in range(3)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(23))
    assert {key.seed for key in keys} == {1}


def test_without_shuffling_the_order_is_that_of_the_folder():
    assert [key.index for batch in EpochStream(7, 3, shuffle=False) for key in batch] == [0, 1, 2, 3, 4, 5]
    assert list(EpochStream(7, 3, shuffle=False, drop_last=False))[-1] == [SampleKey(6)]


@pytest.mark.parametrize("size", [16, 17, 23, 24])
def test_order_and_length_are_those_of_the_official_loader(size):
    for rank in range(2):
        sampler = DistributedSampler(range(size), 2, rank, shuffle=True)
        official = DataLoader(range(size), 4, sampler=sampler, drop_last=True)
        stream = EpochStream(size, 4, epochs=2, rank=rank, world_size=2)
        assert stream.batches_per_epoch == len(official)
        batches = iter(stream)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for expected in official:
                assert next(batches) == [SampleKey(index, epoch) for index in expected.tolist()]


def test_large_batches_are_the_same_for_any_number_of_ranks():
    alone = [sorted(batch) for batch in EpochStream(48, 12, epochs=2, seed=2)]
    ranks = [EpochStream(48, 4, epochs=2, seed=2, rank=rank, world_size=3) for rank in range(3)]
    assert [sorted(a + b + c) for a, b, c in zip(*ranks, strict=True)] == alone


def test_other_seeds_give_other_orders():
    assert list(EpochStream(23, 4, seed=1)) != list(EpochStream(23, 4, seed=2))


def test_a_stream_past_its_end_is_empty():
    stream = EpochStream(23, 5, epochs=2, start_batch=9)
    assert len(stream) == 0
    assert list(stream) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"batch_size": 24}, "batch_size: expected at most the 23 images .*got 24", id="more-than-images"),
        pytest.param(
            {"batch_size": 13, "world_size": 2}, "batch_size: expected at most the 12 images .*2 processes", id="ranks"
        ),
        pytest.param({"batch_size": 0}, "batch_size: expected at least 1, got 0", id="batch-size"),
        pytest.param({"epochs": -1}, "epochs: expected at least 0, got -1", id="epochs"),
        pytest.param({"start_batch": -1}, "start_batch: expected at least 0, got -1", id="start"),
        pytest.param({"seed": -1}, "seed: expected at least 0, got -1", id="seed"),
        pytest.param({"world_size": 0}, "world_size: expected at least 1, got 0", id="world"),
        pytest.param({"rank": 2, "world_size": 2}, "rank: expected 0 to 1, got 2", id="rank"),
    ],
)
def test_refused_arguments_are_named(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_loader(dataset, **{"batch_size": 4} | arguments)
