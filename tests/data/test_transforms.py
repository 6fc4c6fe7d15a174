"""Transforms: equal to the official ones, deterministic for evaluation, and undone by denormalize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from simmim_fast.data import IMAGENET_MEAN, IMAGENET_STD, channel_stats, denormalize, eval_transform, pretrain_transform


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def test_pretrain_transform_draws_and_computes_what_the_official_one_does():
    official = transforms.Compose(
        [
            transforms.RandomResizedCrop(48, scale=(0.67, 1.0), ratio=(3.0 / 4.0, 4.0 / 3.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=torch.tensor(IMAGENET_MEAN), std=torch.tensor(IMAGENET_STD)),
        ]
    )
    ours = pretrain_transform(48)
    for seed in range(20):
        image = picture(64, 80 + 4 * seed, seed=seed)
        torch.manual_seed(seed)
        expected = official(image)
        torch.manual_seed(seed)
        # One 8-bit step is 0.017 here; scaling by 1 / 255 instead of dividing by 255 rounds differently.
        assert (ours(image) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("build", [pretrain_transform, eval_transform], ids=["pretrain", "eval"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (4, 4)], ids=str)
def test_result_has_the_shape_and_type_the_model_takes(build, channels, size):
    image = picture(*size, mode={1: "L", 3: "RGB"}[channels])
    for img_size, shape in ((32, (32, 32)), ((32, 64), (32, 64))):
        tensor = build(img_size, channels=channels)(image)
        assert type(tensor) is torch.Tensor
        assert tensor.dtype == torch.float32
        assert tensor.shape == (channels, *shape)


def test_eval_transform_is_a_centre_crop_of_the_resized_image():
    resize_and_crop = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()])
    for size in ((64, 96), (96, 64), (32, 32), (16, 24)):
        image = picture(*size)
        expected = resize_and_crop(image)
        result = eval_transform(32)(image)
        assert torch.equal(result, eval_transform(32)(image))
        assert (denormalize(result) - expected).abs().max() < 1e-6


def test_eval_transform_keeps_the_scale_of_both_axes():
    # A frame that covers the image keeps its aspect: the middle third of a wide image fills a square.
    image = Image.new("RGB", (96, 32))
    image.paste((255, 255, 255), (32, 0, 64, 32))
    assert denormalize(eval_transform(32)(image)).min() > 0.99
    assert denormalize(eval_transform((16, 48))(image))[0, 8, [0, -1]].max() < 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_denormalize_undoes_the_normalisation(channels):
    image = picture(32, 32, mode={1: "L", 3: "RGB"}[channels])
    pixels = torch.from_numpy(np.array(image)).view(32, 32, channels).permute(2, 0, 1) / 255
    normalised = eval_transform(32, channels=channels)(image)
    assert (denormalize(normalised) - pixels).abs().max() < 1e-6
    assert torch.equal(denormalize(normalised.expand(2, 2, -1, -1, -1))[1, 1], denormalize(normalised))


def test_statistics_of_the_user_take_effect():
    image = Image.new("RGB", (8, 8), (0, 51, 255))
    tensor = eval_transform(8, mean=(0.5, 0.2, 0.0), std=(0.5, 1.0, 2.0))(image)
    assert tensor[:, 0, 0].tolist() == pytest.approx([-1.0, 0.0, 0.5], abs=1e-6)


def test_channel_stats():
    assert channel_stats(3) == (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = channel_stats(1)
    assert (mean, std) == (pytest.approx((0.449,)), pytest.approx((0.226,)))
    assert channel_stats(4, [0] * 4, [1] * 4) == ((0, 0, 0, 0), (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda: channel_stats(4), ValueError, "mean: expected 4 numbers, .*got None", id="no-default"),
        pytest.param(lambda: channel_stats(3, (0.5,)), ValueError, "mean: .*3 channels, got", id="mean-count"),
        pytest.param(lambda: channel_stats(1, std=(1, 1)), ValueError, "std: .*1 channels, got", id="std-count"),
        pytest.param(lambda: channel_stats(1, std=(0,)), ValueError, "std: expected positive", id="std-zero"),
        pytest.param(lambda: denormalize(torch.zeros(4, 8, 8)), ValueError, "mean: expected 4", id="denormalize"),
        pytest.param(lambda: pretrain_transform(0), ValueError, "img_size must be .*got 0", id="size-zero"),
        pytest.param(lambda: eval_transform("big"), TypeError, "img_size must be .*got 'big'", id="size-string"),
    ],
)
def test_refused_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
