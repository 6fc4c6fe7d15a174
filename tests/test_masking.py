"""Masks: the official count and distribution, static counts, token indices, AvgDist, and refused arguments."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from simmim_fast.masking import MaskGenerator, average_distance, token_index

GENERATORS = {
    "swin-192": {"input_size": 192, "mask_patch_size": 32, "model_patch_size": 4},
    "vit-224": {"input_size": 224, "mask_patch_size": 32, "model_patch_size": 16},
    "wide": {"input_size": (64, 160), "mask_patch_size": 16, "model_patch_size": 4},
    "tall": {"input_size": (96, 32), "mask_patch_size": 8, "model_patch_size": 8},
}
RATIOS = (0.0, 0.1, 0.5, 0.6, 0.7, 1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells_of(masks: torch.Tensor, scale: int) -> torch.Tensor:
    """(B, rows, columns) from (B, H/p, W/p), after checking that every cell is of one value."""
    cells = masks[:, ::scale, ::scale]
    assert torch.equal(cells.repeat_interleave(scale, 1).repeat_interleave(scale, 2), masks)
    return cells


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("arguments", GENERATORS.values(), ids=GENERATORS.keys())
def test_batch_hides_whole_cells_and_exactly_their_share(arguments, ratio):
    masks = MaskGenerator(**arguments, mask_ratio=ratio)
    drawn = masks.batch(5, generator=generator())
    height, width = masks.input_size
    patch, cell = arguments["model_patch_size"], arguments["mask_patch_size"]
    assert drawn.dtype == torch.bool
    assert drawn.shape == (5, height // patch, width // patch)
    count = int(np.ceil(height // cell * (width // cell) * ratio))
    assert cells_of(drawn, cell // patch).flatten(1).sum(1).tolist() == [count] * 5
    assert masks.mask_count == count


def test_batch_chooses_every_set_of_cells_equally_often():
    masks = MaskGenerator((2, 3), 1, 1, 0.5)
    drawn = masks.batch(20_000, generator=generator()).flatten(1)
    code = (drawn * 2 ** torch.arange(6)).sum(1)
    observed = torch.bincount(code, minlength=64)
    possible = [sum(2**cell for cell in chosen) for chosen in itertools.combinations(range(6), 3)]
    assert observed[possible].sum() == 20_000
    assert chisquare(observed[possible].numpy()).pvalue > 0.01


def test_batch_repeats_from_a_generator_and_differs_between_images_and_draws():
    masks = MaskGenerator()
    source = generator(3)
    first, second = masks.batch(4, generator=source), masks.batch(4, generator=source)
    assert torch.equal(first, masks.batch(4, generator=generator(3)))
    assert not torch.equal(first, second)
    assert len(torch.unique(first.flatten(1), dim=0)) == 4


def test_batch_without_a_generator_follows_the_default_one():
    torch.manual_seed(5)
    first = MaskGenerator().batch(2)
    torch.manual_seed(5)
    assert torch.equal(first, MaskGenerator().batch(2))


def test_batch_reads_no_data_on_the_host():
    # Meta tensors have no data: an operation that waited for it would raise.
    masks = MaskGenerator().batch(2, device="meta")
    assert masks.device.type == "meta"
    assert token_index(masks, 10).shape == (2, 10)


def test_batch_draws_on_the_generators_device_and_returns_on_the_one_asked_for():
    moved = MaskGenerator().batch(2, generator=generator(), device="meta")
    assert moved.device.type == "meta"
    assert MaskGenerator().batch(2, generator=generator()).device.type == "cpu"


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("arguments", GENERATORS.values(), ids=GENERATORS.keys())
def test_call_equals_the_official_algorithm_bit_for_bit(arguments, ratio):
    masks = MaskGenerator(**arguments, mask_ratio=ratio)
    height, width = masks.input_size
    cell, patch = arguments["mask_patch_size"], arguments["model_patch_size"]
    rows, columns = height // cell, width // cell
    np.random.seed(7)
    masks(), masks()
    third = masks()

    np.random.seed(7)
    permutations = [np.random.permutation(rows * columns) for _ in range(3)]
    hidden = set(permutations[2][: int(np.ceil(rows * columns * ratio))].tolist())
    expected = [
        [int(y * patch // cell * columns + x * patch // cell in hidden) for x in range(width // patch)]
        for y in range(height // patch)
    ]
    assert third.dtype == np.zeros(1, dtype=int).dtype
    assert third.tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(GENERATORS["swin-192"], (896, 22), id="swin-192"),
        pytest.param(GENERATORS["vit-224"], (76, 120), id="vit-224"),
        pytest.param({"input_size": 192, "mask_patch_size": 64}, (3 * 256, 6 * 4), id="cell-of-four-tokens"),
        pytest.param({"input_size": 96, "mask_patch_size": 8}, (57 * 4, None), id="cell-finer-than-stride"),
        pytest.param({"input_size": 96, "mask_patch_size": 48}, (144, None), id="cell-across-tokens"),
        pytest.param({"input_size": 96, "mask_patch_size": 8, "encoder_stride": 8}, (57 * 4, 87), id="stride-given"),
        pytest.param({"mask_ratio": 0}, (2304, 0), id="nothing-hidden"),
        pytest.param({"mask_ratio": 1}, (0, 36), id="all-hidden"),
    ],
)
def test_counts(arguments, expected):
    assert MaskGenerator(**arguments).counts == expected


@pytest.mark.parametrize("arguments", GENERATORS.values(), ids=GENERATORS.keys())
def test_counts_are_those_of_drawn_masks(arguments):
    stride = 2 * arguments["model_patch_size"] if arguments["mask_patch_size"] > 8 else 8
    masks = MaskGenerator(**arguments, encoder_stride=stride)
    drawn = masks.batch(3, generator=generator())
    scale = stride // arguments["model_patch_size"]
    visible = drawn.logical_not().flatten(1).sum(1)
    tokens = torch.nn.functional.max_pool2d(drawn.float(), scale).flatten(1).sum(1)
    assert {(int(v), int(t)) for v, t in zip(visible, tokens, strict=True)} == {masks.counts}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4), (2, 2, 3, 4), (0, 4, 4)], ids=str)
def test_token_index_is_nonzero_of_every_image(shape, dtype):
    tokens = math.prod(shape[1:])
    for count in (0, 1, tokens // 2, tokens):
        selected = torch.rand(shape[0], tokens, generator=generator(count)).argsort(dim=1) < count
        expected = selected.nonzero()[:, 1].view(shape[0], count)
        index = token_index(selected.view(shape).to(dtype), count)
        assert index.dtype == torch.int32
        assert torch.equal(index, expected.to(torch.int32))


@pytest.mark.parametrize("count", [-1, 17])
def test_token_index_refuses_an_impossible_count(count):
    with pytest.raises(ValueError, match=rf"count must be 0 to 16 tokens per image, got {count}"):
        token_index(torch.ones(2, 4, 4), count)


@pytest.mark.parametrize("patch_size", [1, 3])
def test_average_distance_equals_brute_force(patch_size):
    masks = MaskGenerator((5, 7), 1, 1, 0.6).batch(2, generator=generator())
    distances = []
    for mask in masks:
        pixels = torch.kron(mask.long(), torch.ones(patch_size, patch_size, dtype=torch.long))
        hidden, visible = pixels.nonzero().double(), (1 - pixels).nonzero().double()
        distances.append(torch.cdist(hidden, visible).min(dim=1).values)
    assert average_distance(masks, patch_size) == pytest.approx(torch.cat(distances).mean().item(), rel=1e-12)


def test_average_distance_by_hand():
    mask = np.ones((3, 3), dtype=int)
    mask[1, 1] = 0
    assert average_distance(mask, 1) == pytest.approx((4 + 4 * math.sqrt(2)) / 8)
    assert average_distance(np.zeros((3, 3), dtype=int), 32) == 0


def test_average_distance_of_the_default_mask_is_in_the_papers_good_range():
    # The paper finds the best representations where AvgDist lies between 10 and 20 pixels.
    assert 10 < average_distance(MaskGenerator().batch(8, generator=generator()), 4) < 20


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(torch.ones(2, 2), "mask must have a visible entry in every image", id="all-hidden"),
        pytest.param(torch.ones(2), r"mask must have shape \(h, w\) or \(B, h, w\), got \(2,\)", id="one-dimension"),
    ],
)
def test_average_distance_refuses(mask, message):
    with pytest.raises(ValueError, match=message):
        average_distance(mask, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            {"input_size": 100},
            ValueError,
            r"input_size must be .*multiple of mask_patch_size \(32\), got 100",
            id="height",
        ),
        pytest.param({"input_size": (192, 100)}, ValueError, r"input_size must be .*got 100", id="width"),
        pytest.param(
            {"input_size": 0}, ValueError, "input_size must be at least 1 on each side, got 0", id="zero-size"
        ),
        pytest.param({"input_size": "192"}, TypeError, "input_size must be an integer or a pair", id="string-size"),
        pytest.param(
            {"input_size": (1, 2, 3)}, TypeError, r"input_size must be .* pair .*got \(1, 2, 3\)", id="three-sides"
        ),
        pytest.param(
            {"input_size": (192, 96.0)}, TypeError, r"input_size must be .*got \(192, 96\.0\)", id="float-side"
        ),
        pytest.param({"mask_patch_size": -32}, ValueError, "mask_patch_size must be .*got -32", id="negative-cell"),
        pytest.param(
            {"mask_patch_size": 6},
            ValueError,
            r"mask_patch_size must be .*model_patch_size \(4\), got 6",
            id="cell-of-patches",
        ),
        pytest.param({"model_patch_size": 0}, ValueError, "model_patch_size must be .*got 0", id="zero-patch"),
        pytest.param(
            {"encoder_stride": 6}, ValueError, "encoder_stride must be .*multiple .*got 6", id="stride-of-patches"
        ),
        pytest.param({"mask_ratio": 1.5}, ValueError, r"mask_ratio must be .*0 to 1, got 1\.5", id="ratio-above"),
        pytest.param({"mask_ratio": -0.1}, ValueError, r"mask_ratio must be .*got -0\.1", id="ratio-below"),
        pytest.param({"mask_ratio": math.nan}, ValueError, "mask_ratio must be .*got nan", id="ratio-nan"),
        pytest.param({"mask_ratio": "0.6"}, ValueError, "mask_ratio must be .*got '0.6'", id="ratio-string"),
    ],
)
def test_refused_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        MaskGenerator(**arguments)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        MaskGenerator().batch(0)


def test_repr_shows_every_argument():
    assert repr(MaskGenerator((64, 96), 16, 4, 0.5)) == (
        "MaskGenerator(input_size=(64, 96), mask_patch_size=16, model_patch_size=4, mask_ratio=0.5, encoder_stride=32)"
    )
