"""The tables of what kernels take: rows, page, and that the committed page is what the committed rows give."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cuda_kernels, resources
from benchmarks.cases import CASES
from benchmarks.cost import launches, operator_calls
from benchmarks.occupancy import LIMITS
from benchmarks.resources_page import PAGE, render
from benchmarks.results import read_rows
from simmim_fast._backends import TRITON_INTERPRETED
from simmim_fast.ops.shifted_window_attention.kernels import CONFIGURATIONS

OP = "substitute_mask_tokens"
FACTS = {"registers": 40, "spills": 0, "stack": 0, "shared": 2048, "blocks": 12, "limited_by": "registers"}
FACTS |= {"warps": 4, "occupancy": 0.75}
ROW = {"capability": 90, "op": OP, "case": "a case", "dtype": "bf16", "direction": "forward", "batch": 256}
LAUNCH = {"kernel": "some_kernel", "grid": [7, 2], **FACTS}

compiled = pytest.mark.skipif(cuda_kernels.why_not() is not None, reason=f"not run: {cuda_kernels.why_not()}")


@pytest.mark.skipif(TRITON_INTERPRETED, reason="the interpreter compiles nothing")
def test_every_launch_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    options = ["--op", OP, "--backend", "triton", "--capability", "90", "--dtype", "bf16"]
    resources.main([*options, "--results", str(rows), "--page", str(page)])
    written = read_rows(rows)
    assert [(row["case"], row["direction"]) for row in written] == [
        (case, direction) for case in CASES[OP] for direction in resources.DIRECTIONS
    ]
    launched = [launch for row in written for launch in row["launches"]]
    for launch in launched:
        assert launch["spills"] == launch["stack"] == 0
        assert 0 < launch["registers"] <= 255
        assert 0 < launch["occupancy"] <= 1
        assert launch["blocks"] * launch["warps"] == launch["occupancy"] * 64
    assert page.read_text("utf-8") == render(written)
    assert len(capsys.readouterr().out.splitlines()) == len(launched)


@compiled
def test_every_kernel_of_the_library_is_read(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    resources.main(["--backend", "native", "--results", str(rows), "--page", str(tmp_path / "page.md")])
    kernels = {(row["op"], row["capability"]): row["kernels"] for row in read_rows(rows)}
    ops = {"masked_l1_loss", "shifted_window_attention", "substitute_mask_tokens"}
    assert kernels.keys() == set(product(ops, LIMITS))
    for op in ops:
        first, *others = ([_sizes(kernel) for kernel in kernels[op, capability]] for capability in LIMITS)
        assert all(other == first for other in others)
    for kernel in (kernel for some in kernels.values() for kernel in some):
        assert kernel["spills"] == kernel["stack"] == 0
        assert 0 < kernel["registers"] <= 255
        assert 0 < kernel["blocks"] * kernel["warps"] == kernel["occupancy"] * 64


def _sizes(kernel: dict[str, Any]) -> list[Any]:
    """What the architecture has no part in."""
    return [kernel[name] for name in ("kernel", "arguments", "warps", "static", "dynamic")]


@compiled
def test_shared_memory_of_a_window() -> None:
    """At least its rows of queries, keys and values; in the backward those of the gradient, and the weights."""
    for kernel in cuda_kernels.kernels(90):
        if match := re.fullmatch("shifted_window_attention_(fwd|bwd)_kernel", kernel.name):
            (dtype, warps), backward = kernel.arguments, match[1] == "bwd"
            slots, size = 16 * int(warps), 4 if dtype == "fp32" else 2
            assert kernel.threads == 32 * int(warps)
            assert kernel.dynamic > size * (slots * 32 * (4 if backward else 3) + backward * 2 * slots**2)
        else:
            assert kernel.dynamic == 0


def test_says_why_there_is_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "why_not", lambda: "no library here")
    page = tmp_path / "page.md"
    with pytest.raises(SystemExit, match="cannot be read: no library here; --backend triton leaves them out"):
        resources.main(["--page", str(page)])
    assert not page.exists()


def test_the_latest_row_of_a_case_counts() -> None:
    page = render([{**ROW, "launches": []}, {**ROW, "launches": [LAUNCH]}])
    assert "| some_kernel | bf16 | a case | –, 4, – | –, 40, – |" in page
    assert "some_kernel" not in render([{**ROW, "launches": [LAUNCH]}, {**ROW, "launches": []}])


def test_architectures_are_side_by_side_and_what_is_alike_in_one_line() -> None:
    rows = [
        {**ROW, "capability": capability, "case": case, "launches": [{**LAUNCH, "registers": registers}]}
        for capability, registers in zip(LIMITS, (40, 48, 40), strict=True)
        for case in ("swin stage 1", "swin stage 2", "vit")
    ]
    rows[-1]["launches"][0] |= {"shared": 4096}
    lines = [line for line in render(rows).splitlines() if "some_kernel" in line]
    same = "| 4 | 40, 48, 40 | 0 | 0 | {} | 12 | registers | 75% |"
    assert lines == [
        f"| some_kernel | bf16 | swin stage 1, stage 2 {same.format('2.0')}",
        f"| some_kernel | bf16 | vit {same.format('2.0, 2.0, 4.0')}",
    ]


def test_kernels_of_the_library_follow_the_launches_of_their_op() -> None:
    kernels = [{"kernel": "a_kernel", "arguments": ["bf16", vector], **FACTS} for vector in ("1", "8")]
    rows = [{"capability": capability, "op": OP, "kernels": kernels} for capability in LIMITS]
    page = render([*rows, {**ROW, "launches": [LAUNCH]}])
    assert page.count(f"## {OP}") == 1
    assert page.index("| some_kernel |") < page.index("| a_kernel | bf16 1, bf16 8 | 4 | 40 | 0 | 0 | 2.0 |")


@pytest.mark.skipif(TRITON_INTERPRETED, reason="the interpreter's kernels are not launched")
@pytest.mark.parametrize("capability", LIMITS)
def test_launches_are_those_that_a_gpu_of_the_capability_gets(capability: int) -> None:
    case = next(iter(CASES["shifted_window_attention"].values()))
    _, (operator, args) = operator_calls(case, 2, torch.bfloat16)
    args = tuple(resources._without_data(value) for value in args)
    (launch,) = (one for one in launches(operator, args, capability) if "qkv_ptr" in one.arguments)
    wanted = CONFIGURATIONS[capability][2, 32].backward
    assert (launch.options["num_warps"], launch.options["num_stages"]) == (wanted.num_warps, wanted.num_stages)


def test_the_committed_page_is_made_of_the_committed_rows() -> None:
    assert PAGE.read_text("utf-8") == render(read_rows(resources.ROWS))


def test_nothing_spills_at_the_shapes_of_the_released_models() -> None:
    rows = read_rows(resources.ROWS)
    latest = {tuple(row.get(name) for name in ("capability", "op", "case", "dtype", "direction")): row for row in rows}
    of_all = [facts for row in latest.values() for facts in row.get("launches", row.get("kernels"))]
    assert {(facts["spills"], facts["stack"]) for facts in of_all} == {(0, 0)}
