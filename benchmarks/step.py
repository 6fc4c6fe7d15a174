"""Images a second of the whole training step: forward, backward, clipping, fused AdamW.

    python -m benchmarks.step --models swin_base_192 vit_base_224 --dtype bf16 --batch 8

The tests of the models run first. Contestants take turns, step by step, so that drift hits all of them; on inputs that
rotate. First each must agree with the reference on the loss and on the gradient of every parameter; where one does not,
no speed is printed and the exit status is 1. Those of another method have nobody to agree with, and a table of their
own. Who cannot run is named, with the reason, and the others race.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.agreement import Disagreement, Oracle, check_finite, check_scalars, findings
from benchmarks.cases import BATCH, DTYPES
from benchmarks.comparators import COMPARATORS
from benchmarks.limits import Limits, limits
from benchmarks.measure import ROTATION, devices, reason, synchronize
from benchmarks.models import MODELS, draw_inputs, loss_of, model_name
from benchmarks.profiles import shares
from benchmarks.results import RESULTS, begin, checkout, write_row
from benchmarks.trainees import CONTESTANTS, FAST, GraphedTrainee, Setting, Trainee, trainee

DEFAULT_MODELS = {"cpu": ("swin_micro_192", "vit_micro_96"), "cuda": ("swin_base_192", "vit_base_224")}
DEFAULT_CONTESTANTS = {
    "cpu": ("fast", "reference", "compiled", "sdpa", "hf_sdpa", "timm", "mae", "beit", "supervised"),
    "cuda": CONTESTANTS,
}
WARM_UP = 5  # steps; a CUDA graph is recorded in the fourth
# Of one model: in evaluation, to be compared without stochastic depth, and in training. Dynamo counts those of all
# contestants together, since it is one function that they compile, and gives up beyond a limit.
COMPILATIONS = 2


@dataclass
class Entrant:
    """A contestant in one race.

    Attributes:
        name: Its name.
        trainee: What steps.
        own_bytes: Memory that it holds between steps, on CUDA.
        peak_bytes: The most that it held in a step.
        seconds: Of each step.
        shares: Of each kind of operator in the time of one more step, where that was asked for.
    """

    name: str
    trainee: Trainee
    own_bytes: int = 0
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    shares: dict[str, float] | None = None


def race(
    setting: Setting, contestants: Sequence[str], pairs: int, profiled: bool = False
) -> tuple[list[Entrant], dict[str, str]]:
    """Time the contestants in turn.

    Args:
        setting: What is trained.
        contestants: Of `CONTESTANTS`.
        pairs: Timed steps of each.
        profiled: Whether one more step of each is profiled.

    Returns:
        The entrants with their times, and why each of the others does not run.

    Raises:
        Disagreement: One of them is wrong; none was timed.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    limit = torch._dynamo.config.recompile_limit + COMPILATIONS * len(contestants)
    with torch._dynamo.config.patch(recompile_limit=limit):
        entered = Field(setting)
        for contestant in contestants:
            entered.enter(contestant)
        entered.let_each(_step, entered.sets[0])  # what came after it may make a compiler look at it again
        for pair, inputs in enumerate(itertools.islice(itertools.cycle(entered.sets), pairs)):
            entered.let_each(_time, inputs, backwards=pair % 2 == 1)
        if profiled:
            entered.let_each(_profile, entered.sets[0])
    return list(entered.entrants.values()), entered.absent


