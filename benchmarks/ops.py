"""Forward and backward of every op, contestants in turn: microseconds, and how many times faster than each other.

    python -m benchmarks.ops --op shifted_window_attention --dtype fp32 --rounds 30

The ops' tests run first. Contestants take turns, call by call, so that drift hits all of them, on inputs that rotate.
First their outputs and gradients must agree with the eager one's; where one does not, nothing is timed and the exit
status is 1. Who cannot run is named, with the reason. On a GPU a call is timed by the device's own clock, with a cold
cache and without gaps between kernels; a call of the host has rows of its own (--host).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gate
from benchmarks.cases import BATCH, CASES, DTYPES, Case
from benchmarks.contest import Disagreement, Oracle
from benchmarks.contestants import Function, contestant, eager, names
from benchmarks.cost import cost
from benchmarks.measure import ROTATION, copy_rate, devices, matrix_rate, reason, synchronize
from benchmarks.results import RESULTS, begin, write_row
from simmim_fast.testing import differentiable, random_gradient, small_inputs

WARM_UP = 3  # rounds
FLUSHED = 2**28  # bytes that are overwritten before a call on a GPU, more than its cache holds
SLEEP, MOST_SLEEP = 2**22, 2**26  # cycles that a GPU sleeps while the host launches a call: 2 to 40 ms


@dataclass
class Times:
    """Seconds of a contestant, round by round.

    Attributes:
        forward: Of the forward, with autograd's graph.
        both: Of forward and backward.
    """

    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)


def race(
    case: Case, dtype: str, device: str, rounds: int, wanted: Sequence[str]
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of each contestant, and why each of the others does not run.

    Raises:
        Disagreement: The output or a gradient of a contestant is not the eager one's.
    """
    sets = [case.inputs(BATCH[device], DTYPES[dtype], device, seed) for seed in range(ROTATION)]
    gradients = [random_gradient(eager(case.op), inputs) for inputs in sets]
    runners, absent = _agreeing(Oracle(case, sets[0], gradients[0], dtype), device, wanted)
    times = {name: Times() for name in runners}
    for turn in range(WARM_UP + rounds):
        inputs, grad_out = sets[turn % ROTATION], gradients[turn % ROTATION]
        for name in list(runners)[:: 1 if turn % 2 else -1]:
            try:
                forward, both = _time(runners[name], case, inputs, grad_out, device)
            except Exception as error:
                absent[name] = reason(error)
                del runners[name], times[name]
                continue
            if turn >= WARM_UP:
                times[name].forward.append(forward)
                times[name].both.append(both)
    return times, absent


def _agreeing(oracle: Oracle, device: str, wanted: Sequence[str]) -> tuple[dict[str, Function], dict[str, str]]:
    """The contestants that run and agree, and why the others do not run."""
    runners, absent = {}, {}
    for name in wanted:
        try:
            function = contestant(oracle.case.op, name, device, DTYPES[oracle.dtype])
            oracle.check(name, function)
            runners[name] = function
        except Disagreement:
            raise
        except Exception as error:
            absent[name] = reason(error)
    return runners, absent


def _time(function: Function, case: Case, inputs: dict[str, Any], grad_out: Any, device: str) -> tuple[float, float]:
    """Seconds of the forward, and of forward and backward."""
    leaves = case.leaves(inputs)
    backward = functools.partial(torch.autograd.grad, inputs=leaves, grad_outputs=grad_out)
    if device == "cuda":
        return _seconds_on_device(functools.partial(function, **inputs), backward)
    start = time.perf_counter()
    out = function(**inputs)
    middle = time.perf_counter()
    backward(out)
    return middle - start, time.perf_counter() - start


