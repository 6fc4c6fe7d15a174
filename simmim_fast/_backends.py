"""The backends an op can run on: what each needs, and which one runs a call.

"reference" is plain PyTorch and runs everywhere. "native" is the compiled library: C++ on the CPU, CUDA C++ on the GPU.
"triton" are the Triton kernels: CUDA tensors, and CPU tensors where TRITON_INTERPRET=1 was set before the import.
"auto" is the environment variable SIMMIM_FAST_BACKEND or, where that is unset or "auto" too, the first that can run:
what was measured to be fastest on this GPU, then the device's order. float64 on a GPU is the reference's:
Triton refuses it there, since its products of float64 do not compile. A backend asked for by name, by argument or by
variable, runs or raises; it never falls back.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from simmim_fast import _native
from simmim_fast._measured import FASTEST

ENVIRONMENT_VARIABLE = "SIMMIM_FAST_BACKEND"
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
TRITON_CAPABILITY = (8, 0)
TRITON_VERSION = (3, 6)  # the oldest that the kernels were run with; newer ones are tried
# On 10.x, below: 3.6 and 3.7 round float32 products to TF32, and stop at some kernels (docs/backends.md).
TRITON_VERSION_OF_10 = (3, 8)
NO_CUDA_DEVICE = "PyTorch sees no CUDA device"


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_VERSION = _installed_version("triton")  # None where it comes under another name, and is tried
_AUTO_ORDER = {"cuda": ("triton", "native", "reference"), "cpu": ("native", "reference")}


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run a call."""


@dataclass(frozen=True)
class Op:
    """An op.

    Attributes:
        name: The public function's name.
        implementations: The function behind each of its backends; all take the same arguments.
        native_devices: Device types that the compiled library has kernels for.
    """

    name: str
    implementations: Mapping[str, Callable]
    native_devices: tuple[str, ...]


def _native_refusal(op: Op, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"it takes CPU and CUDA tensors, not {device.type}"
    if device.type not in op.native_devices:
        return f"there is no {'CUDA ' if device.type == 'cuda' else ''}C++ for this op"
    return _native.why_not(device.type) or (_architecture_refusal(device) if device.type == "cuda" else None)


def _architecture_refusal(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return NO_CUDA_DEVICE
    major, minor = _capability(device)
    if _native.runs_on((major, minor)):
        return None
    return f"it is not compiled for compute capability {major}.{minor}, which {device} has: see `simmim-fast info`"


def _capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)  # torch.compile knows it as a constant
    return properties.major, properties.minor


def _triton_refusal(op: Op, device: torch.device, dtype: torch.dtype) -> str | None:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if (reason := _triton_version_refusal()) is not None:
        return reason
    if TRITON_INTERPRETED and device.type in ("cpu", "cuda"):
        return None
    if device.type == "cpu":
        return "it takes CPU tensors only where TRITON_INTERPRET=1 was set before the import"
    if device.type != "cuda":
        return f"it takes CUDA tensors, not {device.type}"
    if dtype == torch.float64:
        return "it takes no float64 on a GPU, where Triton does not compile products of it"
    return _capability_refusal(device)


def triton_version() -> tuple[int, ...]:
    """Major and minor; () where it is not known."""
    return tuple(int(number) for number in re.findall(r"\d+", _TRITON_VERSION or "")[:2])


def _triton_version_refusal(least: tuple[int, ...] = TRITON_VERSION, where: str = "") -> str | None:
    numbers = triton_version()
    if not numbers or numbers >= least:
        return None
    return f"it needs triton {'.'.join(map(str, least))} or newer{where}; got {_TRITON_VERSION}"


def _capability_refusal(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return NO_CUDA_DEVICE
    capability = _capability(device)
    if capability < TRITON_CAPABILITY:
        return f"it needs compute capability {TRITON_CAPABILITY}, {device} has {capability}"
    if capability[0] == 10:
        return _triton_version_refusal(TRITON_VERSION_OF_10, f" on compute capability {capability}, which {device} has")
    return None


_REFUSALS = {"native": _native_refusal, "triton": _triton_refusal}
BACKENDS = ("reference", *_REFUSALS)


def refusal(op: Op, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on activations of this device and dtype; None where it can."""
    if backend not in op.implementations:
        return f"{op.name} has no {backend} implementation"
    if backend == "reference":
        return None
    if dtype not in FLOAT_DTYPES:
        return f"it has no kernel for {dtype}"
    if _inside_a_transform():
        return "its kernels have a first derivative in reverse mode alone: no torch.func transform, no forward mode"
    return _REFUSALS[backend](op, device, dtype)


def _inside_a_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way; they would miss a derivative."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _auto_order(op: Op, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    order = _AUTO_ORDER.get(device.type, ("reference",))
    if device.type == "cuda" and dtype == torch.float64:
        return ("reference",)
    if device.type != "cuda" or not FASTEST or not torch.cuda.is_available():
        return order
    fastest = FASTEST.get((_capability(device), op.name))
    return order if fastest is None else (fastest, *order)


def _takes_any_size(backend: str) -> None:
    return None


def choose(
    op: Op,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    size_refusal: Callable[[str], str | None] = _takes_any_size,
) -> str:
    """The backend that runs a call of `op`.

    Args:
        op: The op that is called.
        backend: "auto", "reference", "native" or "triton".
        device: Where the call's tensors are.
        dtype: Dtype of the activations.
        size_refusal: From a backend's name, why its kernels do not take the sizes of this call; None where they do.

    Returns:
        "reference", "native" or "triton".

    Raises:
        ValueError: `backend`, or SIMMIM_FAST_BACKEND behind "auto", is no backend's name.
        BackendError: The backend asked for by name cannot run; the message says why.
    """

    def reason(name: str) -> str | None:
        return refusal(op, name, device, dtype) or size_refusal(name)

    source, wish = "backend", backend
    if wish == "auto":
        source, wish = ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if wish == "auto":
        return next(name for name in _auto_order(op, device, dtype) if reason(name) is None)
    if not isinstance(wish, str) or wish not in BACKENDS:
        raise ValueError(_unknown_backend(source, wish))
    if (refused := reason(wish)) is not None:
        raise BackendError(f"{op.name}: {source}={wish!r} cannot run here: {refused}")
    return wish


def _unknown_backend(source: str, wish: object) -> str:
    names = ("auto", *BACKENDS)
    nearest = difflib.get_close_matches(str(wish), names, n=1, cutoff=0.0)[0]
    return f"{source} must be one of {', '.join(names)}; got {wish!r} (did you mean {nearest!r}?)"
