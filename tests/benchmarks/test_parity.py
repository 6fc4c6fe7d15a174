"""The parity runner: that it tells a wrong model from rounding, and that every run sees the same images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import parity
from benchmarks.models import build, masks_for
from benchmarks.results import read_rows

CALL = ["--device", "cpu", "--models", "swin_micro_96", "--dtype", "fp32", "--batch", "2", "--steps", "4"]


@pytest.fixture(autouse=True)
def noise_for_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(parity, "crops", lambda size, count: noise)


def test_a_comparison_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parity.main([*CALL, "--tests", "passed", "--results", str(tmp_path / "rows.jsonl")])
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row["arguments"] == {
        "model": "swin_micro_96",
        "dtype": "fp32",
        "batch": 2,
        "device": "cpu",
        "steps": 4,
        "lr": 5e-4,
        "runs": list(parity.RUNS),
        "tests": "passed",
    }
    assert list(row["losses"]) == list(parity.RUNS)
    assert {len(curve) for curve in row["losses"].values()} == {4}
    assert list(row["gaps"]) == ["fast", "reordered", "precise"]
    for gap in row["gaps"].values():
        assert 0 <= gap["median"] <= gap["largest"] < 1e-3
        assert 1 <= gap["step"] <= 4
    assert row["gaps"]["precise"]["largest"] > 0
    assert capsys.readouterr().out.count("\nfast ") == 1


def test_gaps_are_relative_to_the_reference() -> None:
    curves = {"reference": [2.0, 1.0, 1.0], "fast": [2.0, 1.5, 0.9]}
    gap = parity.gaps(curves)["fast"]
    assert (gap["largest"], gap["step"]) == (0.5, 2)
    assert gap["median"] == pytest.approx(0.1)
    assert gap["end"] == pytest.approx(0.1)


def test_every_run_sees_the_same() -> None:
    masks = masks_for(build("swin_micro_96"))
    photographs = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 96, 96)
    first, second = (list(parity.batches(masks, photographs, {"steps": 3, "batch": 2})) for _ in range(2))
    for (images, mask), (again, mask_again) in zip(first, second, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(mask, mask_again)
    assert not torch.equal(first[0][1], first[1][1])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param(["--steps", "0"], "--steps must be at least 1, got 0", id="steps"),
        pytest.param(["--lr", "nan"], "--lr must be positive, got nan", id="lr"),
        pytest.param(["--runs", "fast"], "--runs must hold reference and another, got fast", id="runs"),
    ],
)
def test_bad_options_are_named(options: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parity.parse(options)
    assert error in capsys.readouterr().err
