"""Tables in Markdown, made of rows alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.trainees import FAST

Row = Mapping[str, Any]
ABSENT = "Not measured yet."
HOW_OFTEN = ("contestants", "pairs", "rounds")  # arguments that make no other measurement
IMAGENET = 1_281_167  # training images of ImageNet-1K
# Whom the README's one table names, ours aside.
OPPONENTS = ("reference", "compiled", "max_autotune", "sdpa", "sdpa_compiled", "flex", "hf_sdpa", "hf_compiled", "timm")


def latest(rows: Iterable[Row], benchmark: str, device: str | None = None) -> list[Row]:
    """The last row of each case, set of arguments and contestant, without those on another device.

    Whom a contestant was raced against, and how often, makes no other measurement of it.
    """
    kept = {}
    for row in rows:
        if row["benchmark"] == benchmark and device in (None, row["arguments"].get("device")):
            named = {name: value for name, value in row["arguments"].items() if name not in HOW_OFTEN}
            key = json.dumps([row.get("op"), row.get("case"), named, row.get("contestant")], sort_keys=True)
            kept.pop(key, None)
            kept[key] = row
    return list(kept.values())


def markdown(titles: Sequence[str], cells: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table whose first column is text and whose others are numbers."""
    yield f"| {' | '.join(titles)} |"
    yield "|---" + "|---:" * (len(titles) - 1) + "|"
    yield from (f"| {' | '.join(line)} |" for line in cells)


