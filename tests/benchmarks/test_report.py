"""The report: the committed pages are what the committed rows make them; what it makes of made-up rows."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from benchmarks import aims, measured, report, tables
from benchmarks.results import ROOT
from tests.benchmarks.made_rows import CONDITIONS, op_row, rows, step_row


def text(lines: Any) -> str:
    return "\n".join(lines)


def test_the_committed_files_are_what_the_committed_rows_make_them() -> None:
    texts = report.current()
    assert {"README.md", "docs/benchmarks.md", "docs/ops.md", "simmim_fast/_measured.py"} <= texts.keys()
    assert report.stale(texts) == []


def test_no_picture_is_left_without_rows() -> None:
    made = {ROOT / path for path in report.current()}
    assert {path for path in (ROOT / report.FIGURES).glob("*.svg")} <= made


@pytest.mark.parametrize("device", report.DEVICES)
def test_pages_come_out_the_same_byte_for_byte(device: str) -> None:
    documents = {
        "page.md": "".join(
            f"<!-- {name}: made by python -m benchmarks.report --><!-- end of {name} -->\n"
            for name in report.sections([], ())
        )
    }
    first, second = (report.pages(rows(device), documents) for _ in range(2))
    assert first == second
    pictures = {path for path in first if path.endswith(".svg")}
    assert pictures == {f"docs/figures/{name}_{device}.svg" for name in ("step", "parity", "roofline")}
    for path in pictures:
        assert ElementTree.fromstring(first[path]).tag.endswith("svg")
        assert f"figures/{path.rpartition('/')[2]}" in first["page.md"]
    again = report.pages(rows(device), {"page.md": first["page.md"]})
    assert again["page.md"] == first["page.md"]


def test_without_rows_nothing_is_measured() -> None:
    for name, section in report.sections([], ()).items():
        assert "measured yet" in section, name
        assert "|" not in section, name


def test_step_table() -> None:
    table = text(tables.step_tables(rows("cuda"), "cuda"))
    assert "**swin_base_192**, bf16, batch 8. a GPU, driver 1.0, CUDA 13.0; torch 2.14.1; commit c0ffeec0ff" in table
    assert "| `reference` | 100.0 | 99.0 to 102.0 | 2.00× | 2.00 | 25.0% | 50.0% |" in table
    assert "| `fast` | 200.0 | 199.0 to 202.0 | - | 2.00 | 25.0% | 50.0% |" in table
    assert "supervised" not in table
    assert tables.ABSENT in text(tables.step_tables(rows("cuda"), "cpu"))


def test_what_an_epoch_of_another_method_costs() -> None:
    table = text(tables.other_methods(rows("cuda"), "cuda"))
    assert "| SimMIM, swin_base_192, `fast` | bf16, 8 | 200.0 | 1.78 | 1.00 |" in table
    assert "| `supervised` beside swin_base_192 | bf16, 8 | 160.0 | 2.22 | 1.25 |" in table


def test_first_screen_names_the_opponents() -> None:
    table = text(tables.first_screen(rows("cpu"), "cpu"))
    assert "| step | ours | images/s | than `reference` |" in table
    assert "| swin_base_192, bf16, batch 8 | `fast` | 200.0 | 2.00× |" in table


def test_the_latest_row_counts() -> None:
    twice = [*rows("cpu"), step_row("cpu", "fast", 300.0, {"reference": 3.0}, contestants=["y"], pairs=9)]
    assert "| 300.0 | 3.00× |" in text(tables.first_screen(twice, "cpu"))


def test_the_loader_feeds_a_gpu_where_one_was_measured() -> None:
    assert "GPU" not in text(tables.loader_table(rows("cpu")))
    table = text(tables.loader_table(rows("cuda")))
    assert "| full | pillow | 2 | 50.0 | 40.0 to 60.0 | 6.25 | 0.25 |" in table


def test_parity_table() -> None:
    table = text(tables.parity_table(rows("cpu"), "cpu"))
    assert "| swin_base_192, bf16, batch 8, 2 steps: `fast` | 2.0e-01 | 2 | 1.0e-01 | 6.0e-02 |" in table


def test_unknown_and_open_sections_are_refused() -> None:
    with pytest.raises(ValueError, match=r"page.md: the section 'weather' is none of"):
        report.fill("<!-- weather: made by python -m benchmarks.report -->", {"step": ""}, "page.md")
    with pytest.raises(ValueError, match=r"page.md: the section 'step' must begin and end once, got 0 of it"):
        report.fill("<!-- step: made by python -m benchmarks.report -->", {"step": ""}, "page.md")


def choices(*made: dict[str, Any]) -> dict[Any, str]:
    """FASTEST of the module that the rows make."""
    (assignment,) = (node for node in ast.parse(measured.render(made)).body if isinstance(node, ast.AnnAssign))
    return ast.literal_eval(assignment.value)


def test_the_faster_kernels_are_chosen() -> None:
    assert choices() == {}
    key = ((9, 0), "bias_gelu")
    assert choices(op_row("native", 10.0), op_row("triton", 20.0)) == {key: "native"}
    assert choices(op_row("native", 10.0), op_row("triton", 20.0), op_row("native", 30.0)) == {key: "triton"}
    other = (op_row("native", 90.0, case="vit"), op_row("triton", 30.0, case="vit"))
    assert choices(op_row("native", 10.0), op_row("triton", 20.0), *other) == {key: "triton"}


def test_what_chooses_nothing() -> None:
    dirty = {**CONDITIONS, "dirty": True}
    assert choices(op_row("native", 10.0), op_row("triton", 20.0, conditions=dirty)) == {}
    assert choices(op_row("native", 10.0), op_row("triton", 20.0, case="vit")) == {}
    assert choices(op_row("native", 10.0, "cpu"), op_row("triton", 20.0, "cpu")) == {}


def test_aims_are_held_against_the_latest_rows() -> None:
    def op(faster: dict[str, float], rounds: int) -> dict[str, Any]:
        given = {"dtype": "fp32", "device": "cpu", "rounds": rounds}
        return op_row("native", 100.0, "cpu", "vit", op="masked_l1_loss", arguments=given, times_faster_than=faster)

    def step(model: str, ratio: float) -> dict[str, Any]:
        return step_row("cpu", "fast", 1.0, {"reference": ratio}, model=model, dtype="fp32")

    def traffic(backend: str, batch: int, megabytes: float, saved: float) -> dict[str, Any]:
        arguments = {
            "model": "vit_base_224",
            "backend": backend,
            "batch": batch,
            "dtype": "bf16",
            "drop_path_rate": None,
        }
        counts = {"bytes": megabytes * 16e6, "calls": 451, "saved_bytes": saved}
        return {"benchmark": "traffic", "arguments": arguments, **counts}

    made = [op({"eager": 4.0, "compiled": 1.0}, 3), op({"eager": 4.0, "compiled": 3.0}, 4)]
    made += [step("swin_base_192", 1.29), step("swin_tiny_192", 0.5)]
    made += [traffic("auto", 16, 620.0, 1.0), traffic("auto", 8, 1.0, 59.0), traffic("reference", 8, 1.0, 100.0)]
    assert list(aims.aims_table(made))[2:-1] == [
        "| step of swin_base_192 on the CPU, fp32, batch 8 | ≥ 1.3× | 1.29× | missed |",
        "| traffic of vit_base_224 per image, bf16, batch 16 | ≤ 620 MB | 620 MB | met |",
        "| calls of vit_base_224, bf16 | ≤ 450 | 451 | missed |",
        "| saved for backward by vit_base_224, bf16, batch 8, of the reference's | ≤ 0.6× | 0.59× | met |",
        "| masked_l1_loss, vit, fp32, on the CPU | ≥ 3× | 3.00× | met |",
    ]
