"""Two commits side by side: a ratio that fell is found, and only ratios of the same measurement are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from tests.benchmarks.made_rows import CONDITIONS, at, step_row

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


def test_rows_with_changed_files_are_not_the_commit(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(measured(BEFORE, 2.0), measured(AFTER, 2.0), at(measured(AFTER, 1.0), dirty=True)) == 0
    assert "left out: 1 rows of bbbbbbbbbb, measured with changed files" in capsys.readouterr().out
    assert run(measured(BEFORE, 2.0), at(measured(BEFORE, 1.0), dirty=True), measured(AFTER, 1.5)) == 1


def absent(commit: str, contestant: str) -> dict[str, Any]:
    """Why a contestant did not run in the race of `measured`."""
    row = {**measured(commit, 2.0), "contestant": contestant, "absent": "out of memory"}
    return {name: value for name, value in row.items() if name != "times_faster_than"}


@pytest.mark.parametrize(
    "after",
    [
        pytest.param([absent(AFTER, "fast")], id="ours is absent"),
        pytest.param([{**measured(AFTER, 2.0), "times_faster_than": {"timm": 2.0}}], id="the opponent is missing"),
        pytest.param(
            [{**measured(AFTER, 2.0), "times_faster_than": {}}, absent(AFTER, "reference")], id="the opponent is absent"
        ),
    ],
)
def test_a_ratio_that_was_lost(after: list[dict[str, Any]], run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(measured(BEFORE, 2.0), *after) == 1
    printed = capsys.readouterr().out
    assert "lost  2.00x to -  fast over reference: step, " in printed
    assert "0 of 0 ratios fell by more than 5%, 1 were lost" in printed


def test_a_case_that_was_not_raced_is_not_lost(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(measured(BEFORE, 2.0), measured(BEFORE, 2.0, batch=9), measured(AFTER, 2.0)) == 0
    assert "lost " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "options", "error"),
    [
        pytest.param([measured(BEFORE, 2.0)], (), "no row was measured at bbbbbbbbbb", id="no rows"),
        pytest.param(
            [measured(BEFORE, 2.0), at(measured(AFTER, 2.0), dirty=True)],
            (),
            "no row was measured at bbbbbbbbbb; 1 were with changed files, which are not that commit",
            id="changed files",
        ),
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
