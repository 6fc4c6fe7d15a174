"""The pictures of a run, and the errors that stand in them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from simmim_fast import create_model
from simmim_fast.models.targets import norm_targets
from simmim_fast.report import draw_reconstruction, plot_run, reconstruct
from simmim_fast.report.pictures import _undo_norm_target

IDENTITY = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


@pytest.fixture
def model():
    torch.manual_seed(0)
    arguments = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "use_mean_pooling": False}
    return create_model("vit", img_size=32, **arguments).eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def left_half(images):
    mask = torch.zeros(len(images), 2, 2, dtype=torch.bool)
    mask[:, :, 0] = True
    return mask


def test_only_hidden_cells_are_filled_in(model, images):
    result = reconstruct(model, images, left_half(images), **IDENTITY)
    assert torch.equal(result.filled[..., 16:], images[..., 16:])
    assert torch.equal(result.masked[..., 16:], images[..., 16:])
    assert result.masked[..., :16].unique().tolist() == [0.5]


def test_errors_are_those_of_the_hidden_pixels(model, images):
    mask = left_half(images)
    result = reconstruct(model, images, mask, **IDENTITY)
    prediction = model.reconstruct(images, mask)
    expected = 255 * (prediction - images)[..., :16].abs().mean((1, 2, 3))
    assert torch.allclose(result.model_error, expected, rtol=1e-5)
    fill = images[..., 16:].mean((2, 3), keepdim=True)
    assert torch.allclose(result.mean_error, 255 * (fill - images)[..., :16].abs().mean((1, 2, 3)), rtol=1e-5)


def test_local_statistics_of_the_original_are_owned_up_to(model, images):
    model.norm_target, model.norm_target_patch_size = True, 5
    result = reconstruct(model, images, left_half(images), **IDENTITY)
    assert "given local mean and contrast" in result.summary()


def test_normalised_targets_come_back_as_pixels(images):
    assert torch.allclose(_undo_norm_target(norm_targets(images, 5), images, 5), images, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_picture_is_written(model, images, count, tmp_path):
    result = reconstruct(model, images[:count], left_half(images[:count]), **IDENTITY)
    path = draw_reconstruction(result, tmp_path / "picture.png", title="title")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors(1 << 20)) > 50


def test_loss_plot_of_a_run(tmp_path):
    rows = [{"step": s, "epoch": s / 5, "loss": 1 / s, "lr": 1e-3, "grad_norm": 1.0} for s in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Image.open(plot_run(tmp_path)) as picture:
        assert picture.size[0] > 300
