"""Rows of measurements: what they hold, and that they are whole lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
    assert row["conditions"]["threads"] == torch.get_num_threads()
    assert row["conditions"]["cpu"]
    if (ROOT / ".git").exists():
        assert len(row["conditions"]["commit"]) == 40
        assert row["conditions"]["dirty"] in (True, False)


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
