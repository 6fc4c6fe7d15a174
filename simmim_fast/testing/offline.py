"""Triton kernels compiled for GPUs that are not there, and what the compiler made of them.

Everything is read from a launch as an op's launcher makes it, on meta tensors: constants, types, and which arguments
are multiples of 16 (without that the compiler does not vectorise).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton._utils import type_canonicalisation_dict
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
# Bytes that one block may have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024} | dict.fromkeys((86, 89, 120), 99 * 1024)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments it was launched with, by name."""

    kernel: triton.runtime.JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def threads(self) -> int:
        """Threads of one program: 4 warps, where the launch does not say."""
        return 32 * self.options.get("num_warps", 4)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch.

    Attributes:
        registers: 32-bit registers of a thread.
        stack: Bytes of local memory of a thread.
        shared: Bytes of shared memory of a block.
        sass: The machine code.
        dots: Types of the left and right operand of each product, as Triton has them before it lowers them ("bf16").
    """

    registers: int
    stack: int
    shared: int
    sass: str
    dots: tuple[tuple[str, str], ...]

    def count(self, instruction: str) -> int:
        """How often an instruction occurs, by a regular expression for its name with modifiers."""
        return len(re.findall(rf"\b{instruction}", self.sass))

    def wide_bytes(self, instruction: str, bits: int = 128) -> int:
        """Bytes that a thread moves by the form of "LDG" (load) or "STG" (store) of so many bits, loops taken once."""
        return bits // 8 * self.count(rf"{instruction}\.E\S*\.{bits}")


def launches(function: Callable[..., Any], *args: Any) -> list[Launch]:
    """The Triton launches that a launcher makes for these arguments, none of which is run."""
    with recorded() as record:
        function(*args)
    return record


def compile_launch(launch: Launch, capability: int, directory: Path) -> Compiled:
    """Compile for an NVIDIA GPU of this compute capability (90 is 9.0) and read the binary with the wheel's tools."""
    signature, constants, attributes = _specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    cubin = directory / f"{launch.kernel.__name__}.sm_{capability}.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK):(\d+)", _run("cuobjdump", "-res-usage", cubin)))
    dots = re.findall(r"tt\.dot .* : tensor<[\dx]*x(\w+)> \* tensor<[\dx]*x(\w+)>", binary.asm["ttir"])
    sass = _run("nvdisasm", "-c", cubin)
    return Compiled(int(usage["REG"]), int(usage["STACK"]), binary.metadata.shared, sass, tuple(dots))


def assert_frugal(compiled: Compiled, capability: int) -> None:
    """No spilled register, no stack, and no more shared memory than a block may have."""
    assert compiled.count("LDL") == compiled.count("STL") == 0, "registers are spilled to local memory"
    assert compiled.stack == 0
    assert compiled.shared <= SHARED_MEMORY[capability]


def assert_products(compiled: Compiled, dtype: torch.dtype, dots: int) -> None:
    """So many products, each of operands in this dtype: half types in tensor cores, float32 without TF32."""
    name = type_canonicalisation_dict[str(dtype).removeprefix("torch.")].replace("fp", "f")
    assert compiled.dots == ((name, name),) * dots, f"products of {compiled.dots}, not {dots} of {name}"
    of_dtype = {torch.bfloat16: r"HG?MMA\.\S*BF16", torch.float16: r"HG?MMA\.(?!\S*(BF16|TF32))"}.get(dtype)
    fifth_generation = compiled.count(r"UTC\w*MMA")  # whose operands' type is in a descriptor
    instructions = compiled.count(r"HG?MMA\.") + fifth_generation
    if of_dtype is None:
        assert instructions == 0, "float32 goes through tensor cores"
        return
    assert compiled.count(of_dtype) + fifth_generation == instructions, "tensor cores multiply in another type"
    assert instructions >= dots, f"{instructions} tensor-core instructions for {dots} products"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it, launches of Triton kernels are noted in the list that it yields, and none is run."""
    record: list[Launch] = []

    def run(kernel: triton.runtime.JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        arguments.update((name, value) for name, value in kwargs.items() if name in kernel.arg_names)
        record.append(Launch(kernel, grid, arguments, options))

    original = triton.runtime.JITFunction.run
    triton.runtime.JITFunction.run = run
    try:
        yield record
    finally:
        triton.runtime.JITFunction.run = original


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Types, constants and attributes of the arguments, as Triton's own launcher derives them."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
