"""The configuration: YAML both ways, refusals."""

from __future__ import annotations

import pytest

from simmim_fast.train import OptimizerConfig, PretrainConfig, ScheduleConfig, dump_config, read_config


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"mask_ratio": 1.5}, "mask_ratio must be above 0 and at most 1, got 1.5"),
        ({"clip_grad": 0.0}, "clip_grad must be positive, or null for no clipping, got 0.0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"precision": "fp16"}, "precision must be one of bf16, fp32, got 'fp16'; did you mean 'bf16'?"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, got 'gpu'"),
        (
            {"epochs": 5, "schedule": ScheduleConfig(warmup_epochs=10)},
            "schedule.warmup_epochs must be at most epochs=5, got 10",
        ),
        (
            {"schedule": ScheduleConfig(name="multistep", multisteps=(5,))},
            r"schedule.multisteps must hold no epoch within the warm-up \(schedule.warmup_epochs=10.0\), got \[5\]",
        ),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(data="photos", out="run", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "lamb"}, "optimizer.name must be one of adamw, sgd, got 'lamb'"),
        ({"name": "adam"}, "got 'adam'; did you mean 'adamw'?"),
        ({"betas": (0.9, 1.0)}, "optimizer.betas must be at least 0 and below 1, got 1.0"),
        ({"eps": -1e-8}, "optimizer.eps must be at least 0, got -1e-08"),
    ],
)
def test_the_optimizer_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimizerConfig(lr="fast"), "optimizer.lr must be a number or None, got 'fast'"),
        (lambda: OptimizerConfig(betas=0.9), "optimizer.betas must be a pair of numbers, got 0.9"),
        (lambda: ScheduleConfig(warmup_prefix=1), "schedule.warmup_prefix must be a boolean, got 1"),
        (lambda: PretrainConfig(data="photos", out="run", epochs=1.5), "epochs must be an integer, got 1.5"),
        (lambda: PretrainConfig(data="photos", out="run", epochs=True), "epochs must be an integer, got True"),
        (lambda: PretrainConfig(data=None, out="run"), "data must be a string, got None"),
        (lambda: PretrainConfig(data="photos", out="run", mean=0.5), "mean must be a list of numbers or None, got 0.5"),
    ],
)
def test_values_of_another_type_are_refused(build, message):
    with pytest.raises(TypeError, match=message):
        build()


@pytest.mark.parametrize(("epochs", "warmup"), [(5, 0.5), (100, 10), (800, 10)])
def test_the_warm_up_is_a_tenth_of_the_run_and_ten_epochs_at_most(epochs, warmup):
    config = PretrainConfig(data="photos", out="run", epochs=epochs)
    assert config.schedule.warmup(epochs) == pytest.approx(warmup)
