"""Forward and backward of every op, contestants in turn: microseconds, and how many times faster than each other.

    python -m benchmarks.ops --op shifted_window_attention --dtype fp32 --rounds 30

The ops' tests run first. Contestants take turns, call by call, so that drift hits all of them, on inputs that rotate.
First their outputs must agree with the eager one's; where one does not, nothing is timed and the exit status is 1. On a
GPU a call is timed by the device's own clock, with a cold cache; a call of the host has rows of its own (--host).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks import gate
from benchmarks.cases import BATCH, CASES, DTYPES, Case
from benchmarks.contest import AGREEMENT
from benchmarks.contestants import Function, contestant, eager, names
from benchmarks.cost import cost
from benchmarks.measure import ROTATION, Absent, copy_rate, devices, matrix_rate, synchronize
from benchmarks.results import RESULTS, write_row
from simmim_fast._backends import BackendError
from simmim_fast.testing import differentiable, random_gradient, relative_error, small_inputs

WARM_UP = 3  # rounds
FLUSHED = 2**28  # bytes that are overwritten before a call on a GPU, more than its cache holds


class Disagreement(Exception):
    """A contestant computes something else than the eager one."""


def race(case: Case, dtype: str, device: str, rounds: int, wanted: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of each contestant's forward and backward, round by round; who cannot run is left out.

    Raises:
        Disagreement: A contestant's output is not the eager one's.
    """
    sets = [case.inputs(BATCH[device], DTYPES[dtype], device, seed) for seed in range(ROTATION)]
    gradients = [random_gradient(eager(case.op), inputs) for inputs in sets]
    runners = dict(_agreeing(case, dtype, device, sets[0], wanted))
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(WARM_UP + rounds):
        inputs, grad_out = sets[turn % ROTATION], gradients[turn % ROTATION]
        order = list(runners.items())[:: 1 if turn % 2 else -1]
        for name, function in order:
            elapsed = _time(function, case, inputs, grad_out, device)
            if turn >= WARM_UP:
                seconds[name].append(elapsed)
    return seconds


def _agreeing(
    case: Case, dtype: str, device: str, inputs: dict[str, Any], wanted: Sequence[str]
) -> Iterator[tuple[str, Function]]:
    with torch.no_grad():
        expected = tree_leaves(eager(case.op)(**inputs))
        for name in wanted:
            try:
                function = contestant(case.op, name, device, DTYPES[dtype])
                actual = tree_leaves(function(**inputs))
            except (Absent, BackendError) as reason:
                print(f"{name} is off on {device}: {reason}")
                continue
            distance = max(relative_error(*pair) for pair in zip(actual, expected, strict=True))
            if distance > AGREEMENT[DTYPES[dtype]]:
                raise Disagreement(f"{case.op}, {case.name}, {dtype}: {name} is wrong by {distance:.2g}")
            yield name, function


