"""Learning rates against the traces of the official schedulers."""

from __future__ import annotations

import pytest
import torch

from simmim_fast.train import ScheduleConfig, build_schedule, set_learning_rates
from tests import golden_data

TRACES = golden_data.read_json("lr_schedules")


def schedule_of(name: str):
    trace = TRACES[name]
    config = ScheduleConfig(
        name=name,
        warmup_epochs=trace["warmup_epochs"],
        warmup_lr=trace["warmup_lr"],
        min_lr=trace["min_lr"],
        decay_epochs=trace["decay_epochs"],
        decay_rate=trace["decay_rate"],
        multisteps=tuple(trace["multisteps"]),
        gamma=trace["gamma"],
    )
    return build_schedule(config, trace["epochs"], trace["iters_per_epoch"]), trace


@pytest.mark.parametrize("name", TRACES)
def test_trace_equals_official(name):
    schedule, trace = schedule_of(name)
    rates = [schedule(update, trace["base_lr"]) for update in range(len(trace["lr"]))]
    assert rates == pytest.approx(trace["lr"], rel=1e-14, abs=0)


def test_cosine_with_warmup_prefix_starts_at_the_peak():
    schedule = build_schedule(ScheduleConfig(warmup_epochs=2, warmup_prefix=True), 10, 7)
    assert schedule(15, 1.0) == pytest.approx(1.0)
    assert schedule(70, 1.0) < 0.01


def test_every_group_keeps_its_own_peak():
    schedule, _ = schedule_of("step")
    groups = [{"params": [torch.zeros(1)], "lr": 1e-3}, {"params": [torch.zeros(1)], "lr": 5e-4}]
    optimizer = torch.optim.SGD(groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    assert set_learning_rates(optimizer, schedule, 0) == pytest.approx(1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-6, 1e-6])
    set_learning_rates(optimizer, schedule, 20)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 5e-4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_epochs": -1}, "schedule.warmup_epochs must be at least 0, got -1"),
        ({"name": "step", "decay_epochs": 0}, "schedule.decay_epochs must be positive, got 0"),
        ({"name": "multistep"}, "schedule.multisteps must hold at least one epoch"),
        ({"name": "poly"}, "schedule.name must be one of cosine, linear, step, multistep, got 'poly'"),
        ({"name": "cosinee"}, "got 'cosinee'; did you mean 'cosine'?"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**arguments)
