"""Where the time of a training step goes, by kind of operator: what a ratio that was missed is explained by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import synchronize
from benchmarks.tables import ABSENT, Row, by_machine, grouped, latest, markdown, where

# In the order of the table, each by parts of operators' names; the first that fits. An operator's time is its own,
# without that of operators that it calls. Our head and embedding have products inside.
KINDS = {
    "copies": ("copy", "cat", "roll", "clone", "index", "slice", "select", "fill", "zero"),
    "head, embedding": ("linear_masked_loss", "masked_patch_embed"),
    "attention": ("attention", "softmax"),
    "products": ("mm", "linear", "convolution"),
    "norms": ("norm_forward", "layer_norm"),
    "GELU": ("gelu",),
    "optimizer": ("adam", "foreach", "Optimizer", "clip_grad", "_norm"),
}
OTHER = "other"


def kind(operator: str) -> str:
    """The kind of an operator, by its name in the profiler, such as "aten::addmm"."""
    name = operator.rpartition("::")[2]
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def shares(step: Callable[[], Any], device: str) -> dict[str, float] | None:
    """The share of each kind in the time of a step's operators; on CUDA, of the kernels that they launch.

    Args:
        step: Makes one step.
        device: "cpu" or "cuda".

    Returns:
        Shares by kind, 1 together; None where no operator had time, as in a replayed CUDA graph.
    """
    cuda = device == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        step()
        synchronize(device)
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        if event.device_type == DeviceType.CPU:  # kernels stand for themselves once more
            spent[kind(event.key)] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = spent.total()
    return {name: spent[name] / total for name in (*KINDS, OTHER)} if total else None


def profile_table(rows: Sequence[Row], device: str) -> Iterator[str]:
    """A line a model, dtype, batch and contestant that was profiled; a table a machine."""
    measured = by_machine(latest(rows, "profile", device))
    if not measured:
        yield from (ABSENT, "")
    for group in measured.values():
        lines = [
            (f"{model}, {dtype}, batch {batch}", f"`{row['contestant']}`", *_percentages(row["shares"]))
            for (model, dtype, batch, _), race in grouped(group).items()
            for row in race
        ]
        yield from markdown(("step", "who", *KINDS, OTHER), lines, texts=2)
        yield from ("", f"{where(group)}.", "")


def _percentages(found: dict[str, float]) -> Iterator[str]:
    yield from (f"{found[name]:.1%}" for name in (*KINDS, OTHER))