def _time(function: Function, case: Case, inputs: dict[str, Any], grad_out: Any, device: str) -> float:
    def call() -> None:
        torch.autograd.grad(function(**inputs), leaves, grad_out)

    leaves = case.leaves(inputs)
    if device == "cuda":
        return _seconds_on_device(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_device(call: Callable[[], None]) -> float:
    """By the device's clock; while it empties its cache the host runs ahead, so that launches leave no gaps."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flushed().zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")


def host_rows(op: str, device: str, rounds: int, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row a contestant: the host's time of one call with autograd, on so few elements that nothing else takes any."""
    inputs = small_inputs(op, 1, device=device)
    for leaf in differentiable(inputs):
        inputs[leaf].requires_grad_()
    for name in wanted:
        try:
            call = functools.partial(contestant(op, name, device, torch.float32), **inputs)
            for _ in range(WARM_UP):
                call()
        except (Absent, BackendError) as reason:
            print(f"{name} is off on {device}: {reason}")
            continue
        seconds = []
        for _ in range(rounds):
            synchronize(device)
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        microseconds = round(1e6 * statistics.median(seconds), 2)
        given = {"dtype": "fp32", "device": device, "rounds": rounds}
        yield {"benchmark": "op_host", "op": op, "arguments": given, "contestant": name, "us": microseconds}


def results(case: Case, dtype: str, device: str, seconds: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    """A row a contestant. Ratios are medians over the rounds of another's time over its own."""
    nbytes, flops = (sum(both) for both in zip(*cost(case, BATCH[device], DTYPES[dtype]), strict=True))
    rates = {
        "matrix_flops_per_second": matrix_rate(DTYPES[dtype], device),
        "bytes_per_second": copy_rate(device),
    }
    least = max(flops / rates["matrix_flops_per_second"], nbytes / rates["bytes_per_second"])
    for name, own in seconds.items():
        others = {other: theirs for other, theirs in seconds.items() if other != name}
        median = statistics.median(own)
        yield {
            "benchmark": "op",
            "op": case.op,
            "case": case.name,
            "arguments": {"dtype": dtype, "device": device, "batch": BATCH[device], "rounds": len(own)},
            "contestant": name,
            "us": round(1e6 * median, 1),
            "us_least": round(1e6 * min(own), 1),
            "gb_per_s": round(nbytes / median / 1e9, 2),
            "gflop_per_s": round(flops / median / 1e9, 2),
            "limits": rates,
            "limit_share": round(least / median, 4),
            "times_faster_than": {
                other: round(statistics.median(b / a for a, b in zip(own, theirs, strict=True)), 3)
                for other, theirs in others.items()
            },
        }


def line(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    ratios = ", ".join(f"{ratio:.2f} x {other}" for other, ratio in row["times_faster_than"].items())
    what = f"{row['op']}, {row['case']}, {row['arguments']['dtype']}"
    return f"{what:<66} {row['contestant']:<9} {row['us']:>10.1f} us  {ratios}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.ops", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--op", nargs="+", choices=CASES, default=list(CASES), help="ops (default: all)")
    add("--case", help="only cases whose name holds this")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the activations (default: all)")
    add("--contestants", nargs="+", help="names, such as eager compiled native (default: all of the op)")
    add("--device", choices=devices(), default=devices()[0], help="where (default: %(default)s)")
    add("--rounds", type=int, default=30, help="calls of each contestant (default: %(default)s)")
    add("--host", action="store_true", help="also the host's time of a call, on few elements")
    add("--results", type=Path, default=RESULTS / "ops.jsonl", metavar="FILE", help="rows are appended here")
    gate.add_option(parser)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    known = sorted({name for op in options.op for name in names(op)})
    if unknown := set(options.contestants or ()) - set(known):
        parser.error(f"--contestants must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    cases = [case for op in options.op for case in CASES[op] if options.case in (None, "") or options.case in case]
    if not cases:
        parser.error(f"--case must be part of a case's name of {', '.join(options.op)}; got {options.case!r}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    gate.require(gate.of_ops(options.op), options.device, options.tests)
    for dtype in options.dtype:  # the machine's own rates, before compilers keep it busy
        matrix_rate(DTYPES[dtype], options.device)
    copy_rate(options.device)
    for op, dtype in itertools.product(options.op, options.dtype):
        wanted = [name for name in options.contestants or names(op) if name in names(op)]
        for case in CASES[op].values():
            if options.case and options.case not in case.name:
                continue
            try:
                seconds = race(case, dtype, options.device, options.rounds, wanted)
            except Disagreement as error:
                print(f"ops: nothing is timed: {error}", file=sys.stderr)
                return 1
            for row in results(case, dtype, options.device, seconds):
                print(line(write_row(options.results, row)), flush=True)
        if options.host and dtype == options.dtype[0]:
            for row in host_rows(op, options.device, options.rounds, wanted):
                write_row(options.results, row)
                print(f"{op}: the host's time of a call of {row['contestant']}: {row['us']} us", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
