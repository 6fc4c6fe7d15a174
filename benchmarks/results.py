"""Results are data: one line of JSON a measurement, on the disk as soon as it is made, with what it was made under."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from simmim_fast.info import collect

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What rows, and what `benchmarks.report` makes of them, change.
_NO_CODE = (":!benchmarks/results", ":!docs", ":!*.md", ":!simmim_fast/_measured.py")
PEERS = ("transformers", "timm", "xformers")
_CLOCKS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_limit_w": "power.limit"}


def begin() -> None:
    """Note the machine and the commit for all rows of this process: called before anything is tested or measured.

    What is edited or committed during a long race is not what was imported before it.
    """
    _fixed_conditions.cache_clear()
    _fixed_conditions()


def write_row(path: str | os.PathLike[str], row: Mapping[str, Any]) -> dict[str, Any]:
    """Append a measurement to a file of JSON lines, with the time and the conditions, and flush it to the disk.

    Args:
        path: The file; it and its folder are created where they are missing.
        row: What was measured, and the arguments that it was measured with; JSON-serialisable. That of a contestant
            that did not run has "absent", why, in the place of numbers.

    Returns:
        The row as it was written.

    Raises:
        ValueError: The row names "time" or "conditions" itself, or holds a number that JSON does not have.
        TypeError: The row cannot be written as JSON.
    """
    if taken := {"time", "conditions"} & row.keys():
        raise ValueError(f"row must leave {', '.join(sorted(taken))} to write_row, got {sorted(row)}")
    whole = {**row, "time": datetime.now(UTC).isoformat(timespec="seconds"), "conditions": conditions()}
    line = json.dumps(whole, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return whole


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, in the order in which they were written; none where there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def conditions() -> dict[str, Any]:
    """What a measurement was made under; what never changes as it was when `begin`, or this, was called first.

    Returns:
        "cpu", "gpus" and "clocks" (of the GPUs, now), "versions" (of simmim_fast, python, torch, triton, CUDA, the
        driver and the peers; None where absent), "simd" of the compiled library, "threads", "load" (processes that ran
        or waited for a core over the last minute, this one included), "commit" and "dirty" (whether tracked files
        differ from it, rows and what is made of them aside); the last two are None outside a git checkout.
    """
    now = {"clocks": _clocks(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)}
    return {**_fixed_conditions(), **now}


@functools.cache
def _fixed_conditions() -> dict[str, Any]:
    facts = collect()
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *_NO_CODE)
    return {
        "cpu": _cpu(),
        "gpus": facts["gpus"],
        "versions": {**facts["versions"], **{name: _version(name) for name in PEERS}},
        "simd": facts["native"]["simd"],
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else status != "",
    }


def is_same_code(commit: str | None) -> bool:
    """Whether the tracked files are a commit's, rows and what is made of them aside.

    Args:
        commit: As of `conditions`; None, where git knows nothing, is the same where it still knows nothing.
    """
    if commit is None:
        return _git("rev-parse", "HEAD") is None
    return _git("diff", "--quiet", commit, "--", ".", *_NO_CODE) is not None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's name, as the operating system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _clocks() -> list[dict[str, float | None]]:
    """Clocks of the GPUs in MHz and their power limits in W, None where one is not told; empty where nothing is."""
    if not torch.cuda.is_available():
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS.values())}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [dict(zip(_CLOCKS, map(_number, line.split(",")), strict=False)) for line in output.splitlines()]


def _number(text: str) -> float | None:
    """What nvidia-smi tells: "[N/A]" or "[Not Supported]" where it cannot."""
    try:
        return float(text)
    except ValueError:
        return None


def checkout(path: Path | None) -> str | None:
    """What identifies another project's checkout: its commit, or its path where git does not know it."""
    return None if path is None else _git("rev-parse", "HEAD", folder=path) or str(path)


def _git(*arguments: str, folder: Path = ROOT) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
