"""Forward and backward of every op, contestants in turn: microseconds, and how many times faster than each other.

    python -m benchmarks.ops --op shifted_window_attention --dtype fp32 --rounds 30

Contestants take turns, call by call, so that drift hits all of them, on inputs that rotate. First their outputs must
agree with the eager one's; where one does not, nothing is timed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.cases import BATCH, CASES, DTYPES, Case
from benchmarks.contest import AGREEMENT
from benchmarks.contestants import Absent, Function, contestant, eager, names
from benchmarks.cost import cost
from benchmarks.measure import ROTATION, devices
from benchmarks.results import RESULTS, write_row
from simmim_fast._backends import BackendError
from simmim_fast.testing import random_gradient, relative_error

WARM_UP = 3  # rounds


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
    leaves = case.leaves(inputs)
    start = time.perf_counter()
    torch.autograd.grad(function(**inputs), leaves, grad_out)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def results(case: Case, dtype: str, device: str, seconds: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    """A row a contestant. Ratios are medians over the rounds of another's time over its own."""
    nbytes, flops = (sum(both) for both in zip(*cost(case, BATCH[device], DTYPES[dtype]), strict=True))
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
    add("--json", type=Path, metavar="FILE", help=f"append rows there (default: {RESULTS.name}/ops.jsonl)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    path = options.json or RESULTS / "ops.jsonl"
    for op in options.op:
        for case in CASES[op].values():
            if options.case and options.case not in case.name:
                continue
            for dtype in options.dtype:
                try:
                    wanted = options.contestants or names(op)
                    seconds = race(case, dtype, options.device, options.rounds, wanted)
                except Disagreement as error:
                    print(f"ops: nothing is timed: {error}", file=sys.stderr)
                    return 1
                for row in results(case, dtype, options.device, seconds):
                    print(line(write_row(path, row)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
