"""Images a second of the whole training step: forward, backward, clipping, fused AdamW.

    python -m benchmarks.step --models swin_base_192 vit_base_224 --dtype bf16 --batch 8

Contestants take turns, step by step, so that drift hits all of them; on inputs that rotate. First they must agree with
the reference on the loss and the norm of the gradient; where one does not, no speed is printed and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import BATCH, DTYPES
from benchmarks.contestants import Absent
from benchmarks.measure import ROTATION, devices
from benchmarks.models import MODELS, build, draw_inputs, model_name
from benchmarks.results import RESULTS, write_row
from benchmarks.trainees import CONTESTANTS, Trainee, trainee

DEFAULT_MODELS = {"cpu": ("swin_micro_96", "vit_micro_96"), "cuda": ("swin_base_192", "vit_base_224")}
DEFAULT_CONTESTANTS = ("fast", "reference", "compiled", "sdpa")
WARM_UP = 3  # steps
# Largest relative distance from the reference of the loss and of the gradient's norm.
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass
class Entrant:
    """A contestant in one race.

    Attributes:
        name: Its name.
        trainee: What steps.
        own_bytes: Memory that it holds between steps, on CUDA.
        peak_bytes: The most that it held in a step.
        seconds: Of each step.
    """

    name: str
    trainee: Trainee
    own_bytes: int = 0
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)


class Disagreement(Exception):
    """A contestant computes something else than the reference."""


def race(
    name: str, dtype: str, batch: int, device: str, contestants: Sequence[str], pairs: int
) -> tuple[list[Entrant], list[str]]:
    """Time the contestants in turn.

    Args:
        name: Key of `MODELS`.
        dtype: "bf16" or "fp32".
        batch: Images in a step.
        device: "cpu" or "cuda".
        contestants: Of `CONTESTANTS`.
        pairs: Timed steps of each.

    Returns:
        The entrants with their times, and a line for each contestant that is absent.

    Raises:
        Disagreement: One of them is wrong; none was timed.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    start = build(name, backend="reference")
    sets = [draw_inputs(start, batch, device, seed) for seed in range(ROTATION)]
    state = start.state_dict()
    expected = _first_gradients(trainee("reference", name, dtype, device, state), *sets[0])
    entrants, absent = [], []
    for contestant in contestants:
        held = _allocated(device)
        try:
            entrant = Entrant(contestant, trainee(contestant, name, dtype, device, state))
            _check(contestant, _first_gradients(entrant.trainee, *sets[0]), expected, dtype)
        except Absent as reason:
            absent.append(f"{contestant} does not run: {reason}")
            continue
        for inputs in itertools.islice(itertools.cycle(sets), WARM_UP):
            entrant.trainee.step(*inputs)
        entrant.trainee.optimizer.zero_grad()
        entrant.own_bytes = _allocated(device) - held
        entrants.append(entrant)
    for pair, inputs in enumerate(itertools.islice(itertools.cycle(sets), pairs)):
        for entrant in entrants[:: 1 if pair % 2 == 0 else -1]:
            _time(entrant, inputs, device)
    return entrants, absent


def _first_gradients(one: Trainee, images: Tensor, mask: Tensor) -> dict[str, float]:
    """Loss and norm of the gradient without an update; without stochastic depth, which a compiler draws otherwise."""
    one.model.train(not one.draws)
    loss, norm = one.gradients(images, mask)
    one.optimizer.zero_grad()
    one.model.train()
    return {"loss": loss.item(), "gradient norm": norm.item()}


def _check(contestant: str, actual: Mapping[str, float], expected: Mapping[str, float], dtype: str) -> None:
    for what, value in expected.items():
        distance = abs(actual[what] - value) / abs(value)
        if not distance <= AGREEMENT[dtype]:
            raise Disagreement(
                f"{contestant} is wrong: its {what} is {actual[what]:.6g}, the reference's {value:.6g};"
                f" relative distance {distance:.2g}, at most {AGREEMENT[dtype]:g} is allowed"
            )