class Field:
    """Who is in a race, and why the others are not.

    Args:
        setting: What is trained.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.oracle = Oracle(setting)
        model = self.oracle.model()
        self.sets = [draw_inputs(model, setting.batch, setting.device, seed) for seed in range(ROTATION)]
        self.entrants: dict[str, Entrant] = {}
        self.absent: dict[str, str] = {}

    def enter(self, contestant: str) -> None:
        """Let a contestant in that runs, agrees and is warm."""
        try:
            self.entrants[contestant] = _prepared(contestant, self.setting, self.oracle, self.sets)
        except Disagreement:
            raise
        except Exception as error:
            self.absent[contestant] = reason(error)
        _let_go(self.setting.device)

    def let_each(self, act: Callable[..., None], inputs: tuple[Tensor, Tensor], backwards: bool = False) -> None:
        """Let each entrant act on the inputs, in turn; who fails, as where the memory does not suffice, is out."""
        for name in list(self.entrants)[:: -1 if backwards else 1]:
            try:
                act(self.entrants[name], inputs, self.setting.device)
            except Exception as error:
                self.absent[name] = reason(error)
            if name in self.absent:  # whose memory the next one may need
                del self.entrants[name]
                _let_go(self.setting.device)


def _prepared(contestant: str, setting: Setting, oracle: Oracle, sets: Sequence[Any]) -> Entrant:
    """A contestant that agrees and is warm."""
    _let_go(setting.device)
    held, reserved = _memory(setting.device)
    one, counterpart = trainee(contestant, setting, oracle.model)
    actual = findings(one, *sets[0])
    if counterpart is None:
        check_finite(contestant, actual.scalars)
    else:
        oracle.check(contestant, actual, counterpart, *sets[0])
    del actual
    for inputs in itertools.islice(itertools.cycle(sets), WARM_UP):
        one.step(*inputs)
    if isinstance(one, GraphedTrainee) and not one.draws:
        _check_replay(contestant, one, *sets[0])
    one.optimizer.zero_grad()
    _let_go(setting.device)
    now, reserved_now = _memory(setting.device)
    # A CUDA graph keeps the memory of its step for itself: reserved, though nothing is allocated there.
    return Entrant(contestant, one, own_bytes=now - held, peak_bytes=reserved_now - reserved)


def _let_go(device: str) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _check_replay(contestant: str, one: Trainee, images: Tensor, mask: Tensor) -> None:
    """A replayed step must find the loss that the same parameters have by themselves."""
    with torch.no_grad():
        expected = loss_of(one.model, images, mask, one.dtype).item()
    actual = one.step(images, mask)[0].item()
    check_scalars(contestant, {"replayed loss": actual}, {"replayed loss": expected}, one.dtype)


def _step(entrant: Entrant, inputs: tuple[Tensor, Tensor], device: str) -> None:
    """One step off the clock."""
    entrant.trainee.step(*inputs)
    entrant.trainee.optimizer.zero_grad()


def _profile(entrant: Entrant, inputs: tuple[Tensor, Tensor], device: str) -> None:
    """Where the time of one step goes."""
    entrant.shares = shares(partial(_step, entrant, inputs, device), device)


def _time(entrant: Entrant, inputs: tuple[Tensor, Tensor], device: str) -> None:
    """One step on the clock, and its peak; gradients of the step before were let go of."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    held, begin = _memory(device)[0], time.perf_counter()
    entrant.trainee.step(*inputs)
    synchronize(device)
    entrant.seconds.append(time.perf_counter() - begin)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() - held + entrant.own_bytes
        entrant.peak_bytes = max(entrant.peak_bytes, peak)
    entrant.trainee.optimizer.zero_grad()


