"""What kernels take of a GPU: registers, spills, stack, shared memory, occupancy; read without one.

    python -m benchmarks.resources --capability 90

Every launch of every op's Triton kernels at the shapes of `benchmarks.cases`, compiled for each architecture, and every
CUDA C++ kernel of the compiled library. Rows are appended to benchmarks/results/resources.jsonl, and docs/resources.md
is written anew from the latest row of each case.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor
from triton.backends.nvidia.compiler import CUDAOptions

from benchmarks import cuda_kernels
from benchmarks.cases import BATCH, CASES, DTYPES, Case
from benchmarks.cost import launches, meta, operator_calls
from benchmarks.cuda_kernels import Kernel
from benchmarks.occupancy import LIMITS, WARP_THREADS, occupancy
from benchmarks.resources_page import PAGE, render
from benchmarks.results import RESULTS, begin, read_rows, write_row
from simmim_fast.testing.offline import Compiled, Launch, compile_launch

ROWS = RESULTS / "resources.jsonl"
BACKENDS = ("triton", "native")
DIRECTIONS = ("forward", "backward")


class Compiler:
    """Compiles launches for one compute capability, those that differ in their grid alone once."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self._compiled: dict[tuple, Compiled] = {}

    def facts(self, launch: Launch) -> dict[str, Any]:
        """What a launch takes, as JSON has it."""
        key = (launch.kernel, *((name, _kind(value)) for name, value in launch.arguments.items()))
        key += tuple(launch.options.items())
        if key not in self._compiled:
            with tempfile.TemporaryDirectory() as directory:
                self._compiled[key] = compile_launch(launch, self.capability, Path(directory))
        compiled, warps = self._compiled[key], launch.options.get("num_warps", CUDAOptions.num_warps)
        return {
            "kernel": launch.kernel.__name__.removeprefix("_"),
            "grid": list(launch.grid),
            "warps": warps,
            "registers": compiled.registers,
            "spills": compiled.count("LDL") + compiled.count("STL"),
            "stack": compiled.stack,
            "shared": compiled.shared,
            **_held(self.capability, compiled.registers, compiled.shared, warps),
        }


def measure(compiler: Compiler, case: Case, dtype: str, batch: int) -> Iterator[dict[str, Any]]:
    """A row for the forward and one for the backward of a case."""
    calls = operator_calls(case, batch, DTYPES[dtype])
    for direction, (operator, args) in zip(DIRECTIONS, calls, strict=True):
        made = launches(operator, tuple(_without_data(value) for value in args), compiler.capability)
        yield {
            "benchmark": "resources",
            "capability": compiler.capability,
            "op": case.op,
            "case": case.name,
            "dtype": dtype,
            "direction": direction,
            "batch": batch,
            "launches": [compiler.facts(launch) for launch in made],
        }


def read(capability: int, op: str) -> Iterator[dict[str, Any]]:
    """A row of the CUDA C++ kernels of an op; none where it has none."""
    found = [kernel for kernel in cuda_kernels.kernels(capability) if kernel.op == op]
    if found:
        yield {
            "benchmark": "resources",
            "capability": capability,
            "op": op,
            "kernels": [_facts(capability, kernel) for kernel in found],
        }


def _facts(capability: int, kernel: Kernel) -> dict[str, Any]:
    warps = kernel.threads // WARP_THREADS
    return {
        "kernel": kernel.name,
        "arguments": list(kernel.arguments),
        "warps": warps,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "stack": kernel.stack,
        "static": kernel.static,
        "dynamic": kernel.dynamic,
        "shared": kernel.shared,
        **_held(capability, kernel.registers, kernel.shared, warps),
    }


def _held(capability: int, registers: int, shared: int, warps: int) -> dict[str, Any]:
    held = occupancy(capability, registers=registers, shared=shared, warps=warps)
    return {"blocks": held.blocks, "limited_by": held.limited_by, "occupancy": held.share}


def text(row: dict[str, Any]) -> Iterator[str]:
    """A row in lines for the terminal, one a launch or kernel."""
    about = [str(row[name]) for name in ("capability", "op", "case", "dtype", "direction") if name in row]
    for facts in row.get("launches", row.get("kernels")):
        yield "  ".join((*about, *(f"{name} {value}" for name, value in facts.items())))


def _kind(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else value


def _without_data(value: Any) -> Any:
    return meta(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser("python -m benchmarks.resources", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--op", nargs="+", choices=CASES, default=list(CASES), help="these ops alone")
    add("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="these alone; native is CUDA C++")
    add("--capability", nargs="+", type=int, choices=LIMITS, default=list(LIMITS), help="for these alone: 90 is 9.0")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="Triton kernels for these dtypes alone")
    add("--batch", type=int, default=BATCH["cuda"], help=f"images (default: {BATCH['cuda']})")
    add("--json", action="store_true", help="print rows as lines of JSON")
    add("--results", type=Path, default=ROWS, metavar="FILE", help="rows are appended here (default: %(default)s)")
    add("--page", type=Path, default=PAGE, metavar="FILE", help="the page is written here (default: %(default)s)")
    return parser.parse_args(arguments)


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is asked for, row by row."""
    for capability in options.capability:
        if "triton" in options.backend:
            compiler = Compiler(capability)
            for op, dtype in product(options.op, options.dtype):
                for case in CASES[op].values():
                    yield from measure(compiler, case, dtype, options.batch)
        if "native" in options.backend:
            for op in options.op:
                yield from read(capability, op)


def main(arguments: list[str] | None = None) -> None:
    """Compile and read, print, write rows and the page."""
    options = parse(arguments)
    begin()
    if "native" in options.backend and (reason := cuda_kernels.why_not()) is not None:
        sys.exit(f"the CUDA C++ kernels cannot be read: {reason}; --backend triton leaves them out")
    for row in rows_of(options):
        written = write_row(options.results, row)
        print(*[json.dumps(written)] if options.json else text(written), sep="\n", flush=True)
    options.page.write_text(render(read_rows(options.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
