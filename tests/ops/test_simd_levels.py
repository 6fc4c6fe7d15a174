"""The SIMD levels below the processor's: each in a process of its own, since the level is chosen on import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from simmim_fast import _native
from simmim_fast.ops import OPS

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
# Instructions of x86-64-v3 and later that g++ emits for ordinary code.
BEYOND_BASE = re.compile(r"v\w+|andn|bzhi|mulx|movbe|rorx|sarx|shlx|shrx|k(mov|or|and)\w*")


@pytest.mark.parametrize("level", LEVELS)
def test_every_native_op_at_this_level(level: str) -> None:
    if LEVELS.index(level) > LEVELS.index(_native.simd_level()):
        pytest.skip(f"not run: this process has no level above {_native.simd_level()}")
    wish = "default" if level == "baseline" else level
    child = subprocess.run(
        [sys.executable, "-m", "tests.ops.simd_levels", level],
        env=os.environ | {"ATEN_CPU_CAPABILITY": wish},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == sorted(op for op in OPS if "native" in OPS[op].implementations)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
def test_wide_instructions_lie_in_the_kernels_of_their_level() -> None:
    """An inline function that kernels of a level share with the rest would be an illegal instruction elsewhere."""
    library = Path(_native.__file__).with_name("lib") / "ops_cpu.so"
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(library)]
    wide = Counter()
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if symbol := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = symbol[1]
        elif (instruction := re.match(r"\s+[0-9a-f]+:\s+(\S+)", line)) and BEYOND_BASE.fullmatch(instruction[1]):
            wide[function] += 1
    # A copy that the compiler has made for constant arguments is private to its file.
    apart = re.compile(r"simmim_fast::(avx2|avx512|avx512_bf16)::|at<\(simmim_fast::Simd\)[123]>|\[clone \.constprop")
    assert wide or _native.simd_level() == "baseline"
    assert not {name: count for name, count in wide.items() if not apart.search(name)}
