"""What this library asks of itself, and what the latest rows reach."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.cases import CASES
from benchmarks.tables import Row, by_machine, commits, fastest, latest, machine, markdown
from benchmarks.traffic_page import counted
from benchmarks.trainees import FAST

# On the CPU, forward and backward: how many times faster than the faster of eager and compiled.
OPS = {
    "substitute_mask_tokens": {"fp32": 1.5, "bf16": 1.5},
    "masked_patch_embed": {"fp32": 1.5, "bf16": 1.5},
    "shifted_window_attention": {"fp32": 3.0, "bf16": 2.5},
    "biased_attention": {"fp32": 1.1, "bf16": 1.1},
    "masked_l1_loss": {"fp32": 3.0, "bf16": 3.0},
    "linear_masked_loss": {"fp32": 1.6, "bf16": 1.6},
}
# The step on the CPU at batch 8: how many times faster than the eager reference.
STEPS = {"swin_base_192": {"fp32": 1.3, "bf16": 1.5}, "vit_base_224": {"fp32": 1.0, "bf16": 1.3}}
# The step on a GPU in bf16, at the batch that is best for ours: times faster than each, and MFU.
GPU_STEPS = {
    "swin_base_192": {"reference": 2.5, "compiled": 1.4, "MFU": 0.3},
    "vit_base_224": {"reference": 2.0, "compiled": 1.25, "MFU": 0.4},
}
# Forward and backward in bf16: megabytes per image and calls at batch 16.
TRAFFIC = {"swin_base_192": (650, 800), "vit_base_224": (620, 450)}
SAVED_SHARES = {"pointwise": 0.6, "mlp": 0.4}  # of what the reference saves for the backward, batch 8, by `recompute`
_PLAIN = ("eager", "compiled")  # what an op is held against
_NEEDS = """\
A step's MFU is the share of the matrix rate, measured in the same run, at which it does the plain model's products, all
the rest of the step in its time, the optimizer's included. To be so many times faster than another takes so many times
its MFU, and no more than 100% can be had but by leaving products out:"""

Line = tuple[str, ...]


def aims_table(rows: Sequence[Row]) -> Iterator[str]:
    """A line a figure: asked, reached, and whether that is enough; then what the ratios of the step would take."""
    lines = [*_step_lines(rows), *_gpu_lines(rows), *_traffic_lines(rows), *_op_lines(rows)]
    yield from markdown(("figure", "asked", "reached", "", "commit"), lines)
    yield ""
    if needs := list(_needs(rows)):
        yield from (_NEEDS, "")
        yield from markdown(("step", "against", "its MFU", "asked", "MFU needed", "MFU of ours"), needs, texts=2)
        yield ""


def _line(figure: str, sign: str, asked: float, reached: float | None, row: Row | None, unit: str = "×") -> Line:
    """A figure that must be `sign` (≥ or ≤) what is asked, and the row that it is from; None was not measured."""
    if row is None or reached is None:
        return figure, f"{sign} {asked:g}{unit}", "-", "not measured", "-"
    is_met = reached >= asked if sign == "≥" else reached <= asked
    return figure, f"{sign} {asked:g}{unit}", f"{reached:,.4g}{unit}", "met" if is_met else "missed", commits(row)


def _step_lines(rows: Sequence[Row]) -> Iterator[Line]:
    for model, ratios in STEPS.items():
        for dtype, asked in ratios.items():
            races = _cpu_races(rows, model, dtype)
            for place, race in (races or {"a CPU": None}).items():
                fast = None if race is None else race["fast"]
                ratio = None if fast is None else fast["times_faster_than"]["reference"]
                yield _line(f"step of {model}, {dtype}, batch 8, on {place}", "≥", asked, ratio, fast)


def _cpu_races(rows: Sequence[Row], model: str, dtype: str) -> dict[str, dict[str, Row]]:
    """By machine, the rows by contestant where `fast` was raced with the reference at batch 8."""
    wanted = {"model": model, "dtype": dtype, "batch": 8}
    found = (row for row in latest(rows, "step", "cpu") if wanted.items() <= row["arguments"].items())
    races = {place: {row["contestant"]: row for row in group} for place, group in by_machine(found).items()}
    return {
        place: race
        for place, race in races.items()
        if {"fast", "reference"} <= race.keys() and "reference" in race["fast"]["times_faster_than"]
    }


def _gpu_lines(rows: Sequence[Row]) -> Iterator[Line]:
    for model, asked in GPU_STEPS.items():
        for place, race in (_gpu_races(rows, model) or {"a GPU": None}).items():
            best = None if race is None else _fastest_of_ours(race)
            how = "best batch" if best is None else f"batch {best['arguments']['batch']}, `{best['contestant']}`"
            figure = f"step of {model}, bf16, {how}, on {place}"
            ratios = {} if best is None else best["times_faster_than"]
            for whom in ("reference", "compiled"):
                yield _line(f"{figure}, than `{whom}`", "≥", asked[whom], ratios.get(whom), best)
            mfu = None if best is None else 100 * best["mfu"]
            yield _line(f"{figure}: MFU", "≥", 100 * asked["MFU"], mfu, best, "%")


def _gpu_races(rows: Sequence[Row], model: str) -> dict[str, dict[str, Row]]:
    """By GPU, the rows by contestant in bf16 at the batch at which the fastest of ours is best."""
    wanted = {"model": model, "dtype": "bf16"}
    found = [row for row in latest(rows, "step", "cuda") if wanted.items() <= row["arguments"].items()]
    races = {}
    for place, group in by_machine(found).items():
        if ours := [row for row in group if row["contestant"] in FAST]:
            batch = fastest(ours)["arguments"]["batch"]
            races[place] = {row["contestant"]: row for row in group if row["arguments"]["batch"] == batch}
    return races


def _fastest_of_ours(race: Mapping[str, Row]) -> Row:
    return fastest(race[name] for name in FAST if name in race)


def _needs(rows: Sequence[Row]) -> Iterator[Line]:
    """The ratios asked of a step times the other's MFU: the share of the matrix rate that they take."""
    for model, ratios in STEPS.items():
        for dtype, asked in ratios.items():
            for place, race in _cpu_races(rows, model, dtype).items():
                step = f"{model}, {dtype}, batch 8, on {place}"
                yield _need(step, race["fast"], race["reference"], asked)
    for model, ratios in GPU_STEPS.items():
        for place, race in _gpu_races(rows, model).items():
            best = _fastest_of_ours(race)
            for whom in (name for name in ("reference", "compiled") if name in race):
                step = f"{model}, bf16, batch {best['arguments']['batch']}, on {place}"
                yield _need(step, best, race[whom], ratios[whom])


