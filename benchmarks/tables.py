"""Tables in Markdown, made of rows alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.models import MODELS
from benchmarks.trainees import CONTESTANTS, FAST

Row = Mapping[str, Any]
ABSENT = "Not measured yet."
# Arguments that make no other measurement.
HOW_OFTEN = ("contestants", "pairs", "rounds", "runs", "official", "case", "host", "profile", "tests")
IMAGENET = 1_281_167  # training images of ImageNet-1K
_ORDER = {name: place for place, name in enumerate(CONTESTANTS)}
_GPU_VERSIONS = (("driver", "driver"), ("CUDA", "cuda"))
# Whom the README's one table names, ours aside.
OPPONENTS = ("reference", "compiled", "max_autotune", "sdpa", "sdpa_compiled", "flex", "hf_sdpa", "hf_compiled", "timm")


def machine(row: Row) -> str:
    """What a row was measured on: the GPU, or the processor, its instructions and how many threads of it."""
    facts = row["conditions"]
    if row["arguments"].get("device") == "cuda":
        return facts["gpus"][0]["name"]
    return f"{facts['cpu']} ({facts['simd']}), {facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"


def latest(rows: Iterable[Row], benchmark: str, device: str | None = None) -> list[dict[str, Any]]:
    """The last row of each machine, case, set of arguments and contestant, whether or not its files were committed.

    Whom a contestant was raced against, and how often, makes no other measurement of it: its "times_faster_than" has
    each opponent's last ratio, one of the same commit before any other. Rows that say why something is absent are none.

    Args:
        rows: In the order in which they were written.
        benchmark: Whose rows.
        device: "cpu" or "cuda", or None for both.

    Returns:
        The rows; "sources" of one are those whose figures it has.
    """
    same: dict[str, list[Row]] = {}
    for row in rows:
        if row["benchmark"] == benchmark and device in (None, row["arguments"].get("device")) and "absent" not in row:
            same[_key(row)] = [*same.pop(_key(row), ()), row]
    return [_merged(group) for group in same.values()]


def absent(rows: Iterable[Row], benchmark: str, device: str | None = None) -> Iterator[str]:
    """A line for each of whom rows say why it was not measured, and no row says what it reached."""
    rows = [row for row in rows if row["benchmark"] == benchmark and device in (None, row["arguments"].get("device"))]
    reached = {_key(row) for row in rows if "absent" not in row}
    reasons = {_key(row): row for row in rows if "absent" in row}
    for key, row in reasons.items():
        if key not in reached:
            given = row["arguments"]
            batch = f"batch {given['batch']}" if "batch" in given else None
            named = (given.get("model"), row.get("op"), row.get("case"), given.get("dtype"), batch)
            what = ", ".join(str(part) for part in named if part is not None)
            yield f"* `{row.get('contestant')}`, {what}, on {machine(row)}: {row['absent']}"


def _key(row: Row) -> str:
    # None is what an argument was before there was a choice: rows from then lack it.
    named = {name: value for name, value in row["arguments"].items() if name not in HOW_OFTEN and value is not None}
    return json.dumps([machine(row), row.get("op"), row.get("case"), named, row.get("contestant")], sort_keys=True)


def _merged(group: Sequence[Row]) -> dict[str, Any]:
    """The last row of a group with the ratios of all of them."""
    row = group[-1]
    commit = row["conditions"]["commit"]
    ordered = sorted(group, key=lambda other: other["conditions"]["commit"] == commit)
    ratios = {name: (ratio, other) for other in ordered for name, ratio in other.get("times_faster_than", {}).items()}
    sources = [row, *(other for _, other in ratios.values() if other is not row)]
    merged = {**row, "sources": sources}
    if "times_faster_than" in row:
        merged["times_faster_than"] = {name: ratio for name, (ratio, _) in ratios.items()}
    return merged


def markdown(titles: Sequence[str], cells: Iterable[Iterable[str]], texts: int = 1) -> Iterator[str]:
    """A table whose first columns are `texts` of text and whose others are numbers."""
    yield f"| {' | '.join(titles)} |"
    yield "|---" * texts + "|---:" * (len(titles) - texts) + "|"
    yield from (f"| {' | '.join(line)} |" for line in cells)


def where(rows: Iterable[Row]) -> str:
    """The machine, the versions and the commits that rows were measured with; the rows are of one machine."""
    sources = [source for row in rows for source in _sources(row)]
    facts = [source["conditions"] for source in sources]
    parts = [machine(sources[0])]
    if sources[0]["arguments"].get("device") == "cuda":
        parts += [f"{name} {_listed(one['versions'][key] for one in facts)}" for name, key in _GPU_VERSIONS]
    else:
        least, most = (choose(one["load"] for one in facts) for choose in (min, max))
        parts.append(f"load {least}" if least == most else f"load {least} to {most}")
    dates = _listed(sorted(source["time"][:10] for source in sources))
    versions = f"torch {_listed(one['versions']['torch'] for one in facts)}"
    return f"{', '.join(parts)}; {versions}; commit {_listed(map(_commit, sources))}; {dates}"


def commits(row: Row) -> str:
    """The commits that the figures of a row were measured at, and whether files differed from them."""
    return _listed(map(_commit, _sources(row)))


def _sources(row: Row) -> Sequence[Row]:
    return row.get("sources", (row,))


def _commit(row: Row) -> str:
    facts = row["conditions"]
    return str(facts["commit"])[:10] + (", files changed since" if facts["dirty"] else "")


def _listed(values: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(map(str, values)))


def by_machine(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by what they were measured on."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(machine(row), []).append(row)
    return groups


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, int, str], list[Row]]:
    """Rows of the step by model, dtype, batch and machine, contestants in their order."""
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: _ORDER.get(row["contestant"], len(_ORDER))):
        given = row["arguments"]
        groups.setdefault((given["model"], given["dtype"], given["batch"], machine(row)), []).append(row)
    return groups


def step_tables(rows: Sequence[Row], device: str) -> Iterator[str]:
    """A table a model, dtype, batch and machine: SimMIM by everyone."""
    same = [row for row in latest(rows, "step", device) if row["same_method"]]
    if not same:
        yield from (ABSENT, "")
    elif device == "cpu":
        yield from ("Peak memory is measured on CUDA alone.", "")
    for (model, dtype, batch, _), group in grouped(same).items():
        ours = [name for name in FAST if any(name in row["times_faster_than"] for row in group)]
        titles = ("contestant", "images/s", "p20 to p80", *(f"`{name}` is faster" for name in ours))
        titles = (*titles, "peak GiB", "MFU", "of the memory's limit")
        yield from (f"**{model}**, {dtype}, batch {batch}. {where(group)}.", "")
        yield from markdown(titles, (_step_cells(row, ours) for row in group))
        yield ""
    if missing := list(absent(rows, "step", device)):
        yield from ("Not measured:", "", *missing, "")


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
    """What an epoch of each method costs beside that of SimMIM by the fastest of ours; a table a machine."""
    measured = by_machine(latest(rows, "step", device))
    tables = {name: [*_method_lines(group)] for name, group in measured.items()}
    if not any(tables.values()):
        yield from (ABSENT, "")
        return
    hours = ("ImageNet-1K epoch, hours",) if device == "cuda" else ()
    titles = ("method", "dtype, batch", "images/s", *hours, "an epoch costs, SimMIM = 1")
    for lines in filter(None, tables.values()):
        cells = [cells for cells, _ in lines]
        yield from markdown(titles, ([line[0], *line[1:3], *(line[3:4] if hours else ()), line[4]] for line in cells))
        yield from ("", f"{where(row for _, row in lines)}.", "")


def _method_lines(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, ...], Row]]:
    for (model, dtype, batch, _), group in grouped(rows).items():
        yield from _methods_beside(model, f"{dtype}, {batch}", group)


def _methods_beside(model: str, how: str, group: Sequence[Row]) -> Iterator[tuple[tuple[str, ...], Row]]:
    """Cells of the fastest of ours and of every other method that it was raced against, and their rows."""
    ours = [row for row in group if row["contestant"] in FAST]
    others = [row for row in group if not row["same_method"]]
    if not ours or not others:
        return
    best = fastest(ours)
    for row in (best, *others):
        if row is not best and best["contestant"] not in row["times_faster_than"]:
            continue
        rate = row["images_per_second"]["median"]
        cost = 1.0 if row is best else 1 / row["times_faster_than"][best["contestant"]]
        name = f"SimMIM, {model}, `{row['contestant']}`" if row is best else f"`{row['contestant']}` beside {model}"
        yield (name, how, f"{rate:,.1f}", f"{IMAGENET / rate / 3600:.2f}", f"{cost:.2f}"), row


def fastest(rows: Iterable[Row]) -> Row:
    """The row of most images/s."""
    return max(rows, key=lambda row: row["images_per_second"]["median"])


def first_screen(rows: Iterable[Row], device: str) -> Iterator[str]:
    """A line a model, dtype and batch: images/s of the fastest of ours, and how many times faster it is than others.

    A table a machine, of the same rows as `step_tables`; what was measured with changed files says so.
    """
    same = [row for row in latest(rows, "step", device) if row["same_method"]]
    tables: dict[str, list[Row]] = {}
    for key, group in grouped(same).items():
        if ours := [row for row in group if row["contestant"] in FAST]:
            tables.setdefault(key[-1], []).append(fastest(ours))
    if not tables:
        yield from (ABSENT, "")
        return
    for shown in tables.values():
        opponents = [name for name in OPPONENTS if any(name in row["times_faster_than"] for row in shown)]
        titles = ("step", "ours", "images/s", *(f"than `{name}`" for name in opponents), "commit")
        yield from markdown(titles, (_first_cells(row, opponents) for row in shown))
        yield from ("", f"{where(shown)}.", "")


def _first_cells(row: Row, opponents: Sequence[str]) -> Iterator[str]:
    given = row["arguments"]
    yield f"{given['model']}, {given['dtype']}, batch {given['batch']}"
    yield from (f"`{row['contestant']}`", f"{row['images_per_second']['median']:,.1f}")
    ratios = (row["times_faster_than"].get(name) for name in opponents)
    yield from ("-" if ratio is None else f"{ratio:.2f}×" for ratio in ratios)
    yield commits(row)


def parity_table(rows: Iterable[Row], device: str) -> Iterator[str]:
    """The gaps between the loss curves; a table a machine."""
    compared = by_machine(latest(rows, "parity", device))
    if not compared:
        yield from (ABSENT, "")
    for group in compared.values():
        lines = (cells for row in group for cells in _parity_cells(row))
        yield from markdown(("run", "largest gap", "at step", "median gap", "gap at the end"), lines)
        yield from ("", f"{where(group)}.", "")


def _parity_cells(row: Row) -> Iterator[tuple[str, ...]]:
    given = row["arguments"]
    what = f"{given['model']}, {given['dtype']}, batch {given['batch']}, {given['steps']} steps"
    for run, gap in row["gaps"].items():
        numbers = (f"{gap[name]:.1e}" for name in ("median", "end"))
        yield f"{what}: `{run}`", f"{gap['largest']:.1e}", str(gap["step"]), *numbers


def loader_table(rows: Sequence[Row]) -> Iterator[str]:
    """Images/s of the input pipeline and, where a step was measured on a GPU, how much of one it feeds.

    The step is the fastest of ours at the loader's image size: the hardest to feed. A table a machine.
    """
    loaded = latest(rows, "loader")
    if not loaded:
        yield from (ABSENT, "")
        return
    steps = [row for row in latest(rows, "step", "cuda") if row["contestant"] in FAST]
    fed = {size: group for size in _sizes(loaded) if (group := [row for row in steps if _size(row) == size])}
    fed = {size: fastest(group) for size, group in fed.items()}
    titles = ("source", "decoder", "workers", "images/s", "least to most")
    if fed:
        titles = (*titles, "steps/s that it feeds", "of a GPU")
    for group in by_machine(loaded).values():
        yield from markdown(titles, (_loader_cells(row, fed) for row in group))
        yield from ("", f"{where(group)}.", "")
    for size, row in fed.items():
        given = row["arguments"]
        what = f"`{row['contestant']}`, {given['model']}, {given['dtype']}, batch {given['batch']}"
        yield from (f"Images of {size} pixels feed {what}, on {where([row])}.", "")


def _sizes(loaded: Iterable[Row]) -> list[int]:
    """Sides of the images that were loaded, in pixels."""
    return sorted({row["arguments"]["img_size"] for row in loaded})


def _size(row: Row) -> int:
    """Side of a step's images in pixels."""
    return MODELS[row["arguments"]["model"]]["img_size"]


def _loader_cells(row: Row, fed: Mapping[int, Row]) -> Iterator[str]:
    given, rate = row["arguments"], row["images_per_second"]
    yield from (given.get("data") or given["source"], given["decoder"], str(given["workers"]), f"{rate['median']:,.1f}")
    yield f"{rate['least']:,.1f} to {rate['most']:,.1f}"
    if step := fed.get(given["img_size"]):
        yield f"{rate['median'] / step['arguments']['batch']:.2f}"
        yield f"{rate['median'] / step['images_per_second']['median']:.2f}"
    elif fed:
        yield from ("-", "-")


def mean_loss(curve: Sequence[float], step: int, window: int) -> float:
    """The mean of the `window` losses up to a step, counted from 0."""
    return statistics.fmean(curve[max(0, step + 1 - window) : step + 1])
