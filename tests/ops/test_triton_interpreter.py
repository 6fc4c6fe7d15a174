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


@pytest.mark.parametrize("speed", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", [name for name, op in OPS.items() if "triton" in op.implementations])
def test_kernels_in_the_interpreter(op: str, speed: str, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    tests = f"tests/ops/test_{op}.py"
    options = ["-m", f"interpreted and {speed}", "-n", "0", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", tests, *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    child = subprocess.run(
        command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout + child.stderr
    suite = ElementTree.parse(report).getroot()[0]
    assert int(suite.get("tests", 0)) > 0, f"{tests} has no test marked interpreted"
    assert int(suite.get("skipped", 0)) == 0, child.stdout