def where(row: Row) -> str:
    """The machine and the versions that a row was measured with."""
    facts, device = row["conditions"], row["arguments"].get("device", "cpu")
    versions = facts["versions"]
    machine = f"{facts['cpu']}, {facts['threads']} threads, load {facts['load']}"
    if device == "cuda":
        machine = f"{facts['gpus'][0]['name']}, driver {versions['driver']}, CUDA {versions['cuda']}"
    dirty = ", files changed since" if facts["dirty"] else ""
    return f"{machine}; torch {versions['torch']}; commit {str(facts['commit'])[:10]}{dirty}; {row['time'][:10]}"


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """Rows of the step by model, dtype and batch."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        given = row["arguments"]
        groups.setdefault((given["model"], given["dtype"], given["batch"]), []).append(row)
    return groups


def step_tables(rows: Iterable[Row], device: str) -> Iterator[str]:
    """A table a model, dtype and batch: SimMIM by everyone."""
    same = [row for row in latest(rows, "step", device) if row["same_method"]]
    if not same:
        yield from (ABSENT, "")
    for (model, dtype, batch), group in grouped(same).items():
        ours = [name for name in FAST if any(name in row["times_faster_than"] for row in group)]
        titles = ("contestant", "images/s", "p20 to p80", *(f"`{name}` is faster" for name in ours))
        titles = (*titles, "peak GiB", "MFU", "of the memory's limit")
        yield from (f"**{model}**, {dtype}, batch {batch}. {where(group[-1])}.", "")
        yield from markdown(titles, (_step_cells(row, ours) for row in group))
        yield ""


def _step_cells(row: Row, ours: Sequence[str]) -> Iterator[str]:
    rate = row["images_per_second"]
    yield from (f"`{row['contestant']}`", f"{rate['median']:,.1f}", f"{rate['p20']:,.1f} to {rate['p80']:,.1f}")
    for name in ours:
        yield f"{1 / row['times_faster_than'][name]:.2f}×" if name in row["times_faster_than"] else "-"
    yield "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
    yield from (_percent(row[name]) for name in ("mfu", "memory_share"))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def other_methods(rows: Iterable[Row], device: str) -> Iterator[str]:
    """What an epoch of each method costs beside that of SimMIM by the fastest of ours."""
    groups = grouped(row for row in latest(rows, "step", device))
    lines = [cells for key, group in groups.items() for cells in _method_cells(key, group)]
    if not lines:
        yield from (ABSENT, "")
        return
    hours = ("ImageNet-1K epoch, hours",) if device == "cuda" else ()
    titles = ("method", "dtype, batch", "images/s", *hours, "an epoch costs, SimMIM = 1")
    yield from markdown(titles, ([line[0], *line[1:3], *(line[3:4] if hours else ()), line[4]] for line in lines))
    yield ""


def _method_cells(key: tuple[str, str, int], group: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    ours = [row for row in group if row["contestant"] in FAST]
    others = [row for row in group if not row["same_method"]]
    if not ours or not others:
        return
    best = max(ours, key=lambda row: row["images_per_second"]["median"])
    for row in (best, *others):
        if row is not best and best["contestant"] not in row["times_faster_than"]:
            continue
        rate = row["images_per_second"]["median"]
        cost = 1.0 if row is best else 1 / row["times_faster_than"][best["contestant"]]
        name = f"SimMIM, {key[0]}, `{row['contestant']}`" if row is best else f"`{row['contestant']}` beside {key[0]}"
        yield name, f"{key[1]}, {key[2]}", f"{rate:,.1f}", f"{IMAGENET / rate / 3600:.2f}", f"{cost:.2f}"


def first_screen(rows: Iterable[Row], device: str) -> Iterator[str]:
    """A line a model, dtype and batch: images/s of the fastest of ours, and how many times faster it is than others."""
    same = [row for row in latest(rows, "step", device) if row["same_method"]]
    lines, seen = [], {row["contestant"] for row in same}
    opponents = [name for name in OPPONENTS if name in seen]
    for (model, dtype, batch), group in grouped(same).items():
        ours = [row for row in group if row["contestant"] in FAST]
        if ours:
            best = max(ours, key=lambda row: row["images_per_second"]["median"])
            ratios = (best["times_faster_than"].get(name) for name in opponents)
            cells = ("-" if ratio is None else f"{ratio:.2f}×" for ratio in ratios)
            rate = f"{best['images_per_second']['median']:,.1f}"
            lines.append((f"{model}, {dtype}, batch {batch}", f"`{best['contestant']}`", rate, *cells))
    if not lines:
        yield from (ABSENT, "")
        return
    titles = ("step", "ours", "images/s", *(f"than `{name}`" for name in opponents))
    yield from markdown(titles, lines)
    yield from ("", f"{where(same[-1])}.", "")


def parity_table(rows: Iterable[Row], device: str) -> Iterator[str]:
    """The gaps between the loss curves."""
    lines = []
    for row in latest(rows, "parity", device):
        given = row["arguments"]
        what = f"{given['model']}, {given['dtype']}, batch {given['batch']}, {given['steps']} steps"
        for run, gap in row["gaps"].items():
            numbers = (f"{gap[name]:.1e}" for name in ("median", "end"))
            lines.append((f"{what}: `{run}`", f"{gap['largest']:.1e}", str(gap["step"]), *numbers))
    if not lines:
        yield from (ABSENT, "")
        return
    yield from markdown(("run", "largest gap", "at step", "median gap", "gap at the end"), lines)
    yield ""


def loader_table(rows: Sequence[Row]) -> Iterator[str]:
    """Images/s of the input pipeline and, where a step was measured on a GPU, how much of one it feeds."""
    loaded = latest(rows, "loader")
    if not loaded:
        yield from (ABSENT, "")
        return
    steps = [row for row in latest(rows, "step", "cuda") if row["contestant"] in FAST]
    fed = max(steps, key=lambda row: row["time"], default=None)
    titles = ("source", "decoder", "workers", "images/s", "least to most")
    if fed is not None:
        titles = (*titles, f"steps/s that it feeds (`{fed['contestant']}`, {fed['arguments']['model']})", "of a GPU")
    yield from markdown(titles, (_loader_cells(row, fed) for row in loaded))
    yield from ("", f"{where(loaded[-1])}.", "")


def _loader_cells(row: Row, fed: Row | None) -> Iterator[str]:
    given, rate = row["arguments"], row["images_per_second"]
    yield from (given["source"], given["decoder"], str(given["workers"]), f"{rate['median']:,.1f}")
    yield f"{rate['least']:,.1f} to {rate['most']:,.1f}"
    if fed is not None:
        yield f"{rate['median'] / fed['arguments']['batch']:.2f}"
        yield f"{rate['median'] / fed['images_per_second']['median']:.2f}"


def mean_loss(curve: Sequence[float], step: int, window: int) -> float:
    """The mean of the `window` losses up to a step, counted from 0."""
    return statistics.fmean(curve[max(0, step + 1 - window) : step + 1])
