"""What this library asks of itself, and what the latest rows reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.tables import Row, latest, markdown

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
# Forward and backward in bf16: megabytes per image and calls at batch 16.
TRAFFIC = {"swin_base_192": (650, 800), "vit_base_224": (620, 450)}
SAVED_SHARE = 0.6  # of what the reference saves for the backward, batch 8


def aims_table(rows: Sequence[Row]) -> Iterator[str]:
    """A line a figure: asked, reached, and whether that is enough. Without rows a figure has no line."""
    lines = [*_step_lines(rows), *_traffic_lines(rows), *_op_lines(rows)]
    if not lines:
        yield from ("Not measured yet.", "")
        return
    yield from markdown(("figure", "asked", "reached", ""), lines)
    yield ""


def _at_least(what: str, asked: float, reached: float) -> tuple[str, ...]:
    return what, f"≥ {asked:g}×", f"{reached:.2f}×", "met" if reached >= asked else "missed"


def _at_most(what: str, asked: float, reached: float, unit: str) -> tuple[str, ...]:
    return what, f"≤ {asked:g}{unit}", f"{reached:,.4g}{unit}", "met" if reached <= asked else "missed"


def _step_lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in latest(rows, "step", "cpu"):
        given, ratio = row["arguments"], row["times_faster_than"].get("reference")
        asked = STEPS.get(given["model"], {}).get(given["dtype"])
        if row["contestant"] == "fast" and given["batch"] == 8 and None not in (asked, ratio):
            yield _at_least(f"step of {given['model']} on the CPU, {given['dtype']}, batch 8", asked, ratio)


def _traffic_lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    counted = {}
    for row in latest(rows, "traffic"):
        given: dict[str, Any] = row["arguments"]
        if given["drop_path_rate"] is None and given["dtype"] == "bf16":
            counted[given["model"], given["backend"], given["batch"]] = row
    for model, (megabytes, calls) in TRAFFIC.items():
        if row := counted.get((model, "auto", 16)):
            yield _at_most(f"traffic of {model} per image, bf16, batch 16", megabytes, row["bytes"] / 16e6, " MB")
            yield _at_most(f"calls of {model}, bf16", calls, row["calls"], "")
        ours, reference = (counted.get((model, backend, 8)) for backend in ("auto", "reference"))
        if ours and reference:
            share = ours["saved_bytes"] / reference["saved_bytes"]
            yield _at_most(f"saved for backward by {model}, bf16, batch 8, of the reference's", SAVED_SHARE, share, "×")


def _op_lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for row in latest(rows, "op", "cpu"):
        dtype, ratios = row["arguments"]["dtype"], row["times_faster_than"]
        asked = OPS.get(row["op"], {}).get(dtype)
        if row["contestant"] == "native" and asked is not None and {"eager", "compiled"} <= ratios.keys():
            reached = min(ratios["eager"], ratios["compiled"])
            yield _at_least(f"{row['op']}, {row['case']}, {dtype}, on the CPU", asked, reached)
