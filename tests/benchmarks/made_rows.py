"""Rows as the runners write them, of measurements that nobody made."""

from __future__ import annotations

from typing import Any

CONDITIONS = {
    "cpu": "a processor",
    "simd": "avx",
    "gpus": [{"name": "a GPU", "capability": "9.0", "memory_gib": 80}],
    "versions": {"torch": "2.14.1", "driver": "1.0", "cuda": "13.0"},
    "threads": 2,
    "load": 0.5,
    "commit": "c0ffee" * 6,
    "dirty": False,
}


def row(benchmark: str, device: str, contestant: str | None = None, **facts: Any) -> dict[str, Any]:
    arguments = {"device": device, **facts.pop("arguments", {})}
    named = {} if contestant is None else {"contestant": contestant}
    whole = {"benchmark": benchmark, "arguments": arguments, **named, "time": "2026-01-02T03:04:05+00:00"}
    return {**whole, "conditions": CONDITIONS, **facts}


def at(made: dict[str, Any], **conditions: Any) -> dict[str, Any]:
    """The row as if measured under other conditions."""
    return {**made, "conditions": {**made["conditions"], **conditions}}


def step_row(
    device: str, contestant: str, rate: float, faster: dict[str, float], same: bool = True, **arguments: Any
) -> dict[str, Any]:
    given = {"model": "swin_base_192", "dtype": "bf16", "batch": 8, "contestants": ["x"], "pairs": 3, **arguments}
    return row(
        *("step", device, contestant),
        arguments=given,
        same_method=same,
        images_per_second={"median": rate, "p20": rate - 1, "p80": rate + 2},
        times_faster_than=faster,
        peak_bytes=2**31 if device == "cuda" else None,
        mfu=0.25 if same else None,
        memory_share=0.5 if same else None,
    )


def op_row(contestant: str, us: float, device: str = "cuda", case: str = "swin", **facts: Any) -> dict[str, Any]:
    limits = {"matrix_flops_per_second": 4e11, "bytes_per_second": 2e10}
    rates = {"gb_per_s": 100 / us, "gflop_per_s": 1000 / us, "limits": limits, "limit_share": 0.2}
    named = {"op": "bias_gelu", "case": case, "arguments": {"dtype": "bf16"}, "times_faster_than": {}}
    return row("op", device, contestant, us=us, **{**named, **rates, **facts})


def loader_row() -> dict[str, Any]:
    given = {"source": "full", "decoder": "pillow", "workers": 2, "img_size": 192}
    rate = {"median": 50.0, "least": 40.0, "most": 60.0}
    return {**row("loader", "cpu"), "arguments": given, "images_per_second": rate}


def parity_row(device: str) -> dict[str, Any]:
    curves = {"reference": [1.0, 0.5], "fast": [1.0, 0.6], "reordered": [1.0, 0.55]}
    gap = {"largest": 0.2, "step": 2, "median": 0.1, "end": 0.06}
    given = {"model": "swin_base_192", "dtype": "bf16", "batch": 8, "steps": 2, "lr": 1e-3}
    return row("parity", device, arguments=given, losses=curves, gaps={"fast": gap, "reordered": gap})


def rows(device: str) -> list[dict[str, Any]]:
    return [
        step_row(device, "reference", 100.0, {"fast": 0.5}),
        step_row(device, "fast", 200.0, {"reference": 2.0, "supervised": 1.25}),
        step_row(device, "supervised", 160.0, {"fast": 0.8}, same=False),
        parity_row(device),
        *(op_row(name, us, device) for name, us in (("native", 10.0), ("triton", 20.0))),
        loader_row(),
    ]