def _time(entrant: Entrant, inputs: tuple[Tensor, Tensor], device: str) -> None:
    """One step on the clock, and its peak; gradients of the step before were let go of."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    held, begin = _allocated(device), time.perf_counter()
    entrant.trainee.step(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    entrant.seconds.append(time.perf_counter() - begin)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() - held + entrant.own_bytes
        entrant.peak_bytes = max(entrant.peak_bytes, peak)
    entrant.trainee.optimizer.zero_grad()


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def results(entrants: Sequence[Entrant], batch: int) -> Iterator[dict[str, Any]]:
    """What each entrant reached, as JSON has it. "times_faster_than" are medians over the pairs."""
    for one in entrants:
        rates = sorted(batch / seconds for seconds in one.seconds)
        yield {
            "contestant": one.name,
            "images_per_second": {"median": statistics.median(rates), **_percentiles(rates)},
            "times_faster_than": {
                other.name: statistics.median(b / a for a, b in zip(one.seconds, other.seconds, strict=True))
                for other in entrants
                if other is not one
            },
            "peak_bytes": one.peak_bytes or None,
            "seconds": one.seconds,
        }


def _percentiles(rates: Sequence[float]) -> dict[str, float]:
    """The 20th and the 80th, between which three fifths of the rates are."""
    if len(rates) == 1:
        return {"p20": rates[0], "p80": rates[0]}
    fifths = statistics.quantiles(rates, n=5, method="inclusive")
    return {"p20": fifths[0], "p80": fifths[-1]}


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of text: a contestant each; the last columns say how many times faster it is than the others."""
    names = [row["contestant"] for row in rows]
    yield f"{'':<14} {'images/s':>10} {'p20':>10} {'p80':>10} {'peak GiB':>9}" + "".join(
        f" {'/ ' + n:>15}" for n in names
    )
    for row in rows:
        rate = row["images_per_second"]
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
        ratios = [row["times_faster_than"].get(name) for name in names]
        yield (
            f"{row['contestant']:<14} {rate['median']:>10.2f} {rate['p20']:>10.2f} {rate['p80']:>10.2f} {peak:>9}"
            + "".join(f" {'-' if ratio is None else f'{ratio:.2f}':>15}" for ratio in ratios)
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=devices(), default=devices()[0], help="default: %(default)s")
    add(
        "--models",
        nargs="+",
        type=model_name,
        choices=MODELS,
        help="default: a small pair on the CPU, else Swin-B, ViT-B",
    )
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="bf16 is autocast (default: bf16)")
    add(
        "--batch",
        nargs="+",
        type=int,
        help=f"images in a step (default: {BATCH['cpu']} on the CPU, {BATCH['cuda']} on a GPU)",
    )
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(DEFAULT_CONTESTANTS), help="default: %(default)s")
    add("--pairs", type=int, default=10, help="timed steps of each contestant (default: %(default)s)")
    add("--results", type=Path, default=RESULTS / "step.jsonl", metavar="FILE", help="rows are appended here")
    options = parser.parse_args(arguments)
    if min(options.pairs, *(options.batch or [1])) < 1:
        parser.error("--pairs and --batch must be at least 1")
    options.models = options.models or list(DEFAULT_MODELS[options.device])
    options.batch = options.batch or [BATCH[options.device]]
    return options


def main(arguments: list[str] | None = None) -> None:
    """Race, print and write rows."""
    options = parse(arguments)
    for name, dtype, batch in itertools.product(options.models, options.dtype, options.batch):
        print(f"{name}, {dtype}, batch {batch}, {options.device}, {options.pairs} steps each", flush=True)
        try:
            entrants, absent = race(name, dtype, batch, options.device, options.contestants, options.pairs)
        except Disagreement as error:
            sys.exit(str(error))
        rows = list(results(entrants, batch))
        given = {"model": name, "dtype": dtype, "batch": batch, "device": options.device, "pairs": options.pairs}
        given["contestants"] = options.contestants
        for row in rows:
            write_row(options.results, {"benchmark": "step", "arguments": given, **row})
        print(*absent, *table(rows), "", sep="\n", flush=True)
        del entrants
        gc.collect()


if __name__ == "__main__":
    main()
