"""Pictures of rows, as SVG that comes out the same byte for byte. matplotlib is imported where it draws."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from benchmarks.tables import Row, grouped, latest, machine, mean_loss
from benchmarks.trainees import FAST
from simmim_fast.report.figures import INK, MUTED, new_figure

OURS, THEIRS = "#1f5fa8", "#b9bec6"
RUN_COLOURS = {"fast": OURS, "reference": INK, "reordered": "#d08030", "precise": "#5a9e5a"}
MARKERS = {"native": "o", "triton": "s", "eager": "x", "compiled": "+"}
SMOOTHED = 10  # steps


def svg(figure: Any) -> str:
    """The figure without a date, a version or a random name."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "simmim_fast", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def step_plot(rows: Sequence[Row], device: str) -> str | None:
    """Images/s of everyone and, on a GPU, the peak of the memory; panels a model, dtype, batch and machine."""
    groups = grouped(row for row in latest(rows, "step", device) if row["same_method"])
    if not groups:
        return None
    panels = 2 if device == "cuda" else 1
    heights = [len(group) + 2 for group in groups.values()]
    figure = new_figure(4.6 * panels + 1.2, 0.26 * sum(heights))
    axes = figure.subplots(len(groups), panels, squeeze=False, height_ratios=heights)
    for line, ((model, dtype, batch, place), group) in zip(axes, groups.items(), strict=True):
        rates = [row["images_per_second"] for row in group]
        values = [rate["median"] for rate in rates]
        spread = [[rate["median"] - rate["p20"] for rate in rates], [rate["p80"] - rate["median"] for rate in rates]]
        _bars(line[0], group, values, f"{model}, {dtype}, batch {batch}: images/s\n{place}", spread)
        if panels == 2:
            _bars(line[1], group, [row["peak_bytes"] / 2**30 for row in group], "peak memory, GiB\n")
    return svg(figure)


def _bars(axes: Any, group: Sequence[Row], values: Sequence[float], title: str, spread: Any = None) -> None:
    names = [row["contestant"] for row in group]
    places = range(len(names), 0, -1)
    colours = [OURS if name in FAST else THEIRS for name in names]
    axes.barh(places, values, color=colours, xerr=spread, height=0.7, error_kw={"ecolor": MUTED, "elinewidth": 1})
    axes.set_yticks(places, names)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    _plain(axes)


def parity_plot(rows: Sequence[Row], device: str) -> str | None:
    """Loss curves above, their distances from the reference's below; a column a comparison."""
    compared = latest(rows, "parity", device)
    if not compared:
        return None
    figure = new_figure(5.4 * len(compared), 5.2)
    axes = figure.subplots(2, len(compared), squeeze=False, sharex="col")
    for (above, below), row in zip(axes.T, compared, strict=True):
        reference = row["losses"]["reference"]
        steps = range(1, len(reference) + 1)
        for run, curve in row["losses"].items():
            smooth = [mean_loss(curve, step, SMOOTHED) for step in range(len(curve))]
            above.plot(steps, smooth, color=RUN_COLOURS[run], label=run, linewidth=1.2, alpha=0.8)
            if run != "reference":
                apart = [abs(a - b) / b for a, b in zip(curve, reference, strict=True)]
                below.plot(steps, apart, color=RUN_COLOURS[run], linewidth=0.8, label=run)
        given = row["arguments"]
        above.set_title(
            f"{given['model']}, {given['dtype']}, batch {given['batch']}; {machine(row)}",
            fontsize=9,
            color=INK,
            loc="left",
        )
        above.set_ylabel(f"loss, mean of {SMOOTHED} steps", color=INK, fontsize=8)
        below.set_ylabel("distance from the reference's loss", color=INK, fontsize=8)
        below.set_xlabel("step", color=INK, fontsize=8)
        below.set_yscale("log")
        for one in (above, below):
            one.legend(fontsize=7, frameon=False)
            _plain(one)
    return svg(figure)


def roofline_plot(rows: Sequence[Row], device: str) -> str | None:
    """GFLOP/s of the ops over the FLOPs that they do a byte, under their ceilings; a panel a dtype and machine."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in latest(rows, "op", device):
        if "limits" in row and row["gflop_per_s"] > 0:
            panels.setdefault((row["arguments"]["dtype"], machine(row)), []).append(row)
    if not panels:
        return None
    figure = new_figure(5.2 * len(panels), 4.0)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for one, ((dtype, place), shown) in zip(axes, sorted(panels.items(), key=lambda panel: panel[0]), strict=True):
        _roof(one, shown)
        for name in dict.fromkeys(row["contestant"] for row in shown):
            own = [row for row in shown if row["contestant"] == name]
            x, y = [row["gflop_per_s"] / row["gb_per_s"] for row in own], [row["gflop_per_s"] for row in own]
            style = {"color": OURS if name in ("native", "triton") else MUTED, "marker": MARKERS.get(name, ".")}
            one.scatter(x, y, s=18, label=name, linewidth=1, **style)
        one.set_title(f"{dtype}, {place}", fontsize=9, color=INK, loc="left")
        one.set_xlabel("FLOP a byte", color=INK, fontsize=8)
        one.set_ylabel("GFLOP/s", color=INK, fontsize=8)
        one.legend(fontsize=7, frameon=False)
        _plain(one)
    return svg(figure)


def _roof(axes: Any, shown: Sequence[Row]) -> None:
    """The ceilings that the last row was measured under."""
    limits = shown[-1]["limits"]
    peak, bandwidth = limits["matrix_flops_per_second"] / 1e9, limits["bytes_per_second"] / 1e9
    intensities = [row["gflop_per_s"] / row["gb_per_s"] for row in shown]
    least, most = min(intensities) / 2, max(*intensities, peak / bandwidth) * 2
    axes.plot([least, peak / bandwidth, most], [least * bandwidth, peak, peak], color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
