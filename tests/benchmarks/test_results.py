"""Rows of measurements: what they hold, and that they are whole lines."""

from __future__ import annotations

import subprocess
import types
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.results import ROOT, conditions, read_rows, write_row


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    first, second = (write_row(path, {"benchmark": "none", "value": value}) for value in (1, 2.5))
    assert read_rows(path) == [first, second]
    assert path.read_text().count("\n") == 2
    assert first["value"] == 1


def test_a_row_says_under_which_conditions_it_was_made(tmp_path: Path) -> None:
    row = write_row(tmp_path / "rows.jsonl", {"benchmark": "none"})
    assert row["conditions"].keys() == conditions().keys()
    assert row["conditions"]["load"] >= 0
    assert row["conditions"]["versions"]["torch"] == torch.__version__
    assert row["conditions"]["versions"].keys() >= {"transformers", "timm", "xformers"}
    assert row["conditions"]["threads"] == torch.get_num_threads()
    assert row["conditions"]["cpu"]
    if (ROOT / ".git").exists():
        assert len(row["conditions"]["commit"]) == 40
        assert row["conditions"]["dirty"] in (True, False)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        pytest.param(
            "1980, 2619, [N/A]\n", [{"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_limit_w": None}], id="N/A"
        ),
        pytest.param(FileNotFoundError("nvidia-smi"), [], id="no nvidia-smi"),
        pytest.param(subprocess.CalledProcessError(9, "nvidia-smi"), [], id="no driver"),
    ],
)
def test_clocks_that_are_not_told_cost_no_row(
    told: str | Exception, expected: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> types.SimpleNamespace:
        assert command[0] == "nvidia-smi"
        if isinstance(told, Exception):
            raise told
        return types.SimpleNamespace(stdout=told)

    conditions()  # what never changes is read before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results.subprocess, "run", run)
    assert write_row(tmp_path / "rows.jsonl", {"benchmark": "none"})["conditions"]["clocks"] == expected


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize(
    ("row", "error"),
    [
        pytest.param({"time": "now"}, "must leave time to write_row", id="time"),
        pytest.param({"value": float("nan")}, "JSON", id="nan"),
    ],
)
def test_a_row_that_is_refused_leaves_no_file(tmp_path: Path, row: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        write_row(tmp_path / "rows.jsonl", row)
    assert not (tmp_path / "rows.jsonl").exists()
