"""`loss.png`: loss and learning rate over the updates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simmim_fast.report.figures import INK, MUTED, new_figure, save_figure

LOSS_COLOUR = "#1f5fa8"
RATE_COLOUR = "#d08030"


def plot_loss(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "") -> Path:
    """Draws the loss above and the learning rate below.

    Args:
        rows: Lines of metrics.jsonl, with `step`, `loss` and `lr`.
        path: The PNG file; its folder exists.
        title: First line of the picture.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one line of metrics.jsonl, got none")
    steps = [row["step"] for row in rows]
    figure = new_figure(7.0, 4.4)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    loss.plot(steps, [row["loss"] for row in rows], color=LOSS_COLOUR, linewidth=1.6)
    loss.set_ylabel("loss (masked L1, normalised pixels)", color=INK)
    rate.plot(steps, [row["lr"] for row in rows], color=RATE_COLOUR, linewidth=1.6)
    rate.set_ylabel("learning rate", color=INK)
    rate.set_xlabel("update", color=INK)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0))
    for axes in (loss, rate):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
    last = rows[-1]["loss"]
    loss.annotate(
        f"{last:.3f}", (steps[-1], last), (4, 0), textcoords="offset points", va="center", fontsize=9, color=LOSS_COLOUR
    )
    figure.suptitle(title, fontsize=11, color=INK)
    figure.align_ylabels()
    return save_figure(figure, path)
