"""The configuration: YAML both ways, official files, refusals."""

from __future__ import annotations

import pytest

from simmim_fast.train import OptimizerConfig, PretrainConfig, ScheduleConfig, dump_config, read_config
from simmim_fast.train.official import read_official_options

OFFICIAL = """
MODEL:
  TYPE: swin
  NAME: simmim_pretrain
  DROP_PATH_RATE: 0.0
  SWIN: {EMBED_DIM: 128, DEPTHS: [2, 2, 18, 2], NUM_HEADS: [4, 8, 16, 32], WINDOW_SIZE: 6}
DATA: {IMG_SIZE: 192, MASK_PATCH_SIZE: 32, MASK_RATIO: 0.6}
TRAIN:
  EPOCHS: 800
  WARMUP_EPOCHS: 10
  BASE_LR: 1e-4
  WARMUP_LR: 5e-7
  LR_SCHEDULER: {NAME: multistep, GAMMA: 0.1, MULTISTEPS: [700,]}
TAG: swin_base
"""


def test_yaml_round_trip(tmp_path):
    config = PretrainConfig(
        data="photos",
        out="run",
        model_args={"depths": [2, 2], "qk_scale": None},
        img_size=(64, 96),
        mean=(0.5,),
        clip_grad=None,
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95)),
        schedule=ScheduleConfig(name="multistep", multisteps=(70, 90)),
    )
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert read_config(tmp_path / "run.yaml") == config


def test_official_file(tmp_path):
    (tmp_path / "official.yaml").write_text(OFFICIAL)
    options = read_official_options(tmp_path / "official.yaml", ["TRAIN.EPOCHS", "100", "DATA.DATA_PATH", "photos"])
    assert options["model"] == "swin"
    assert options["img_size"] == 192
    assert options["model_args"]["depths"] == [2, 2, 18, 2]
    assert options["epochs"] == 100
    assert options["data"] == "photos"
    assert options["optimizer.base_lr"] == 1e-4
    assert options["schedule.name"] == "multistep"
    assert tuple(options["schedule.multisteps"]) == (700,)
    assert options["accumulation_steps"] == 1


@pytest.mark.parametrize(("kind", "after_the_warmup"), [("swin", False), ("vit", False), ("swinv2", True)])
def test_the_cosine_starts_where_the_repository_of_the_encoder_starts_it(kind, after_the_warmup, tmp_path):
    (tmp_path / "official.yaml").write_text(f"MODEL: {{TYPE: {kind}}}")
    assert read_official_options(tmp_path / "official.yaml")["schedule.warmup_prefix"] is after_the_warmup


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"mask_ratio": 1.5}, "mask_ratio must be above 0 and at most 1, got 1.5"),
        ({"clip_grad": 0.0}, "clip_grad must be positive, or null for no clipping, got 0.0"),
        ({"epochs": 5}, "schedule.warmup_epochs must be at most epochs=5, got 10.0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(data="photos", out="run", **arguments)
