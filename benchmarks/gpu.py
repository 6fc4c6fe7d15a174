"""Everything that a GPU is wanted for, in one command: compile, test, then measure, the most important first.

    python -m benchmarks.gpu               # smoke tests, then Swin-B and ViT-B, within nine minutes
    python -m benchmarks.gpu --full        # all GPU tests, every model, dtype, batch and contestant, without a limit
    python -m benchmarks.gpu --dry-run     # the plan, and what of it is left

Each stage of the short plan has a cap, so that none starves those after it; what ran over its cap has what time is left
in the end, or that of the next call. Called again, it passes over what this code has rows of on this GPU, whatever was
committed of rows and pages in between. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, DTYPES
from benchmarks.contestants import names
from benchmarks.parity import RUNS
from benchmarks.results import RESULTS, ROOT, begin, checkout, conditions, is_same_code, read_rows, write_row
from benchmarks.trainees import CONTESTANTS
from simmim_fast import _native

BUDGET = 525  # seconds, of nine minutes
BATCH = 128  # images in a step
BATCHES = (128, 256, 64)  # of the whole plan
LARGEST = {"swin_large_192": 128}  # images in a step that 80 GB hold beside the other contestants
PAIRS, ROUNDS = 10, 30  # timed steps, and calls of an op, of each contestant
PARITY = {"batch": 64, "steps": 300, "lr": 5e-4}
EAGER = ("fast", "fast_graph", "reference", "hf_sdpa")
COMPILED = (*EAGER[:-2], "compiled")
FULL_MODELS = ("swin_base_192", "vit_base_224", "swin_large_192", "swinv2_base_192")
OPS = (  # of the short plan, with one case of each, as most blocks or the fused model have it
    ("shifted_window_attention", "swin_base_192 stage 3 shifted"),
    ("biased_attention", "vit_base_224"),
    ("linear_masked_loss", "swin_base_192 listed"),
)
SMOKE = ("tests/models/test_cuda.py", "tests/ops/test_every_op.py", "tests/train/test_graph.py")
PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
# Seconds that a stage of the short plan may take; together they leave some 80 s of the budget to the smoke tests.
CAPS = {"build": 240.0, "eager": 60.0, "compiled": 80.0, "op": 25.0, "parity": 90.0}
BUILD = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-e", ".")

Run = Callable[[Sequence[str], float], int | None]


@dataclass(frozen=True)
class Stage:
    """One command of the plan.

    Attributes:
        title: What it does.
        arguments: Of Python.
        benchmark: The kind of its rows; None where it leaves none.
        wanted: What some rows must say for it to be done: a mapping for each, in which `...` is anything. A contestant
            may say why it is absent, where another one ran.
        cap: Seconds after which the stages behind it come first.
        reserved: Seconds of the whole that it leaves to the stages behind it.
    """

    title: str
    arguments: tuple[str, ...]
    benchmark: str | None = None
    wanted: tuple[Mapping[str, Any], ...] = field(default=())
    cap: float = float("inf")
    reserved: float = 0.0


def plan(full: bool = False, official: Path | None = None) -> list[Stage]:
    """The commands that measure, the most important first.

    Args:
        full: Also every model, dtype, batch, contestant and op that the short plan leaves out.
        official: Checkout of microsoft/SimMIM, for the contestant of that name.
    """
    models = FULL_MODELS[:2]
    stages = [_step(model, "bf16", BATCH, EAGER, cap=CAPS["eager"]) for model in models]
    stages += [_step(model, "bf16", BATCH, COMPILED, cap=CAPS["compiled"]) for model in models]
    stages += [_ops(op, "bf16", case, cap=CAPS["op"]) for op, case in OPS]
    stages.append(_parity("swin_base_192", "bf16", RUNS[:3], cap=CAPS["parity"]))
    if not full:
        return [_after("smoke-passed", stage) for stage in stages]
    for dtype, batch, model in itertools.product(("bf16", "fp32"), BATCHES, FULL_MODELS):
        if batch <= LARGEST.get(model, max(BATCHES)):
            stages.append(_step(model, dtype, batch, CONTESTANTS, official))
    stages += [_ops(op, dtype) for dtype in reversed(DTYPES) for op in CASES]
    stages += [_parity(model, dtype, RUNS) for dtype in ("bf16", "fp32") for model in FULL_MODELS]
    return [_after("passed", stage) for stage in {stage.title: stage for stage in stages}.values()]


def _after(tests: str, stage: Stage) -> Stage:
    """The stage, whose rows say which tests went before."""
    return replace(stage, arguments=(*stage.arguments, "--tests", tests))


def _step(
    model: str,
    dtype: str,
    batch: int,
    contestants: Sequence[str],
    official: Path | None = None,
    cap: float = float("inf"),
) -> Stage:
    options = () if official is None else ("--official", str(official))
    # Without a checkout, a race that had one will do: it had all the others as well.
    raced = ... if official is None else checkout(official)
    given = {"model": model, "dtype": dtype, "batch": batch, "device": "cuda", "official": raced, "pairs": PAIRS}
    command = ("-m", "benchmarks.step", "--models", model, "--dtype", dtype, "--batch", str(batch))
    command = (*command, "--pairs", str(PAIRS))
    listed = ("--contestants", *contestants)
    title = f"step of {model}, {dtype}, batch {batch}: {', '.join(contestants)}"
    given["contestants"] = list(contestants)
    wanted = tuple({"benchmark": "step", "contestant": one, "arguments": given} for one in contestants)
    return Stage(title, (*command, "--device", "cuda", *listed, *options), "step", wanted, cap)


def _ops(op: str, dtype: str, case: str = "", *, cap: float = float("inf")) -> Stage:
    """All cases of an op, or the one of this name; by all contestants, and the host's time of a call of each."""
    command = ("-m", "benchmarks.ops", "--op", op, "--dtype", dtype, "--device", "cuda", "--host")
    command = (*command, "--rounds", str(ROUNDS), *(("--case", case) if case else ()))
    given = {"device": "cuda", "rounds": ROUNDS, "contestants": None, "host": True}
    raced = {"benchmark": "op", "op": op, "arguments": {**given, "dtype": dtype}}
    called = {"benchmark": "op_host", "op": op, "arguments": given}
    wanted = tuple(
        {**what, "contestant": one}
        for what in (*({**raced, "case": name} for name in ([case] if case else CASES[op])), called)
        for one in names(op)
    )
    return Stage(f"{op}, {dtype}" + (f": {case}" if case else ""), command, "op", wanted, cap)


