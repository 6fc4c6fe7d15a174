"""Correct first: the tests of what is measured, run before anything is timed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.results import ROOT

MODELS = ("tests/models/test_parity.py", "tests/models/test_cuda.py")
DATA = ("tests/data/test_images.py", "tests/data/test_loader.py")
OPTION = {  # of runners, and of pytest in benchmarks/
    "choices": ("run", "passed", "smoke-passed"),
    "default": "run",
    "help": "run the tests of what is measured first, or take the caller's word that they, or the smoke tests alone, "
    "passed; rows have the choice (default: run)",
}
LINES = 25  # of the tests' output that are shown where they fail


def of_ops(ops: Sequence[str]) -> tuple[str, ...]:
    """The tests of these ops."""
    return tuple(f"tests/ops/test_{op}.py" for op in ops)


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option that says whether the caller has run the tests."""
    parser.add_argument("--tests", **OPTION)


def require(tests: Sequence[str], device: str, choice: str = "run") -> None:
    """Run tests, and leave the program with the end of their output where one fails or none ran.

    Args:
        tests: Files, from the root of the checkout.
        device: "cpu", or "cuda", where the tests that need a GPU run as well.
        choice: "run"; anything else does nothing.
    """
    if choice != "run":
        return
    print(f"testing first: {' '.join(tests)}", flush=True)
    chosen = "not slow and not fuzz" + ("" if device == "cuda" else " and not gpu")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", chosen, *tests]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        sys.exit("\n".join((*lines[-LINES:], "nothing is timed: the tests of what would be measured fail")))
