"""The CUDA kernels on the CPU: csrc/cuda/*.cu compiled by g++ against csrc/testing/host_cuda.h.

Within `installed()` the native ops run these CUDA bodies on CPU tensors, so that everything above the kernels (public
function, autograd, fakes, compile) is tested with them unchanged. Each file is compiled once, into build/host_cuda.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch._ops import OpOverloadPacket

from simmim_fast.ops._registration import OPS

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "host_cuda"
NAMESPACE = "simmim_fast_hostcuda"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
WHY_NOT = None if shutil.which(COMPILER[0]) else f"no C++ compiler ({COMPILER[0]})"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def build(source: Path) -> Path:
    """The shared library of one .cu file, compiled where its content, the headers or the command are new."""
    torch_root = Path(torch.__file__).parent
    flags = "-x c++ -std=c++17 -O1 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas"
    defines = "-DSIMMIM_FAST_HOST_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000"
    includes = f"-I{CSRC} -isystem {torch_root}/include"
    libraries = f"-L{torch_root}/lib -ltorch_cpu -Wl,-z,defs"
    command = [*COMPILER, *f"{flags} {defines} {includes}".split(), str(source), *libraries.split()]
    headers = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh")]
    content = b"".join(path.read_bytes() for path in [source, *headers])
    digest = hashlib.sha256(content + " ".join([*command, torch.__version__]).encode()).hexdigest()[:16]
    library = CACHE / f"{source.stem}-{digest}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{source.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.rename(library)
    return library


@functools.cache
def load() -> SimpleNamespace:
    """The operators that have a CUDA body, for CPU tensors: `load().substitute_mask_tokens_native(...)`."""
    if WHY_NOT is not None:
        raise RuntimeError(WHY_NOT)
    names = _native_operators()
    for name in names:
        schema = str(getattr(torch.ops.simmim_fast, name).default._schema)
        _LIBRARY.define(schema.removeprefix("simmim_fast::"))
    for source in sorted(CSRC.glob("cuda/*.cu")):
        torch.ops.load_library(build(source))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = getattr(torch.ops, NAMESPACE)
    return SimpleNamespace(**{name: getattr(ops, name) for name in names if has_kernel(f"{NAMESPACE}::{name}", "CPU")})


@contextmanager
def installed() -> Iterator[None]:
    """Within it, the native ops run their CUDA bodies on CPU tensors; an op without one raises."""
    bodies = load()
    library = torch.library.Library("simmim_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        for name in _native_operators():
            library.impl(name, _kernel(name, getattr(bodies, name, None)), "CPU")
    try:
        yield
    finally:
        library._destroy()


def _native_operators() -> list[str]:
    ops = [name for name, op in OPS.items() if "native" in op.implementations]
    return [f"{name}_native{direction}" for name in ops for direction in ("", "_backward")]


def _kernel(name: str, body: OpOverloadPacket | None) -> Callable:
    def run(*args):
        if body is None:
            raise RuntimeError(f"{name} has no CUDA kernel")
        # Straight to the kernel: a dispatch mode has seen the native op already, and shall see what the kernel calls.
        return body.default.redispatch(DispatchKeySet(DispatchKey.CPU), *args)

    return run
