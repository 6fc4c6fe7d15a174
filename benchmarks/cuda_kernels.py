"""What the CUDA C++ kernels take of a GPU, read from the compiled library: nothing is compiled or run."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.occupancy import SHARED_RESERVED
from simmim_fast import _native
from simmim_fast.testing.offline import TOOLS

LIBRARY = Path(_native.__file__).with_name("lib") / "ops_cuda.so"
DEMANGLER = "c++filt"  # of binutils, as is the linker that made the library
_TYPES = {"double": "fp64", "float": "fp32", "c10::BFloat16": "bf16", "c10::Half": "fp16", "unsigned char": "uint8"}
_ELEMENT_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
_SOURCE = re.compile(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_")
_KERNEL = re.compile(r"(\w+_kernel)(?:<(.*?)>)?\(")
_THREADS = re.compile(  # a kernel's section of the binary, and in it the attribute
    r"^\.nv\.info\.(\S+)$(?:\n(?!\.nv).*)*?\n\s*Attribute:\s*EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(\w+)", re.MULTILINE
)


@dataclass(frozen=True)
class Kernel:
    """A kernel of the library for one architecture.

    Attributes:
        op: The op whose source file it is compiled from.
        name: Its name.
        arguments: Those of its template, dtypes by short names: ("bf16", "3").
        threads: Threads of a block, by the launch bounds that every launch exhausts.
        registers: 32-bit registers of a thread.
        spills: Instructions that load or store local memory.
        stack: Bytes of local memory of a thread.
        static: Bytes of shared memory of a block that the kernel declares.
        dynamic: Bytes of shared memory of a block that the launch asks for.
    """

    op: str
    name: str
    arguments: tuple[str, ...]
    threads: int
    registers: int
    spills: int
    stack: int
    static: int
    dynamic: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return self.static + self.dynamic


def why_not() -> str | None:
    """Why there is nothing to read; None where there is."""
    if (reason := _native.why_not("cuda")) is not None:
        return reason
    return None if shutil.which(DEMANGLER) else f"no {DEMANGLER} on PATH"


@functools.cache
def kernels(capability: int) -> tuple[Kernel, ...]:
    """The kernels of the library for a compute capability, sorted.

    Args:
        capability: 80, 90 or 100, for 8.0, 9.0 or 10.0.

    Raises:
        RuntimeError: There is no library, or it has no machine code for that capability.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(f"the CUDA C++ kernels cannot be read: {reason}")
    architecture = _architecture(capability)
    usage = dict(re.findall(r"Function (\S+):\n\s*(REG:.*)", _dump(architecture, "-res-usage")))
    threads = dict(_THREADS.findall(_dump(architecture, "-elf")))
    plain = _run(DEMANGLER, *usage).splitlines()
    reserved = SHARED_RESERVED if capability >= 90 else 0  # what the system keeps is counted in from 9.0 on
    found = []
    for (mangled, line), demangled in zip(usage.items(), plain, strict=True):
        name, parameters = _KERNEL.search(demangled).groups()
        arguments = tuple(_TYPES.get(one, one) for one in (parameters or "").split(", ") if one)
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", line)}
        kernel = Kernel(
            op=_SOURCE.search(mangled)[1],
            name=name,
            arguments=arguments,
            threads=int(threads[mangled], 16),
            registers=numbers["REG"],
            spills=_spills(architecture, mangled) if numbers["STACK"] > 0 else 0,
            stack=numbers["STACK"],
            static=max(0, numbers["SHARED"] - reserved),
            dynamic=_dynamic(name, arguments),
        )
        found.append(kernel)
    return tuple(sorted(found, key=lambda kernel: (kernel.op, kernel.name, kernel.arguments)))


def _spills(architecture: str, mangled: str) -> int:
    """Instructions that load or store local memory, which a kernel without a stack has none of."""
    return len(re.findall(r"\b(?:LDL|STL)\b", _dump(architecture, "-sass", "-fun", mangled)))


def _dynamic(name: str, arguments: tuple[str, ...]) -> int:
    """Shared memory that the launch asks for, as the library itself reckons it."""
    direction = re.fullmatch(r"shifted_window_attention_(fwd|bwd)_kernel", name)
    if direction is None:
        return 0
    shared_bytes = ctypes.CDLL(str(LIBRARY)).shifted_window_attention_shared_bytes
    shared_bytes.argtypes, shared_bytes.restype = (ctypes.c_bool, ctypes.c_int64, ctypes.c_int64), ctypes.c_int64
    dtype, warps = arguments
    return shared_bytes(direction[1] == "bwd", _ELEMENT_SIZES[dtype], int(warps))


def _architecture(capability: int) -> str:
    names = re.findall(r"\.(sm_\d+[af]?)\.cubin", _run(TOOLS / "cuobjdump", "-lelf", LIBRARY))
    for name in names:
        if re.fullmatch(rf"sm_{capability}[af]?", name):
            return name
    raise RuntimeError(f"{LIBRARY} has no machine code for {capability}, only for {', '.join(dict.fromkeys(names))}")


def _dump(architecture: str, *what: str) -> str:
    return _run(TOOLS / "cuobjdump", *what, "-arch", architecture, LIBRARY)


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
