"""The Triton kernels on the CPU: each op's tests again, in a process where Triton interprets.

By hand: TRITON_INTERPRET=1 python -m pytest tests/ops -m interpreted
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from simmim_fast.ops import OPS

ROOT = Path(__file__).parents[2]
WITH_KERNELS = [name for name, op in OPS.items() if "triton" in op.implementations]


@pytest.mark.parametrize("name", ["every_op", "every_op_bytes", "every_op_memory", *WITH_KERNELS])
def test_kernels_in_the_interpreter(name: str, tmp_path: Path) -> None:
    run_interpreted(name, "not slow", tmp_path)


@pytest.mark.slow
def test_kernels_in_the_interpreter_slowly(tmp_path: Path) -> None:
    run_interpreted("every_op", "slow", tmp_path)


def run_interpreted(name: str, speed: str, tmp_path: Path) -> None:
    """Run the tests of a file that are marked interpreted; none may be missing or skipped."""
    report = tmp_path / "report.xml"
    tests = f"tests/ops/test_{name}.py"
    options = ["-m", f"interpreted and {speed}", "-n", "0", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", tests, *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    child = subprocess.run(
        command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout + child.stderr
    suite = ElementTree.parse(report).getroot()[0]
    assert int(suite.get("tests", 0)) > 0, f"{tests} has no test marked interpreted"
    assert int(suite.get("skipped", 0)) == 0, child.stdout
