"""What is asked is held against made-up rows: met, missed, or not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import aims
from tests.benchmarks.made_rows import at, op_row, row, step_row


def lines(made: Sequence[dict[str, Any]], *words: str) -> list[str]:
    """The lines of the table that hold all of the words."""
    return [line for line in aims.aims_table(made) if all(word in line for word in words)]


def traffic(backend: str, batch: int, megabytes: float, saved: float, recompute: str | None = None) -> dict[str, Any]:
    given = {"model": "vit_base_224", "backend": backend, "batch": batch, "dtype": "bf16", "drop_path_rate": None}
    counts = {"bytes": megabytes * 16e6, "calls": 451, "saved_bytes": saved}
    return row("traffic", "cpu", arguments={**given, "recompute": recompute}, **counts)


def test_ops() -> None:
    def op(faster: dict[str, float], rounds: int) -> dict[str, Any]:
        given = {"dtype": "fp32", "rounds": rounds}
        facts = {"op": "masked_l1_loss", "arguments": given, "times_faster_than": faster}
        return op_row("native", 100.0, "cpu", "vit_base_224", **facts)

    made = [op({"eager": 4.0, "compiled": 1.0}, 3), op({"eager": 4.0, "compiled": 3.0}, 4)]
    assert lines(made, "masked_l1_loss, vit_base_224, fp32") == [
        "| masked_l1_loss, vit_base_224, fp32, on a processor (avx), 2 threads | ≥ 3× | 3× | met | c0ffeec0ff |"
    ]
    assert lines([], "masked_l1_loss, vit_base_224, fp32") == [
        "| masked_l1_loss, vit_base_224, fp32, on a CPU | ≥ 3× | - | not measured | - |"
    ]


def test_traffic_and_memory() -> None:
    made = [traffic("auto", 16, 620.0, 1.0, "pointwise"), traffic("auto", 16, 1.0, 1.0, "none")]
    made += [traffic("auto", 8, 1.0, 59.0, "pointwise"), traffic("auto", 8, 1.0, 41.0, "mlp")]
    made += [traffic("reference", 8, 1.0, 100.0)]
    saved = 'saved for backward by vit_base_224, recompute="{}", bf16, batch 8, of the reference\'s'
    assert lines(made, "vit_base_224", "≤") == [
        "| traffic of vit_base_224 per image, bf16, batch 16 | ≤ 620 MB | 620 MB | met | c0ffeec0ff |",
        "| calls of vit_base_224, bf16, batch 16 | ≤ 450 | 451 | missed | c0ffeec0ff |",
        f"| {saved.format('pointwise')} | ≤ 0.6× | 0.59× | met | c0ffeec0ff |",
        f"| {saved.format('mlp')} | ≤ 0.4× | 0.41× | missed | c0ffeec0ff |",
    ]
    assert all(line.endswith("| - | not measured | - |") for line in lines(made, "swin_base_192", "≤"))


def test_steps_and_what_their_ratios_take() -> None:
    fast, reference = (step_row("cpu", name, 1.0, {}, dtype="fp32") for name in ("fast", "reference"))
    fast |= {"times_faster_than": {"reference": 1.29}, "mfu": 0.6}
    later = {**fast, "times_faster_than": {"hf_sdpa": 9.0}}
    other = at({**fast, "times_faster_than": {"reference": 1.31}}, cpu="another")
    made = [fast, {**reference, "mfu": 0.5}, later, other, at(reference, cpu="another")]
    step = "| step of swin_base_192, fp32, batch 8, on"
    assert lines(made, "step of swin_base_192, fp32") == [
        f"{step} a processor (avx), 2 threads | ≥ 1.3× | 1.29× | missed | c0ffeec0ff |",
        f"{step} another (avx), 2 threads | ≥ 1.3× | 1.31× | met | c0ffeec0ff |",
    ]
    assert lines(made, "a processor", "`reference`") == [
        "| swin_base_192, fp32, batch 8, on a processor (avx), 2 threads | `reference` | 50% | 1.3× | 65% | 60% |"
    ]
    assert lines(made, "step of swin_base_192, bf16, batch 8") == [
        "| step of swin_base_192, bf16, batch 8, on a CPU | ≥ 1.5× | - | not measured | - |"
    ]


def test_steps_on_a_gpu_count_at_the_best_batch() -> None:
    figure = "| step of swin_base_192, bf16, best batch, on a GPU"
    assert lines([], "swin_base_192", "on a GPU") == [
        f"{figure}, than `reference` | ≥ 2.5× | - | not measured | - |",
        f"{figure}, than `compiled` | ≥ 1.4× | - | not measured | - |",
        f"{figure}: MFU | ≥ 30% | - | not measured | - |",
    ]
    made = [
        step_row("cuda", "fast", 900.0, {"reference": 9.0, "compiled": 9.0}, batch=64),
        step_row("cuda", "fast_graph", 999.0, {"reference": 2.4}, batch=128),
        step_row("cuda", "reference", 400.0, {"fast_graph": 0.4}, batch=128),
    ]
    figure = "| step of swin_base_192, bf16, batch 128, `fast_graph`, on a GPU"
    assert lines(made, "swin_base_192", "on a GPU") == [
        f"{figure}, than `reference` | ≥ 2.5× | 2.4× | missed | c0ffeec0ff |",
        f"{figure}, than `compiled` | ≥ 1.4× | - | not measured | - |",
        f"{figure}: MFU | ≥ 30% | 25% | missed | c0ffeec0ff |",
        "| swin_base_192, bf16, batch 128, on a GPU | `reference` | 25% | 2.5× | 62% | 25% |",
    ]