def _need(step: str, ours: Row, other: Row, asked: float) -> Line:
    shares = (other["mfu"], asked * other["mfu"], ours["mfu"])
    theirs, needed, own = (f"{share:.0%}" for share in shares)
    return step, f"`{other['contestant']}`", theirs, f"{asked:g}×", needed, own


def _traffic_lines(rows: Sequence[Row]) -> Iterator[Line]:
    found = {}
    for row in counted(rows):
        given = row["arguments"]
        if given["drop_path_rate"] is None and given["dtype"] == "bf16":
            found[given["model"], given["backend"], given["recompute"], given["batch"]] = row
    for model, (megabytes, calls) in TRAFFIC.items():
        row = found.get((model, "auto", "pointwise", 16))
        moved, called = (None, None) if row is None else (row["bytes"] / 16e6, row["calls"])
        yield _line(f"traffic of {model} per image, bf16, batch 16", "≤", megabytes, moved, row, " MB")
        yield _line(f"calls of {model}, bf16, batch 16", "≤", calls, called, row, "")
        for recompute, asked in SAVED_SHARES.items():
            ours, reference = found.get((model, "auto", recompute, 8)), found.get((model, "reference", None, 8))
            share = ours["saved_bytes"] / reference["saved_bytes"] if ours and reference else None
            what = f'saved for backward by {model}, recompute="{recompute}", bf16, batch 8, of the reference\'s'
            yield _line(what, "≤", asked, share, ours)


def _op_lines(rows: Sequence[Row]) -> Iterator[Line]:
    native = [row for row in latest(rows, "op", "cpu") if row["contestant"] == "native"]
    for op, asked in OPS.items():
        for dtype, case in itertools.product(asked, CASES[op]):
            found = [row for row in native if (row["op"], row["case"], row["arguments"]["dtype"]) == (op, case, dtype)]
            found = [row for row in found if set(_PLAIN) <= row["times_faster_than"].keys()]
            for place, row in ({machine(row): row for row in found} or {"a CPU": None}).items():
                ratio = None if row is None else min(row["times_faster_than"][name] for name in _PLAIN)
                yield _line(f"{op}, {case}, {dtype}, on {place}", "≥", asked[dtype], ratio, row)
