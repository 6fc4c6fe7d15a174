"""What is installed, what was compiled, and which backend each op uses: `simmim-fast info`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch

import simmim_fast
from simmim_fast import _native
from simmim_fast._backends import BACKENDS, ENVIRONMENT_VARIABLE, NO_CUDA_DEVICE, Op, choose, refusal
from simmim_fast.ops import OPS

_NO_DROPOUT = "no kernel drops attention weights: in training, models with attention dropout above 0 run the reference"
_LIMITS = {"shifted_window_attention": _NO_DROPOUT, "biased_attention": _NO_DROPOUT}
_ENVIRONMENT = (ENVIRONMENT_VARIABLE, "TRITON_INTERPRET", "ATEN_CPU_CAPABILITY")


def collect() -> dict[str, Any]:
    """Facts about this installation, as JSON has them.

    Returns:
        "versions": of simmim_fast, python, torch, triton, CUDA (of torch) and the driver; None where absent.
        "native": the compiled library, as `_native.build_info` has it, with "simd", the level of the CPU kernels.
        "gpus": name, compute capability and GiB of each.
        "environment": what SIMMIM_FAST_BACKEND, TRITON_INTERPRET and ATEN_CPU_CAPABILITY are set to.
        "ops": for each op, for "cpu" and "cuda", the backend of an "auto" call on float32 ("use", or None) and on
        float64 ("float64"), why there is none ("error", or None) and why each backend that is off is off ("off").
        "limits": for each op that has one, what its backends other than the reference never do.
    """
    return {
        "versions": _versions(),
        "native": {**_native.build_info(), "simd": _native.simd_level()},
        "gpus": _gpus(),
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "ops": {name: {device: _backends(op, device) for device in ("cpu", "cuda")} for name, op in OPS.items()},
        "limits": _LIMITS,
    }


def render(facts: Mapping[str, Any]) -> str:
    """The facts of `collect` as lines of text."""
    return "\n".join(_lines(facts))


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    yield from _section("versions", facts["versions"])
    yield from _section("native", facts["native"])
    yield "gpus"
    yield from (
        f"  {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB" for gpu in facts["gpus"]
    )
    if not facts["gpus"]:
        yield f"  {NO_CUDA_DEVICE}"
    yield from _section("environment", facts["environment"])
    yield "ops"
    for op, devices in facts["ops"].items():
        yield f"  {op}"
        for device, backends in devices.items():
            other = backends["float64"] if backends["float64"] != backends["use"] else None
            yield f"    {device}: {backends['use'] or backends['error']}{f' (float64: {other})' if other else ''}"
            yield from (f"      {backend} is off: {reason}" for backend, reason in backends["off"].items())
        if op in facts["limits"]:
            yield f"    limit: {facts['limits'][op]}"


def _section(title: str, facts: Mapping[str, Any]) -> Iterator[str]:
    yield title
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield f"  {name}: {'-' if value is None else text}"


def _versions() -> dict[str, str | None]:
    return {
        "simmim_fast": simmim_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    return output.stdout.splitlines()[0].strip() if output.returncode == 0 and output.stdout else None


def _gpus() -> list[dict[str, Any]]:
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory_gib": round(device.total_memory / 2**30, 1),
        }
        for device in devices
    ]


def _backends(op: Op, device_type: str) -> dict[str, Any]:
    device = torch.device(device_type)
    reasons = {backend: refusal(op, backend, device, torch.float32) for backend in BACKENDS}
    off = {backend: reason for backend, reason in reasons.items() if reason is not None}
    if device_type == "cuda" and not torch.cuda.is_available():
        return {"use": None, "float64": None, "error": NO_CUDA_DEVICE, "off": off}
    try:
        use, float64 = (choose(op, "auto", device, dtype) for dtype in (torch.float32, torch.float64))
    except (RuntimeError, ValueError) as error:  # SIMMIM_FAST_BACKEND asks for what cannot be
        return {"use": None, "float64": None, "error": str(error), "off": off}
    return {"use": use, "float64": float64, "error": None, "off": off}
