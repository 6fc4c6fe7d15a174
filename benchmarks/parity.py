"""Whether the fast model trains as the reference does: both loss curves, and how far apart they come.

    python -m benchmarks.parity --models swin_micro_96 --dtype fp32 --steps 300

The tests of the models run first. All runs start from the same parameters and see the same photographs under the same
masks. Two more runs of the reference show what rounding alone does: "reordered" sees the images of each batch in the
reverse order, so that the same sums are rounded otherwise; "precise" computes in the next wider type.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.cases import DTYPES
from benchmarks.measure import Absent, devices
from benchmarks.models import MODELS, build, masks_for, model_name
from benchmarks.photographs import crops
from benchmarks.results import RESULTS, begin, write_row
from benchmarks.trainees import Trainee

DEFAULTS = {"cpu": ("swin_micro_96", "fp32", 8), "cuda": ("swin_base_192", "bf16", 64)}  # model, dtype, batch
RUNS = ("fast", "reference", "reordered", "precise")
WIDER = {"bf16": "fp32", "fp32": "fp64"}
WARM_UP = 20  # steps over which the learning rate rises
POOL = 448  # crops, from which batches are drawn
LAST = 20  # steps whose mean is the loss at the end


def losses(run: str, given: Mapping[str, Any], state: Mapping[str, Tensor], photographs: Tensor) -> list[float]:
    """The loss of every step of a run.

    Args:
        run: Of `RUNS`.
        given: "model", "dtype", "batch", "device", "steps", "lr".
        state: Parameters that it starts from.
        photographs: (count, 3, H, W) float32.
    """
    model = build(given["model"], backend="auto" if run == "fast" else "reference", drop_path_rate=0.0)
    model.load_state_dict(state)
    dtype = WIDER[given["dtype"]] if run == "precise" else given["dtype"]
    wide = torch.float64 if dtype == "fp64" else torch.float32
    one = Trainee(model.to(given["device"], wide), dtype)
    curve = []
    for step, (images, mask) in enumerate(batches(masks_for(model), photographs, given)):
        if run == "reordered":
            images, mask = images.flip(0), mask.flip(0)
        for group in one.optimizer.param_groups:
            group["lr"] = given["lr"] * min(1.0, (step + 1) / WARM_UP)
        curve.append(one.step(images.to(wide), mask)[0])
    return torch.stack(curve).double().tolist()


def batches(masks: Any, photographs: Tensor, given: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same images (batch, 3, H, W) and masks for every run."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(given["steps"]):
        chosen = torch.randint(len(photographs), (given["batch"],), generator=generator)
        mask = masks.batch(given["batch"], generator=generator)
        yield photographs[chosen.to(photographs.device)], mask.to(photographs.device)


def gaps(curves: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """How far each other curve is from the reference's, relative to it.

    Returns:
        "largest" over the steps, the "step" where it is, counted from 1, "median" over the steps, and "end": that of
        the mean over the last steps.
    """
    reference = curves["reference"]
    end = statistics.fmean(reference[-LAST:])
    facts = {}
    for run, curve in curves.items():
        if run == "reference":
            continue
        apart = [abs(a - b) / b for a, b in zip(curve, reference, strict=True)]
        largest = max(apart)
        facts[run] = {
            "largest": largest,
            "step": apart.index(largest) + 1,
            "median": statistics.median(apart),
            "end": abs(statistics.fmean(curve[-LAST:]) - end) / end,
        }
    return facts


def table(row: Mapping[str, Any]) -> Iterator[str]:
    """Lines of text: a run each."""
    titles = f"{'first loss':>11} {'last losses':>12} {'largest gap':>12} {'at step':>8} {'median':>9} {'at end':>9}"
    yield f"{'':<12} {titles}"
    for run, curve in row["losses"].items():
        ends = f"{run:<12} {curve[0]:>11.5f} {statistics.fmean(curve[-LAST:]):>12.5f}"
        gap = row["gaps"].get(run)
        yield ends + (
            "" if gap is None else f" {gap['largest']:>12.2e} {gap['step']:>8} {gap['median']:>9.1e} {gap['end']:>9.1e}"
        )


def measure(given: Mapping[str, Any], runs: Sequence[str]) -> dict[str, Any]:
    """The row of one comparison, as JSON has it.

    Raises:
        Absent: There are no photographs.
    """
    torch.manual_seed(0)
    start = build(given["model"], backend="reference", drop_path_rate=0.0)
    photographs = crops(start.img_size, POOL).to(given["device"])
    curves = {}
    for run in runs:
        print(f"training {run}", flush=True)
        curves[run] = losses(run, given, start.state_dict(), photographs)
    return {"benchmark": "parity", "arguments": dict(given), "losses": curves, "gaps": gaps(curves)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser("python -m benchmarks.parity", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=devices(), default=devices()[0], help="default: %(default)s")
    add("--models", nargs="+", type=model_name, choices=MODELS, help="default: a small Swin on the CPU, else Swin-B")
    add("--dtype", nargs="+", choices=DTYPES, help="default: fp32 on the CPU, else bf16, which is autocast")
    add("--batch", type=int, help="images in a step (default: 8 on the CPU, else 64)")
    add("--steps", type=int, default=300, help="updates (default: %(default)s)")
    add("--lr", type=float, default=5e-4, help="learning rate after a short rise (default: %(default)s)")
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="must hold reference (default: all)")
    add("--results", type=Path, default=RESULTS / "parity.jsonl", metavar="FILE", help="rows are appended here")
    gate.add_option(parser)
    options = parser.parse_args(arguments)
    model, dtype, batch = DEFAULTS[options.device]
    options.models, options.dtype = options.models or [model], options.dtype or [dtype]
    options.batch = batch if options.batch is None else options.batch
    for name, value, least in (("--batch", options.batch, 1), ("--steps", options.steps, 1)):
        if value < least:
            parser.error(f"{name} must be at least {least}, got {value}")
    if not options.lr > 0:
        parser.error(f"--lr must be positive, got {options.lr}")
    if "reference" not in options.runs or len(options.runs) < 2:
        parser.error(f"--runs must hold reference and another, got {' '.join(options.runs)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Test, train, print and write rows."""
    options = parse(arguments)
    begin()
    gate.require(gate.MODELS, options.device, options.tests)
    for name, dtype in itertools.product(options.models, options.dtype):
        print(f"{name}, {dtype}, batch {options.batch}, {options.device}, {options.steps} steps", flush=True)
        try:
            row = measure(given(options, name, dtype), options.runs)
        except Absent as reason:
            sys.exit(f"nothing is compared: {reason}")
        write_row(options.results, row)
        print(*table(row), "", sep="\n", flush=True)


def given(options: argparse.Namespace, model: str, dtype: str) -> dict[str, Any]:
    """Every argument of one comparison, as its row has them."""
    named = ("batch", "device", "steps", "lr", "runs", "tests")
    return {"model": model, "dtype": dtype, **{name: getattr(options, name) for name in named}}


if __name__ == "__main__":
    main()
