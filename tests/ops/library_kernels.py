"""Machine code of the CUDA C++ kernels in the compiled library."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from simmim_fast import _native
from simmim_fast.testing import offline

on_architectures = pytest.mark.parametrize(
    "architecture",
    ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_100", marks=pytest.mark.slow)],
)


def library_kernels(pattern: str, architecture: str) -> dict[str, str]:
    """The code of every kernel whose mangled name has the pattern, by that name; skips where none are compiled."""
    if (reason := _native.build_info()["cuda_reason"]) != "":
        pytest.skip(f"not run: the CUDA kernels are not compiled: {reason}")
    library = Path(_native.__file__).with_name("lib") / "ops_cuda.so"
    command = [offline.TOOLS / "cuobjdump", "-sass", "-arch", architecture, library]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = sass.split("Function : ")
    return {match[0]: body for body in functions if (match := re.match(rf"\S*{pattern}\S*", body))}
