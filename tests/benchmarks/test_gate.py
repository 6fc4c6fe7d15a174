"""Nothing is timed where the tests of what is measured fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gate
from benchmarks.results import ROOT


@pytest.mark.parametrize("passes", [True, False], ids=["passing", "failing"])
def test_tests_come_first(tmp_path: Path, passes: bool) -> None:
    path = tmp_path / "test_one.py"
    path.write_text(f"def test_one():\n    assert {passes}\n")
    if passes:
        gate.require([str(path)], "cpu")
        return
    with pytest.raises(SystemExit, match="nothing is timed: the tests of what would be measured fail"):
        gate.require([str(path)], "cpu")
    for choice in ("passed", "smoke-passed"):
        gate.require([str(path)], "cpu", choice)


@pytest.mark.parametrize("choice", ["run", "passed"])
def test_pytest_times_no_op_whose_tests_fail(tmp_path: Path, choice: str) -> None:
    failing = tmp_path / "test_one.py"
    failing.write_text("def test_one():\n    assert False\n")
    plugin = f"from benchmarks import gate\n\ngate.of_ops = lambda ops: [{str(failing)!r}] * (ops == ['bias_gelu'])\n"
    (tmp_path / "failing_tests.py").write_text(plugin)
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_bias_gelu.py", "-p", "failing_tests", "-q"]
    command += ["--benchmark-only", "-k", "host and eager", f"--tests={choice}", "-p", "no:cacheprovider"]
    # Workers of pytest-xdist, of which this may be run by one, time nothing.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = {**outside, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    done = subprocess.run(command, cwd=ROOT, env=found, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert (done.returncode == 0) == (choice == "passed"), printed
    assert ("nothing is timed: the tests of what would be measured fail" in printed) == (choice == "run")
    assert ("1 passed" in printed) == (choice == "passed")


def test_no_tests_are_no_pass(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing is timed"):
        gate.require([str(tmp_path / "test_absent.py")], "cpu")


def test_the_files_exist() -> None:
    from benchmarks.cases import CASES

    for path in (*gate.MODELS, *gate.DATA, *gate.of_ops(CASES)):
        assert (ROOT / path).is_file(), path