def _seconds_on_device(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> tuple[float, float]:
    """By the device's clock, which starts only when the host has launched all: no launch leaves a gap.

    Until then the device empties its cache and sleeps, longer where the host took longer. A call that waits for the
    device is never launched ahead; its gaps are its own.
    """
    cycles = SLEEP
    while True:
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        _flushed().zero_()
        torch.cuda._sleep(cycles)
        begin.record()
        out = forward()
        middle.record()
        backward(out)
        end.record()
        ahead = not begin.query()
        end.synchronize()
        if ahead or cycles >= MOST_SLEEP:
            return begin.elapsed_time(middle) / 1e3, begin.elapsed_time(end) / 1e3
        cycles *= 4


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")


def host_rows(op: str, device: str, rounds: int, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row a contestant: the host's time of one call with autograd, on so few elements that nothing else takes any."""
    inputs = small_inputs(op, 1, device=device)
    for leaf in differentiable(inputs):
        inputs[leaf].requires_grad_()
    for name in wanted:
        row = {"benchmark": "op_host", "op": op, "contestant": name}
        seconds = []
        try:
            call = functools.partial(contestant(op, name, device, torch.float32), **inputs)
            for turn in range(WARM_UP + rounds):
                synchronize(device)
                begin = time.perf_counter()
                call()
                if turn >= WARM_UP:
                    seconds.append(time.perf_counter() - begin)
        except Exception as error:
            yield {**row, "absent": reason(error)}
            continue
        yield {**row, "us": round(1e6 * statistics.median(seconds), 2)}


def results(case: Case, dtype: str, device: str, times: Mapping[str, Times]) -> Iterator[dict[str, Any]]:
    """What each contestant reached, as JSON has it; ratios are of another's time to its own, medians over rounds."""
    nbytes, flops = (sum(both) for both in zip(*cost(case, BATCH[device], DTYPES[dtype]), strict=True))
    rates = {
        "matrix_flops_per_second": matrix_rate(DTYPES[dtype], device),
        "bytes_per_second": copy_rate(device),
    }
    least = max(flops / rates["matrix_flops_per_second"], nbytes / rates["bytes_per_second"])
    for name, own in times.items():
        median = statistics.median(own.both)
        yield {
            "contestant": name,
            "us": round(1e6 * median, 1),
            "us_least": round(1e6 * min(own.both), 1),
            "us_forward": round(1e6 * statistics.median(own.forward), 1),
            "gb_per_s": round(nbytes / median / 1e9, 2),
            "gflop_per_s": round(flops / median / 1e9, 2),
            "limits": rates,
            "limit_share": round(least / median, 4),
            "times_faster_than": {
                other: round(statistics.median(b / a for a, b in zip(own.both, theirs.both, strict=True)), 3)
                for other, theirs in times.items()
                if other != name
            },
        }


def line(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    what = f"{row['op']}, {row['case']}, {row['arguments']['dtype']}"
    if "absent" in row:
        return f"{what:<66} {row['contestant']} does not run: {row['absent']}"
    rates = f"{row['gb_per_s']:>8.1f} GB/s {row['gflop_per_s'] / 1e3:>7.3f} TFLOP/s"
    ratios = ", ".join(f"{ratio:.2f} x {other}" for other, ratio in row["times_faster_than"].items())
    times = f"{row['us']:>10.1f} us (forward {row['us_forward']:.1f})"
    return f"{what:<66} {row['contestant']:<9} {times} {rates}  {ratios}"


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
    begin()
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
                times, absent = race(case, dtype, options.device, options.rounds, wanted)
            except Disagreement as error:
                print(f"ops: nothing is timed: {error}", file=sys.stderr)
                return 1
            what = {"benchmark": "op", "op": op, "case": case.name}
            what["arguments"] = {**given(options, dtype), "batch": BATCH[options.device]}
            missing = ({"contestant": name, "absent": why} for name, why in absent.items())
            for row in (*results(case, dtype, options.device, times), *missing):
                print(line(write_row(options.results, {**what, **row})), flush=True)
        if options.host and dtype == options.dtype[0]:
            for row in host_rows(op, options.device, options.rounds, wanted):
                write_row(options.results, {**row, "arguments": given(options, "fp32")})
                took = f"does not run: {row['absent']}" if "absent" in row else f"{row['us']} us"
                print(f"{op}: the host's time of a call of {row['contestant']}: {took}", flush=True)
    return 0


def given(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Every argument of one race, as its rows have them."""
    named = ("device", "rounds", "case", "contestants", "host", "tests")
    return {"dtype": dtype, **{name: getattr(options, name) for name in named}}


if __name__ == "__main__":
    sys.exit(main())
