"""The traffic counter's command line, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import traffic
from benchmarks.counting import Call, Traffic
from benchmarks.models import build
from benchmarks.results import RESULTS, ROOT, read_rows

SMALL = ["--model", "swin_micro_96", "--batch", "3"]


def test_prints_every_operator_and_appends_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "traffic.jsonl", tmp_path / "traffic.md"
    traffic.main([*SMALL, "--json", str(path), "--page", str(page)])
    printed = capsys.readouterr().out
    (row,) = read_rows(path)
    assert (row["arguments"]["model"], row["arguments"]["batch"]) == ("swin_micro_96", 3)
    assert page.read_text("utf-8") == traffic.render([row])
    assert str(tmp_path) not in str(row)
    assert "lower bound, not a measurement" in printed
    for name, op in row["ops"].items():
        assert re.search(rf"^{re.escape(name)} +{op['calls']} +{op['launches']} ", printed, re.MULTILINE)
    for quantity in ("calls", "launches", "flops", "bytes", "lower_bound_seconds"):
        assert row[quantity] == pytest.approx(sum(op[quantity] for op in row["ops"].values()))
    assert row["bytes"] == pytest.approx(row["bytes_fixed"] + 3 * row["bytes_per_image"])


def test_the_fast_model_moves_less_than_the_reference() -> None:
    (fast,), (reference,) = (
        traffic.count_model(build("swin_micro_96", backend=backend), [2], "bf16") for backend in ("native", "reference")
    )
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
        pytest.param(["--page", "page.md"], "--page needs --json", id="page without rows"),
    ],
)
def test_refuses(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        traffic.parse(arguments)
    assert error in capsys.readouterr().err


def test_the_official_code_is_asked_for_by_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="official must be a checkout of microsoft/SimMIM"):
        traffic.main([*SMALL, "--official", str(tmp_path)])
    with pytest.raises(ValueError, match="encoder of microsoft/SimMIM"):
        traffic.main(["--model", "swinv2_base_192", "--official", str(tmp_path)])


def test_counts_do_not_depend_on_those_before() -> None:
    alone = traffic.count_model(build("vit_micro_96"), [2], "bf16")
    again = traffic.count_model(build("vit_micro_96"), [4, 2], "bf16")
    assert alone == again[1:]


def test_the_committed_page_is_made_of_the_committed_rows() -> None:
    page = (ROOT / "docs" / "traffic.md").read_text("utf-8")
    assert page == traffic.render(read_rows(RESULTS / "traffic.jsonl"))
