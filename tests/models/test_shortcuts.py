"""The exact shortcuts change neither loss nor gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simmim_fast import MaskGenerator, SimMIM, create_model
from simmim_fast.models.shortcuts import SHORTCUTS, list_tokens, masked_tokens

ENCODERS = {
    "swin": {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
    "swin-padded": {"patch_size": 4, "window_size": 3, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
    "swinv2": {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)},
    "vit": {
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "init_values": 0.1,
        "qkv_bias": True,
        "use_shared_rel_pos_bias": True,
        "use_mean_pooling": False,
    },
}
SIZE = 32


def build(encoder: str, **options: object) -> SimMIM:
    torch.manual_seed(0)
    name = encoder.split("-")[0]
    model = create_model(name, img_size=SIZE, drop_path_rate=0.3, **ENCODERS[encoder], **options).double()
    for parameter in model.parameters():  # official zeros would hide a lost gradient
        parameter.data += 0.02 * torch.randn(parameter.shape, dtype=torch.float64)
    return model


def train(model: SimMIM, mask: Tensor, **options: object) -> dict[str, Tensor]:
    """Loss and gradients, with the same images and the same samples dropped each time."""
    torch.manual_seed(1)
    images = torch.randn(len(mask), 3, SIZE, SIZE, dtype=torch.float64)
    loss = model(images, mask, **options)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss} | dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def masks(encoder: str, cell: int, ratio: float = 0.6) -> Tensor:
    patch = ENCODERS[encoder]["patch_size"]
    return MaskGenerator(SIZE, cell, patch, ratio).batch(3, generator=torch.Generator().manual_seed(2))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    ("encoder", "cell"), [(name, cell) for name in ENCODERS for cell in (4, 8, 16) if (name, cell) != ("vit", 4)]
)
def test_each_leaves_loss_and_gradients_as_they_are(encoder: str, cell: int, ratio: float, shortcut: str) -> None:
    mask = masks(encoder, cell, ratio)
    expected = train(build(encoder, backend="reference"), mask)
    assert_same(train(build(encoder, shortcuts=()), mask), expected)
    assert_same(train(build(encoder, shortcuts=(shortcut,)), mask), expected)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_last_block_computes_the_masked_tokens_alone(encoder: str) -> None:
    mask = masks(encoder, 16)
    model = build(encoder)
    blocks = model.encoder.blocks if encoder == "vit" else model.encoder.layers[-1].blocks
    seen = []
    blocks[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    train(model, mask)
    expected = int(masked_tokens(mask, model.encoder_stride // model.patch_size)[0].sum())
    assert seen == [(3, expected, blocks[-1].mlp.fc2.out_features)]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_counts_given_or_counted_are_the_same(encoder: str) -> None:
    mask, stride = masks(encoder, 16), build(encoder).encoder_stride
    counts = MaskGenerator(SIZE, 16, ENCODERS[encoder]["patch_size"], 0.6, encoder_stride=stride).counts
    expected = train(build(encoder), mask)
    assert_same(train(build(encoder), mask, counts=counts), expected)
    assert_same(train(build(encoder, counts=counts), mask), expected)
    with pytest.raises(ValueError, match=r"counts say 3 visible patches an image, but the mask has \[\d+\]"):
        train(build(encoder), mask, counts=(3, counts[1]))
    with pytest.raises(ValueError, match=r"counts say 1 masked tokens an image, but the mask has \[\d+\]"):
        train(build(encoder), mask, counts=(counts[0], 1))


def test_images_may_have_different_counts() -> None:
    mask = masks("swin", 4)
    mask[0] = False
    mask[1, 0, 0] = True
    assert_same(train(build("swin"), mask), train(build("swin", backend="reference"), mask))


def test_tokens_are_counted_where_images_differ() -> None:
    mask = masks("swin", 4)  # cells of half an output token
    counts = MaskGenerator(SIZE, 4, 4, 0.6, encoder_stride=8).counts
    assert counts[1] is None
    assert_same(train(build("swin", counts=counts), mask), train(build("swin"), mask))


def test_lists_are_ascending_and_hold_every_masked_token() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.int64)
    mask[0, 3, 0] = mask[0, 0, 3] = mask[1, 1, 1] = 7
    visible, tokens = list_tokens(mask, 2, None)
    assert visible is None
    assert tokens.tolist() == [[1, 2], [0, 1]]


def test_nothing_is_counted_where_that_would_synchronise() -> None:
    assert list_tokens(torch.zeros(2, 4, 4, dtype=torch.bool, device="meta"), 2, None) == (None, None)


def test_an_unknown_shortcut_is_refused() -> None:
    with pytest.raises(ValueError, match="shortcuts must be one of patch_embed, last_block, head, got 'lastblock'"):
        build("swin", shortcuts=("lastblock",))
