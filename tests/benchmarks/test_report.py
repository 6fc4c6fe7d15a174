"""The report: the committed pages are what the committed rows make them; what it makes of made-up rows."""

from __future__ import annotations

import ast
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from benchmarks import measured, report
from benchmarks.results import ROOT
from tests.benchmarks.made_rows import CONDITIONS, op_row, rows


def test_the_committed_files_are_what_the_committed_rows_make_them() -> None:
    texts = report.current()
    made = {"docs/benchmarks.md", "docs/ops.md", "docs/traffic.md", "simmim_fast/_measured.py"}
    assert {"README.md", *made} <= texts.keys()
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
    made = report.sections([], ())
    aims = made.pop("aims").strip().splitlines()
    assert {line.partition("| - | ")[2] for line in aims[2:]} == {"not measured | - |"}
    for name, section in made.items():
        assert "measured yet" in section, name
        assert "|" not in section, name


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
