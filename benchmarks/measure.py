"""How a call is timed: what is inside the clock, what is outside, and what is written down."""

from __future__ import annotations

import functools
import itertools
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from simmim_fast.info import collect

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROTATION = 4  # sets of inputs that take turns, so that a cache does not flatter
# Of the machine's own rates: sides of the square matrices, MiB that are copied, and how often.
MATRIX_SIDE = {"cuda": 8192, "cpu": 1536}
COPIED_MIB = {"cuda": 2048, "cpu": 256}
REASON = 300  # characters of an error that are shown
RATE_CALLS = 30  # a second or two of a CPU: what disturbs a machine for a moment is outlasted


class Absent(Exception):
    """A contestant cannot run here; the message says why."""


def reason(error: Exception) -> str:
    """Why a contestant does not run, as one line."""
    text = textwrap.shorten(str(error), REASON, placeholder=" ...")
    return text if isinstance(error, Absent) else f"{type(error).__name__}: {text}"


def devices() -> list[str]:
    """Where benchmarks run: on the GPU where there is one, and on the CPU."""
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def synchronize(device: str) -> None:
    """Wait for the device's work."""
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a product of large square matrices, here and now: the fastest of a few calls, since it is a limit."""
    side = MATRIX_SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _least_seconds(lambda: a @ b, device)


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes/s, read and written, of a copy far larger than the caches, here and now."""
    source = torch.randn(COPIED_MIB[device] * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device)


def _least_seconds(call: Callable[[], Any], device: str) -> float:
    call()
    seconds = []
    for _ in range(RATE_CALLS):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


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
        synchronize(device)

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