def _parity(model: str, dtype: str, runs: Sequence[str], cap: float = float("inf")) -> Stage:
    command = ("-m", "benchmarks.parity", "--models", model, "--dtype", dtype, "--device", "cuda")
    options = [text for name, value in PARITY.items() for text in (f"--{name}", str(value))]
    given = {"model": model, "dtype": dtype, "device": "cuda", **PARITY}
    wanted = ({"benchmark": "parity", "arguments": given, "losses": dict.fromkeys(runs, ...)},)
    title = f"parity of {model}, {dtype}: {', '.join(runs)}"
    return Stage(title, (*command, *options, "--runs", *runs), "parity", wanted, cap)


def is_done(stage: Stage, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rows, as of `comparable`, hold all of a stage.

    Rows of those who did not run are no measurement: of each benchmark that a stage wants, somebody must have run.
    """
    ran = set()
    for wanted in stage.wanted:
        found = [row for row in rows if _says(row, wanted)]
        if not found:
            return False
        ran |= {row["benchmark"] for row in found if "absent" not in row}
    return bool(stage.wanted) and ran == {wanted["benchmark"] for wanted in stage.wanted}


def comparable(rows: Iterable[Mapping[str, Any]], gpu: str) -> list[Mapping[str, Any]]:
    """The rows that this code has on this GPU: of commits that do not differ from the files that there are."""
    same_code = functools.cache(is_same_code)

    def is_comparable(row: Mapping[str, Any]) -> bool:
        facts = row["conditions"]
        return gpu in [one["name"] for one in facts["gpus"]] and not facts["dirty"] and same_code(facts["commit"])

    return list(filter(is_comparable, rows))


def _says(row: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(row, Mapping) and all(name in row and _says(row[name], wanted[name]) for name in wanted)
    return wanted is ... or row == wanted


def first(full: bool = False) -> Iterator[Stage]:
    """What comes before any measurement: compiling, where something is missing, and GPU tests.

    Nobody knows how long Triton compiles for the smoke tests on a new machine, and without them nothing is measured:
    they may take all that the first steps do not need.

    Args:
        full: All of them, and not only the smoke tests: a case an op and backend, a graph and a model.
    """
    if _native.why_not("cuda") is not None:
        yield Stage("compiling", BUILD, cap=CAPS["build"])
    if full:
        command, title, reserved = (*PYTEST, "-m", "gpu and not slow"), "all GPU tests", 0.0
    else:
        command, title, reserved = (*PYTEST, "-m", "gpu and smoke", *SMOKE), "the smoke tests", 2 * CAPS["eager"]
    wanted = {"benchmark": "gpu_tests", "arguments": {"device": "cuda", "tests": title}}
    yield Stage(title, command, "gpu_tests", (wanted,), reserved=reserved)


def stored(results: Path) -> list[dict[str, Any]]:
    """All rows of a folder."""
    return [row for path in sorted(results.glob("*.jsonl")) for row in read_rows(path)]


def run_all(
    stages: Sequence[Stage], budget: float, run: Run, done: Callable[[Stage], bool], passed: Callable[[Stage], object]
) -> list[str]:
    """Run stages in order within a budget; those that ran over their cap once more, with what is left.

    Args:
        stages: As of `first` and `plan`.
        budget: Seconds; what runs when they are over is ended.
        run: (arguments of Python, seconds left) -> exit status; None for a stage that was ended.
        done: Whether a stage has its rows.
        passed: Called with the stage of the GPU tests where they have passed.

    Returns:
        The titles of the stages that are left.

    Raises:
        SystemExit: Compiling or a test failed, or had too little time: nothing is measured.
    """
    end, left = time.monotonic() + budget, {}  # exit statuses by title
    for stage in stages:
        if done(stage):
            print(f"there already: {stage.title}", flush=True)
        else:
            seconds = min(stage.cap, end - time.monotonic() - stage.reserved)
            left[stage.title] = _attempt(stage, seconds, run, passed)
    for stage in stages:
        seconds = end - time.monotonic()
        if left.get(stage.title, 0) is None and seconds > stage.cap:  # more than it had
            left[stage.title] = _attempt(stage, seconds, run, passed)
    return [title for title, status in left.items() if status != 0]


def _attempt(stage: Stage, seconds: float, run: Run, passed: Callable[[Stage], object]) -> int | None:
    """The exit status of a stage; None where it was ended, or there was no time to begin."""
    status = None
    if seconds > 0:
        print(f"== {stage.title}", flush=True)
        status = run(stage.arguments, seconds)
    if stage.benchmark in (None, "gpu_tests") and status != 0:
        sys.exit(f"nothing is measured: {stage.title} failed or took too long")
    if stage.benchmark == "gpu_tests":
        passed(stage)
    return status


def _run(arguments: Sequence[str], seconds: float) -> int | None:
    try:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--full", action="store_true", help="everything, without a limit")
    add("--dry-run", action="store_true", help="print the plan and run nothing; needs no GPU")
    add("--budget", type=float, metavar="SECONDS", help=f"of the whole (default: {BUDGET}, with --full none)")
    add("--official", type=Path, metavar="PATH", help="checkout of microsoft/SimMIM, with --full")
    options = parser.parse_args(arguments)
    if options.budget is None:
        options.budget = float("inf") if options.full else BUDGET
    if not options.budget > 0:
        parser.error(f"--budget must be positive, got {options.budget}")
    if options.official is not None and not options.full:
        parser.error("--official needs --full, whose plan alone has the official code")
    if options.official is not None:
        options.official = options.official.resolve()  # stages run in the root of the checkout
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device; --dry-run prints the plan without one")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Print the plan, or run it."""
    options = parse(arguments)
    begin()
    gpus = conditions()["gpus"]
    rows = comparable(stored(RESULTS), gpus[0]["name"] if gpus else "")

    def done(stage: Stage) -> bool:
        return is_done(stage, rows)

    def passed(stage: Stage) -> None:
        write_row(RESULTS / "gpu_tests.jsonl", stage.wanted[0])

    stages = [*first(options.full), *plan(options.full, options.official)]
    if options.dry_run:
        for stage in stages:
            print(f"{'there  ' if done(stage) else 'to do  '}{stage.title}\n       {shlex.join(stage.arguments)}")
        return
    left = run_all(stages, options.budget, _run, done, passed)
    print(*(f"left for the next call: {title}" for title in left), sep="\n")


if __name__ == "__main__":
    main()
