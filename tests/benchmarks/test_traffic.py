"""The traffic counter's command line, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import traffic
from benchmarks.counting import Call, Traffic
from benchmarks.results import read_rows

SMALL = ["--model", "swin_micro_96", "--batch", "3"]


def test_prints_every_operator_and_appends_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "traffic.jsonl"
    traffic.main([*SMALL, "--json", str(path)])
    printed = capsys.readouterr().out
    (row,) = read_rows(path)
    assert row["arguments"] == {name: value for name, value in vars(traffic.parse(SMALL)).items() if name != "json"}
    assert str(tmp_path) not in str(row)
    assert "lower bound, not a measurement" in printed
    for name, op in row["ops"].items():
        assert re.search(rf"^{re.escape(name)} +{op['calls']} +{op['launches']} ", printed, re.MULTILINE)
    for quantity in ("calls", "launches", "flops", "bytes", "lower_bound_seconds"):
        assert row[quantity] == pytest.approx(sum(op[quantity] for op in row["ops"].values()))
    assert row["bytes"] == pytest.approx(row["bytes_fixed"] + 3 * row["bytes_per_image"])


def test_the_fast_model_moves_less_than_the_reference() -> None:
    fast, reference = (traffic.count_model("swin_micro_96", 2, "bf16", backend=b) for b in ("native", "reference"))
    assert any(call.op.startswith("simmim_fast.shifted_window_attention") for call in fast.calls)
    assert not any(call.op.startswith("simmim_fast.") for call in reference.calls)
    assert fast.nbytes < reference.nbytes
    assert len(fast.calls) < len(reference.calls)
    assert fast.saved < reference.saved


def test_parts_of_a_line() -> None:
    one, two = (Traffic((Call("op", 1, 0, 100 + 7 * batch),), saved=50 + 3 * batch) for batch in (4, 8))
    facts = traffic.summary(one, two, 4, peak=1.0, bandwidth=2.0)
    assert (facts["bytes"], facts["bytes_fixed"], facts["bytes_per_image"]) == (128, 100, 7)
    assert (facts["saved_bytes"], facts["saved_bytes_fixed"], facts["saved_bytes_per_image"]) == (62, 50, 3)
    assert facts["lower_bound_seconds"] == 64


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param(["--model", "resnet"], "invalid choice: 'resnet'", id="model"),
        pytest.param(["--batch", "0"], "--batch must be at least 1, got 0", id="batch"),
    ],
)
def test_refuses(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        traffic.parse(arguments)
    assert error in capsys.readouterr().err
