"""The table of what kernels take: rows and page of one op, and that the committed page is what its rows give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import resources
from benchmarks.cases import CASES
from benchmarks.cost import launches, operator_calls
from benchmarks.occupancy import LIMITS
from benchmarks.results import read_rows
from simmim_fast._backends import TRITON_INTERPRETED
from simmim_fast.ops.shifted_window_attention.kernels import CONFIGURATIONS

OP = "substitute_mask_tokens"


@pytest.mark.skipif(TRITON_INTERPRETED, reason="the interpreter compiles nothing")
def test_every_launch_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    options = ["--op", OP, "--capability", "90", "--dtype", "bf16", "--results", str(rows), "--page", str(page)]
    resources.main(options)
    written = read_rows(rows)
    assert [(row["case"], row["direction"]) for row in written] == [
        (case, direction) for case in CASES[OP] for direction in resources.DIRECTIONS
    ]
    for row in written:
        for launch in row["launches"]:
            assert launch["spills"] == launch["stack"] == 0
            assert 0 < launch["registers"] <= 255
            assert 0 < launch["occupancy"] <= 1
            assert launch["blocks"] * launch["warps"] == launch["occupancy"] * 64
    launched = sum(len(row["launches"]) for row in written)
    assert page.read_text("utf-8") == resources.render(written)
    assert page.read_text("utf-8").count(" | forward | ") + page.read_text("utf-8").count(" | backward | ") == launched
    assert len(capsys.readouterr().out.splitlines()) == launched


def test_the_latest_row_of_a_case_counts() -> None:
    resources_of_launch = {"registers": 40, "spills": 0, "stack": 0, "shared": 2048}
    held = {"blocks": 12, "limited_by": "registers", "occupancy": 0.75}
    launch = {"kernel": "some_kernel", "grid": [7, 2], "warps": 4, **resources_of_launch, **held}
    row = {"capability": 90, "op": OP, "case": "a case", "dtype": "bf16", "direction": "forward", "batch": 256}
    page = resources.render([{**row, "launches": []}, {**row, "launches": [launch]}])
    assert "## substitute_mask_tokens, compute capability 9.0" in page
    assert "| a case | bf16 | forward | some_kernel | 7 × 2 | 4 | 40 | 0 | 0 | 2.0 | 12 | registers | 75% |" in page


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
    assert resources.PAGE.read_text("utf-8") == resources.render(read_rows(resources.ROWS))
