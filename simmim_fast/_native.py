"""Loads the compiled parts once, when this module is imported, and says what is there, what is not, and why.

`_C` is the pybind11 module (build information, no mathematics). `lib/ops_cpu.so` and `lib/ops_cuda.so` register the
native kernels with PyTorch; the second is loaded only where PyTorch has CUDA. Nothing here raises: a part that is off
has a reason. setup.py builds all three, or leaves the reason in `lib/not_built.txt`.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

_LIBRARIES = Path(__file__).parent / "lib"

try:
    from simmim_fast import _C

    _IMPORT_ERROR = None
except ImportError as error:
    _C, _IMPORT_ERROR = None, error


def _why_not_compiled() -> str | None:
    if _C is not None:
        return None
    note = _LIBRARIES / "not_built.txt"
    if note.exists():
        return f"installed as pure Python: {note.read_text().strip()}"
    built = list(Path(__file__).parent.glob("_C.*.so"))
    if built:
        return f"{built[0].name} does not load: {_IMPORT_ERROR}"
    return "not compiled: install the package with pip, which compiles it"


def _load(name: str) -> str | None:
    """Loads a library of ops; the reason where it is not there or does not load."""
    library = _LIBRARIES / name
    if not library.exists():
        return f"{library} is missing: install the package again"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{name} does not load in torch {torch.__version__}: {error.__cause__ or error}"
    return None


def _load_cpu() -> str | None:
    return _why_not_compiled() or _load("ops_cpu.so")


def _load_cuda() -> str | None:
    if (reason := _why_not_compiled()) is not None:
        return reason
    if build_reason := _C.build_info()["cuda_reason"]:
        return f"built without CUDA kernels: {build_reason}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return _load("ops_cuda.so")


def _architectures() -> tuple[tuple[tuple[int, int], str], ...]:
    """Version and kind ("", "ptx" or the suffix) of each architecture of the CUDA library."""
    names = _C.build_info()["cuda_architectures"] if _C is not None else ""
    parts = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", names)
    return tuple(((int(major), int(minor)), "ptx" if ptx else suffix) for major, minor, suffix, ptx in parts)


_ARCHITECTURES = _architectures()
_WHY_NOT = {"cpu": _load_cpu(), "cuda": _load_cuda()}


def why_not(device_type: str) -> str | None:
    """Why the native kernels for "cpu" or "cuda" tensors are off; None where they are registered.

    Says nothing about whether a GPU is there.
    """
    return _WHY_NOT[device_type]


def build_info() -> dict[str, str | None]:
    """What was compiled and with what.

    Returns:
        `reason` (None, or why nothing is compiled) and, where something is: `compiler`, `flags`, `torch` (compiled
        against), `torch_target` (the oldest torch it works with, as LibTorch encodes versions), `cuda_compiler`,
        `cuda_flags`, `cuda_architectures` (as in TORCH_CUDA_ARCH_LIST) and `cuda_reason` (why there are no CUDA
        kernels), all strings, empty where they do not apply.
    """
    reason = _why_not_compiled()
    return {"reason": reason} if reason is not None else {"reason": None, **_C.build_info()}


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the CUDA library has code for a GPU of this compute capability.

    Machine code runs on its own major version from its minor on, with a suffix ("9.0a") on its own version alone; PTX
    is compiled for whatever is newer.
    """
    return any(
        capability == own or (kind == "ptx" and capability > own) or (kind == "" and own < capability < (own[0] + 1, 0))
        for own, kind in _ARCHITECTURES
    )


def simd_level() -> str | None:
    """The vector instructions that the CPU kernels use in this process; None where nothing is compiled.

    "avx512_bf16", "avx512" (x86-64-v4), "avx2" (x86-64-v3) or "baseline": the highest that the processor has and that
    ATEN_CPU_CAPABILITY ("default", "avx2", "avx512" or "avx512_bf16") allowed on import.
    """
    return None if _C is None else _C.simd_level()
