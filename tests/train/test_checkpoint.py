"""Checkpoints: complete or absent."""

from __future__ import annotations

import pytest
import torch

from simmim_fast.train import PretrainConfig, checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from simmim_fast.train.build import build_model

CONFIG = PretrainConfig(
    data="photos",
    out="run",
    model="vit",
    model_args={"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "use_mean_pooling": False},
    img_size=32,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(CONFIG)


def test_round_trip(model, tmp_path):
    place = save_checkpoint(tmp_path, model, CONFIG, {"step": 7})
    assert place == tmp_path / "checkpoints/step-000007"
    loaded = load_checkpoint(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_a_failure_while_writing_leaves_the_old_one_and_no_remains(model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, model, CONFIG, {"step": 7})

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "dump_config", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, model, CONFIG, {"step": 8})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000007"]
    load_checkpoint(tmp_path)


def test_the_newest_is_found_by_number(model, tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, model, CONFIG, {"step": step})
    assert find_checkpoint(tmp_path).name == "step-1000000"


def test_nothing_to_find(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder"):
        find_checkpoint(tmp_path)
