"""Occupancy: by hand where one limit decides, and against NVIDIA's own calculator, whose header Triton ships."""

from __future__ import annotations

import subprocess
from itertools import product
from pathlib import Path

import pytest
import triton

from benchmarks.occupancy import KIB, LIMITS, Occupancy, occupancy
from simmim_fast.testing.offline import SHARED_MEMORY

HEADER = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
SOURCE = Path(__file__).with_name("nvidia_occupancy.cpp")


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        pytest.param(16, 0, 4, Occupancy(16, "warps", 1.0), id="warps"),
        pytest.param(16, 0, 1, Occupancy(32, "blocks", 0.5), id="blocks"),
        pytest.param(128, 0, 4, Occupancy(4, "registers", 0.25), id="registers"),
        pytest.param(129, 0, 4, Occupancy(3, "registers", 3 * 4 / 64), id="registers by the unit"),
        pytest.param(16, 113 * KIB, 4, Occupancy(2, "shared memory", 0.125), id="shared memory"),
        pytest.param(16, 113 * KIB + 1, 4, Occupancy(1, "shared memory", 0.0625), id="shared memory by the unit"),
        pytest.param(16, 228 * KIB, 4, Occupancy(0, "shared memory", 0.0), id="nothing fits"),
    ],
)
def test_one_limit_decides(registers: int, shared: int, warps: int, expected: Occupancy) -> None:
    assert occupancy(90, registers=registers, shared=shared, warps=warps) == expected


def test_agrees_with_nvidias_calculator(tmp_path: Path) -> None:
    program = tmp_path / "occupancy"
    subprocess.run(["g++", "-std=c++17", "-O0", "-I", HEADER, SOURCE, "-o", program], check=True)
    sizes = (0, 1, 1000, 17 * KIB, 99 * KIB + 7, 113 * KIB + 1, 163 * KIB)
    blocks = list(product(LIMITS, (24, 40, 72, 168, 255), sizes, (1, 2, 3, 4, 8, 16)))
    blocks = [one for one in blocks if one[1] * 32 * one[3] <= LIMITS[one[0]].registers]
    lines = [
        f"{capability // 10} {registers} {shared} {warps} {limits.warps} {limits.registers} {limits.shared}"
        f" {SHARED_MEMORY[capability]}"
        for capability, registers, shared, warps in blocks
        for limits in [LIMITS[capability]]
    ]
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    ours = [occupancy(c, registers=r, shared=s, warps=w).blocks for c, r, s, w in blocks]
    assert ours == [int(line) for line in done.stdout.split()]
    assert {0, 1, 2, 32} <= {*ours, 0}
