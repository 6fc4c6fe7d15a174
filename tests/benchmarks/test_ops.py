from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import op_page, ops
from benchmarks.results import read_rows

CALL = [
    "--op",
    "masked_l1_loss",
    "--case",
    "vit",
    "--dtype",
    "fp32",
    "--device",
    "cpu",
    "--rounds",
    "3",
    "--tests",
    "passed",
]


def test_every_contestant_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    assert ops.main([*CALL, "--host", "--contestants", "eager", "native", "--results", str(path)]) == 0
    eager, native, *host = read_rows(path)
    assert [row["contestant"] for row in host] == ["eager", "native"]
    assert min(row["us"] for row in host) > 0
    assert op_page.render([eager, native, *host]).count("| masked_l1_loss |") == 4
    assert native["limit_share"] > eager["limit_share"] * eager["us"] / native["us"] * 0.99
    assert [row["contestant"] for row in (eager, native)] == ["eager", "native"]
    assert eager["times_faster_than"]["native"] * native["times_faster_than"]["eager"] == pytest.approx(1, rel=0.01)
    assert native["arguments"] == {"dtype": "fp32", "device": "cpu", "batch": 8, "rounds": 3}
    assert native["us"] >= native["us_least"] > 0
    assert native["gb_per_s"] > 0
    assert capsys.readouterr().out.count("masked_l1_loss, vit_base_224, fp32") == 2


def test_who_cannot_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    assert ops.main([*CALL, "--contestants", "eager", "triton", "--results", str(path)]) == 0
    assert "triton is off on cpu: masked_l1_loss: backend='triton' cannot run here" in capsys.readouterr().out
    assert [row["contestant"] for row in read_rows(path)] == ["eager"]


def test_nothing_is_timed_where_one_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(ops, "contestant", lambda *_: lambda **inputs: torch.tensor(7.0))
    assert ops.main([*CALL, "--contestants", "native", "--results", str(path)]) == 1
    assert "native is wrong by" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param(["--rounds", "0"], "--rounds must be at least 1, got 0", id="rounds"),
        pytest.param(["--case", "resnet"], "--case must be part of a case's name", id="case"),
        pytest.param(["--contestants", "cudnn"], "--contestants must be of .*; got cudnn", id="contestants"),
    ],
)
def test_bad_options_are_named(options: list[str], error: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        ops.parse(options)
    assert re.search(error, capsys.readouterr().err)
