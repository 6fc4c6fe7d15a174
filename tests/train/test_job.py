"""What a run is put together from: every option reaches its part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from simmim_fast.train import PretrainConfig, ScheduleConfig, prepare
from simmim_fast.train.build import build_model

TINY = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}


@pytest.fixture
def prepared(tmp_path):
    """Prepares a run on four white images."""
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.fromarray(np.full((40, 40, 3), 255, dtype=np.uint8)).save(tmp_path / f"photos/{number}.png")

    def prepare_run(**options):
        settings = {"model": "swin", "model_args": TINY, "img_size": 32, "mask_patch_size": 8, "batch_size": 4}
        settings |= {"epochs": 1, "workers": 0, "device": "cpu", "precision": "fp32"}
        config = PretrainConfig(
            data=str(tmp_path / "photos"),
            out=str(tmp_path / "run"),
            schedule=ScheduleConfig(warmup_epochs=0),
            **{**settings, **options},
        )
        job = prepare(config)
        assert not (tmp_path / "run").exists()
        return job

    return prepare_run


def weights(job):
    return torch.cat([parameter.flatten() for parameter in job.model.parameters()])


def first_update(job):
    ((images, mask),) = next(iter(job.updates))
    return images, mask


def test_the_seed_is_that_of_weights_and_masks(prepared):
    one, same, other = prepared(seed=1), prepared(seed=1), prepared(seed=2)
    assert torch.equal(weights(one), weights(same))
    assert not torch.equal(weights(one), weights(other))
    assert torch.equal(first_update(one)[1], first_update(same)[1])
    assert not torch.equal(first_update(one)[1], first_update(other)[1])


def test_images_are_normalised_as_asked(prepared):
    images, _ = first_update(prepared(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0)))
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.25, 4), (0.5, 8), (1.0, 16)])
def test_the_ratio_of_hidden_cells_is_the_one_asked_for(ratio, hidden, prepared):
    _, mask = first_update(prepared(mask_ratio=ratio))
    assert mask.sum((1, 2)).tolist() == [hidden * 4] * 4  # cells of 2 x 2 patches


def test_trying_the_model_out_leaves_it_in_training_and_draws_nothing(prepared):
    job = prepared(model_args={**TINY, "drop_path_rate": 0.5})
    drawn = torch.rand(1)
    assert job.model.training
    torch.manual_seed(job.config.seed)
    build_model(job.config)
    assert torch.equal(torch.rand(1), drawn)


def test_a_backend_that_cannot_run_here_is_refused(prepared):
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here"):
        prepared(model_args={**TINY, "backend": "triton"})


def test_the_model_knows_how_much_the_masks_hide(prepared):
    job = prepared(mask_ratio=0.5)  # 8 of 16 cells of 2 x 2 patches, each an output token
    assert job.model.counts == (32, 8)
