"""Nothing is timed where the tests of what is measured fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gate


@pytest.mark.parametrize("passes", [True, False], ids=["passing", "failing"])
def test_tests_come_first(tmp_path: Path, passes: bool) -> None:
    path = tmp_path / "test_one.py"
    path.write_text(f"def test_one():\n    assert {passes}\n")
    if passes:
        gate.require([str(path)], "cpu")
        return
    with pytest.raises(SystemExit, match="nothing is timed: the tests of what would be measured fail"):
        gate.require([str(path)], "cpu")
    gate.require([str(path)], "cpu", "passed")


def test_no_tests_are_no_pass(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing is timed"):
        gate.require([str(tmp_path / "test_absent.py")], "cpu")


def test_the_files_exist() -> None:
    from benchmarks.cases import CASES
    from benchmarks.results import ROOT

    for path in (*gate.MODELS, *gate.DATA, *gate.of_ops(CASES)):
        assert (ROOT / path).is_file(), path
