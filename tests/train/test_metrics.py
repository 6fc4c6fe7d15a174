"""What is read off the device, and what a reading refuses."""

from __future__ import annotations

import math

import pytest
import torch

from simmim_fast.train.metrics import Readings


def readings_of(losses, norms=None):
    readings = Readings(images_per_update=8)
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        readings.add(torch.tensor(loss), torch.tensor(norm))
    return readings


def test_a_reading_averages_the_updates_since_the_last():
    readings = readings_of([5.0])
    readings.read(1)
    for loss in (1.0, 2.0):
        readings.add(torch.tensor(loss), torch.tensor(10 * loss))
    row = readings.read(3)
    assert row["loss"] == 1.5
    assert row["grad_norm"] == 15.0
    assert row["images_per_second"] > 0


@pytest.mark.parametrize(
    ("losses", "norms"),
    [([1.0, math.nan, math.nan], [1.0, 1.0, 1.0]), ([1.0, 1.0, 1.0], [1.0, math.inf, 1.0])],
    ids=["loss", "gradient"],
)
def test_the_first_step_that_is_not_finite_is_named(losses, norms):
    with pytest.raises(FloatingPointError, match="step 9: expected a finite loss and gradient"):
        readings_of(losses, norms).read(10)


def test_waiting_for_images_is_counted():
    readings = Readings(images_per_update=1)
    assert list(readings.waiting(["a", "b"])) == ["a", "b"]
    readings.add(torch.tensor(1.0), torch.tensor(1.0))
    assert 0 < readings.read(1)["data_wait"] < 1