def _memory(device: str) -> tuple[int, int]:
    """Bytes allocated, and reserved by the allocator."""
    return (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if device == "cuda" else (0, 0)


def results(entrants: Sequence[Entrant], batch: int, limit: Limits) -> Iterator[dict[str, Any]]:
    """What each entrant reached, as JSON has it. "times_faster_than" are medians over the pairs."""
    for one in entrants:
        rates = sorted(batch / seconds for seconds in one.seconds)
        median = statistics.median(rates)
        same = one.name not in COMPARATORS
        yield {
            "contestant": one.name,
            "same_method": same,
            "images_per_second": {"median": median, **_percentiles(rates)},
            "times_faster_than": {
                other.name: statistics.median(b / a for a, b in zip(one.seconds, other.seconds, strict=True))
                for other in entrants
                if other is not one
            },
            "peak_bytes": one.peak_bytes or None,
            "limits": limit.as_json(),
            "mfu": median / limit.arithmetic if same else None,
            "memory_share": median / limit.memory if same and limit.memory else None,
            "seconds": one.seconds,
        }


def _percentiles(rates: Sequence[float]) -> dict[str, float]:
    """The 20th and the 80th, between which three fifths of the rates are."""
    if len(rates) == 1:
        return {"p20": rates[0], "p80": rates[0]}
    fifths = statistics.quantiles(rates, n=5, method="inclusive")
    return {"p20": fifths[0], "p80": fifths[-1]}


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of text: a contestant each; the last columns say how many times faster than it ours are."""
    for same, title in ((True, "SimMIM"), (False, "another method, for the cost of an epoch")):
        shown = [row for row in rows if row["same_method"] is same]
        if not shown:
            continue
        ours = [row for row in rows if row["contestant"] in FAST]
        yield title
        yield f"{'':<20} {'images/s':>10} {'p20':>10} {'p80':>10} {'peak GiB':>9} {'MFU':>6} {'memory':>7}" + "".join(
            f" {row['contestant'] + ' is x':>18}" for row in ours
        )
        yield from (_table_line(row, ours) for row in shown)


def _table_line(row: Mapping[str, Any], ours: Sequence[Mapping[str, Any]]) -> str:
    rate = row["images_per_second"]
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
    mfu, memory = ("-" if row[key] is None else f"{100 * row[key]:.1f}%" for key in ("mfu", "memory_share"))
    ratios = [one["times_faster_than"].get(row["contestant"]) for one in ours]
    return (
        f"{row['contestant']:<20} {rate['median']:>10.2f} {rate['p20']:>10.2f} {rate['p80']:>10.2f} {peak:>9}"
        f" {mfu:>6} {memory:>7}" + "".join(f" {'-' if ratio is None else f'{ratio:.2f}':>18}" for ratio in ratios)
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
    add("--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help=f"of {', '.join(CONTESTANTS)}")
    add("--official", type=Path, metavar="PATH", help="checkout of microsoft/SimMIM, for the contestant `official`")
    add("--pairs", type=int, default=10, help="timed steps of each contestant (default: %(default)s)")
    add("--profile", action="store_true", help="also write where the time of a step of each goes, by kind of operator")
    add("--results", type=Path, default=RESULTS / "step.jsonl", metavar="FILE", help="rows are appended here")
    gate.add_option(parser)
    options = parser.parse_args(arguments)
    for name, least in (("--pairs", options.pairs), ("--batch", min(options.batch or [1]))):
        if least < 1:
            parser.error(f"{name} must be at least 1, got {least}")
    if options.official is not None and not (options.official / "models" / "simmim.py").is_file():
        parser.error(f"--official must be a checkout of microsoft/SimMIM, got {options.official}")
    options.models = options.models or list(DEFAULT_MODELS[options.device])
    options.batch = options.batch or [BATCH[options.device]]
    options.contestants = options.contestants or list(DEFAULT_CONTESTANTS[options.device])
    return options


def main(arguments: list[str] | None = None) -> None:
    """Test, race, print and write rows."""
    options = parse(arguments)
    begin()
    gate.require(gate.MODELS, options.device, options.tests)
    for name, dtype, batch in itertools.product(options.models, options.dtype, options.batch):
        print(f"{name}, {dtype}, batch {batch}, {options.device}, {options.pairs} steps each", flush=True)
        limit = limits(name, dtype, batch, options.device)
        setting = Setting(name, dtype, batch, options.device, options.official)
        try:
            entrants, absent = race(setting, options.contestants, options.pairs, options.profile)
        except Disagreement as error:
            sys.exit(str(error))
        rows = list(results(entrants, batch, limit))
        written = (*rows, *({"contestant": one, "absent": why} for one, why in absent.items()))
        for row in written:
            write_row(options.results, {"benchmark": "step", "arguments": given(options, setting), **row})
        for one in (one for one in entrants if one.shares is not None):
            found = {"contestant": one.name, "shares": one.shares}
            write_row(options.results, {"benchmark": "profile", "arguments": given(options, setting), **found})
        print(*(f"{one} does not run: {why}" for one, why in absent.items()), *table(rows), "", sep="\n", flush=True)
        del entrants
        gc.collect()


def given(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Every argument of one race, as its rows have them."""
    raced = {"model": setting.model, "dtype": setting.dtype, "batch": setting.batch, "device": setting.device}
    named = {"contestants": options.contestants, "official": checkout(options.official)}
    return {**raced, "pairs": options.pairs, **named, "profile": options.profile, "tests": options.tests}


if __name__ == "__main__":
    main()
