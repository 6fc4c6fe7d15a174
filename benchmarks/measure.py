"""How a call is timed: what is inside the clock, what is outside, and what is written down."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from simmim_fast.info import collect

ROTATION = 4  # sets of inputs that take turns, so that a cache does not flatter


def devices() -> list[str]:
    """Where benchmarks run: on the GPU where there is one, and on the CPU."""
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def time_call(
    benchmark: BenchmarkFixture, calls: Sequence[Callable[[], Any]], device: str, nbytes: int = 0, flops: int = 0
) -> None:
    """Time calls that do the same on different inputs, in turn, and note µs, rates and the conditions beside the row.

    On CUDA the clock includes a synchronisation; the median time on the device is noted beside it.

    Args:
        benchmark: pytest-benchmark's fixture.
        calls: Each is called once before the clock starts.
        device: "cpu" or "cuda".
        nbytes: Bytes that one call must move.
        flops: Floating-point operations that one call must do.
    """
    for call in calls:
        call()
    turn = itertools.cycle(calls)

    def timed() -> None:
        next(turn)()
        if device == "cuda":
            torch.cuda.synchronize()

    timed()
    benchmark(timed)
    if benchmark.stats is None:  # --benchmark-disable
        return
    microseconds = benchmark.stats.stats.median * 1e6
    if device == "cuda":
        import triton

        benchmark.extra_info["host_us"] = round(microseconds, 2)
        microseconds = triton.testing.do_bench(lambda: next(turn)(), return_mode="median") * 1e3
    benchmark.extra_info["us"] = round(microseconds, 2)
    if nbytes:
        benchmark.extra_info["gb_per_s"] = round(nbytes / microseconds / 1e3, 1)
    if flops:
        benchmark.extra_info["gflop_per_s"] = round(flops / microseconds / 1e3, 1)
    facts = collect()
    benchmark.extra_info |= {"device": device, "threads": torch.get_num_threads(), "gpus": facts["gpus"]}
    benchmark.extra_info |= facts["versions"]
