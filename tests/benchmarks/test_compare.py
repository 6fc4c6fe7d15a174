"""Two commits side by side: a ratio that fell is found, and only ratios of the same measurement are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from tests.benchmarks.made_rows import CONDITIONS, step_row

BEFORE, AFTER = "a" * 40, "b" * 40


def measured(commit: str, ratio: float, machine: str = "a processor", **arguments: Any) -> dict[str, Any]:
    row = step_row("cpu", "fast", 100.0, {"reference": ratio, "fast_compiled": 9.0}, **arguments)
    return {**row, "conditions": {**CONDITIONS, "commit": commit, "cpu": machine}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*rows: dict[str, Any], options: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(compare, "read_rows", lambda path: rows if path.name == "step.jsonl" else [])
        return compare.main([BEFORE[:10], AFTER[:10], "--results", str(tmp_path), *options])

    return run


@pytest.mark.parametrize(("ratio", "status"), [(2.0, 0), (1.91, 0), (1.89, 1), (3.0, 0)])
def test_a_ratio_that_fell(ratio: float, status: int, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(measured(BEFORE, 2.0), measured(AFTER, ratio)) == status
    printed = capsys.readouterr().out
    assert f"{status} of 1 ratios fell by more than 5%" in printed
    assert f"2.00x to {ratio:.2f}x  fast over reference: step, " in printed


def test_slack_is_an_option(run: Any) -> None:
    assert run(measured(BEFORE, 2.0), measured(AFTER, 1.7), options=("--slack", "0.2")) == 0


def test_the_last_measurement_at_a_commit_counts(run: Any) -> None:
    assert run(measured(BEFORE, 9.0), measured(BEFORE, 2.0), measured(AFTER, 2.0)) == 0


@pytest.mark.parametrize(
    ("rows", "options", "error"),
    [
        pytest.param([measured(BEFORE, 2.0)], (), "no row of ours was measured at bbbbbbbbbb", id="no rows"),
        pytest.param(
            [measured(BEFORE, 2.0), measured(AFTER, 1.0, "another")], (), "have no measurement in common", id="machine"
        ),
        pytest.param(
            [measured(BEFORE, 2.0), measured(AFTER, 1.0, batch=9)], (), "have no measurement in common", id="batch"
        ),
        pytest.param([], ("--slack", "1"), "--slack must be from 0 to below 1, got 1.0", id="slack"),
    ],
)
def test_nothing_to_compare_is_an_error(
    rows: list[dict[str, Any]], options: tuple[str, ...], error: str, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*rows, options=options)
    assert stopped.value.code == 2
    assert error in capsys.readouterr().err
