from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import ops
from benchmarks.results import RESULTS, ROOT, read_rows

CALL = ["--op", "masked_l1_loss", "--case", "vit", "--dtype", "fp32", "--device", "cpu", "--rounds", "3"]


def test_every_contestant_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    assert ops.main([*CALL, "--contestants", "eager", "native", "--json", str(path), "--page", str(page)]) == 0
    assert page.read_text("utf-8") == ops.render(read_rows(path))
    eager, native = read_rows(path)
    assert [row["contestant"] for row in (eager, native)] == ["eager", "native"]
    assert eager["times_faster_than"]["native"] * native["times_faster_than"]["eager"] == pytest.approx(1, rel=0.01)
    assert native["arguments"] == {"dtype": "fp32", "device": "cpu", "batch": 8, "rounds": 3}
    assert native["us"] >= native["us_least"] > 0
    assert native["gb_per_s"] > 0
    assert capsys.readouterr().out.count("masked_l1_loss, vit_base_224, fp32") == 2


def test_who_cannot_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    assert ops.main([*CALL, "--contestants", "eager", "triton", "--json", str(path)]) == 0
    assert "triton is off on cpu: masked_l1_loss: backend='triton' cannot run here" in capsys.readouterr().out
    assert [row["contestant"] for row in read_rows(path)] == ["eager"]


def test_nothing_is_timed_where_one_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(ops, "contestant", lambda *_: lambda **inputs: torch.tensor(7.0))
    assert ops.main([*CALL, "--contestants", "native", "--json", str(path)]) == 1
    assert "native is wrong by" in capsys.readouterr().err
    assert not path.exists()


def test_the_committed_page_is_made_of_the_committed_rows() -> None:
    assert (ROOT / "docs" / "ops.md").read_text("utf-8") == ops.render(read_rows(RESULTS / "ops.jsonl"))
