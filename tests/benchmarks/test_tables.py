"""Tables of made-up rows: whose figures they show, and what they say of where those came from."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import op_page, plots, tables
from tests.benchmarks.made_rows import at, loader_row, op_row, parity_row, rows, step_row

RACES = (
    at(step_row("cpu", "fast", 200.0, {"reference": 2.0, "compiled": 1.5}), commit="a" * 40),
    at(step_row("cpu", "reference", 100.0, {"fast": 0.5}), commit="a" * 40),
    at(step_row("cpu", "fast", 210.0, {"hf_sdpa": 3.0, "compiled": 1.4}, contestants=["y"]), commit="b" * 40),
    at(step_row("cpu", "hf_sdpa", 70.0, {"fast": 1 / 3}, contestants=["y"]), commit="b" * 40),
)


def text(lines: Any) -> str:
    return "\n".join(lines)


def test_step_table() -> None:
    table = text(tables.step_tables(rows("cuda"), "cuda"))
    assert "**swin_base_192**, bf16, batch 8. a GPU, driver 1.0, CUDA 13.0; torch 2.14.1; commit c0ffeec0ff" in table
    assert "| `reference` | 100.0 | 99.0 to 102.0 | 2.00× | 2.00 | 25.0% | 50.0% |" in table
    assert "| `fast` | 200.0 | 199.0 to 202.0 | - | 2.00 | 25.0% | 50.0% |" in table
    assert "supervised" not in table
    assert tables.ABSENT in text(tables.step_tables(rows("cuda"), "cpu"))


def test_a_table_without_peaks_says_why() -> None:
    why = "Peak memory is measured on CUDA alone."
    assert text(tables.step_tables(rows("cpu"), "cpu")).startswith(f"{why}\n\n**swin_base_192**")
    assert why not in text(tables.step_tables(rows("cuda"), "cuda"))
    assert why not in text(tables.step_tables([], "cpu"))


def test_what_an_epoch_of_another_method_costs() -> None:
    table = text(tables.other_methods(rows("cuda"), "cuda"))
    assert "| SimMIM, swin_base_192, `fast` | bf16, 8 | 200.0 | 1.78 | 1.00 |" in table
    assert "| `supervised` beside swin_base_192 | bf16, 8 | 160.0 | 2.22 | 1.25 |" in table


def test_first_screen_names_the_opponents() -> None:
    table = text(tables.first_screen(rows("cpu"), "cpu"))
    assert "| step | ours | images/s | than `reference` | commit |" in table
    assert "| swin_base_192, bf16, batch 8 | `fast` | 200.0 | 2.00× | c0ffeec0ff |" in table


def test_the_latest_row_counts() -> None:
    twice = [*rows("cpu"), step_row("cpu", "fast", 300.0, {"reference": 3.0}, contestants=["y"], pairs=9)]
    assert "| 300.0 | 3.00× |" in text(tables.first_screen(twice, "cpu"))


def test_the_loader_feeds_the_fastest_step_of_its_image_size() -> None:
    assert "GPU" not in text(tables.loader_table(rows("cpu")))
    small = step_row("cuda", "fast_graph", 100.0, {}, batch=10)
    table = text(tables.loader_table([*rows("cuda"), small, step_row("cuda", "fast", 999.0, {}, model="vit_base_224")]))
    assert "| full | pillow | 2 | 50.0 | 40.0 to 60.0 | 6.25 | 0.25 |" in table
    assert "Images of 192 pixels feed `fast`, swin_base_192, bf16, batch 8, on a GPU, driver 1.0" in table
    assert "vit" not in table
    other = step_row("cuda", "fast", 999.0, {}, model="vit_base_224")
    assert "GPU" not in text(tables.loader_table([loader_row(), other]))


def test_parity_table() -> None:
    table = text(tables.parity_table(rows("cpu"), "cpu"))
    assert "| swin_base_192, bf16, batch 8, 2 steps: `fast` | 2.0e-01 | 2 | 1.0e-01 | 6.0e-02 |" in table
    assert "a processor (avx), 2 threads, load 0.5; torch 2.14.1; commit c0ffeec0ff; 2026-01-02." in table


def test_folders_are_measured_apart_and_runs_are_not() -> None:
    loaded = loader_row()
    own = [{**loaded, "arguments": {**loaded["arguments"], "source": "data", "data": path}} for path in ("a", "b")]
    table = text(tables.loader_table([loaded, *own]))
    assert table.count("| a | pillow |") == table.count("| b | pillow |") == table.count("| full | pillow |") == 1
    again = {**loaded, "arguments": {**loaded["arguments"], "data": None, "tests": "run"}}
    assert tables.latest([loaded, again], "loader") == [{**again, "sources": [again]}]
    compared = parity_row("cpu")
    later = {**compared, "arguments": {**compared["arguments"], "runs": ["fast", "reference"], "tests": "run"}}
    assert tables.latest([compared, later], "parity") == [{**later, "sources": [later]}]


def test_a_later_race_loses_no_figure() -> None:
    fast = next(row for row in tables.latest(RACES, "step") if row["contestant"] == "fast")
    assert fast["times_faster_than"] == {"reference": 2.0, "compiled": 1.4, "hf_sdpa": 3.0}
    screen = text(tables.first_screen(RACES, "cpu"))
    assert "| `fast` | 210.0 | 2.00× | 1.40× | 3.00× | bbbbbbbbbb and aaaaaaaaaa |" in screen
    assert "commit bbbbbbbbbb and aaaaaaaaaa;" in screen
    table = text(tables.step_tables(RACES, "cpu"))
    names = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert names == ["fast", "reference", "hf_sdpa"]
    assert "| `reference` | 100.0 | 99.0 to 102.0 | 2.00× |" in table


def test_ratios_of_the_same_commit_come_before_later_ones() -> None:
    back = at(step_row("cpu", "fast", 220.0, {"timm": 4.0}, contestants=["z"]), commit="a" * 40)
    fast = next(row for row in tables.latest([*RACES, back], "step") if row["contestant"] == "fast")
    assert fast["times_faster_than"] == {"reference": 2.0, "compiled": 1.5, "hf_sdpa": 3.0, "timm": 4.0}


def test_machines_have_tables_of_their_own() -> None:
    two = [
        at(step_row("cuda", "fast", rate, {"reference": 2.0}), gpus=[{"name": name, "capability": "9.0"}])
        for name, rate in (("H200", 900.0), ("A100", 300.0))
    ]
    for make in (tables.step_tables, tables.first_screen):
        table = text(make(two, "cuda"))
        assert table.count("| images/s |") == 2
        assert table.count("H200, driver 1.0") == table.count("A100, driver 1.0") == 1
    for benchmark, made in (("parity", parity_row("cuda")), ("op", op_row("native", 9.0))):
        both = [at(made, gpus=[{"name": name, "capability": "9.0"}]) for name in ("H200", "A100")]
        assert list(tables.by_machine(tables.latest(both, benchmark))) == ["H200", "A100"]
        page = text(tables.parity_table(both, "cuda")) if benchmark == "parity" else op_page.render(both)
        assert page.count("H200, driver 1.0") == page.count("A100, driver 1.0") == 1
    assert plots.step_plot(two, "cuda").count("H200") >= 1
    few, many = (at(step_row("cpu", "fast", 1.0, {}), threads=threads) for threads in (1, 2))
    assert len(tables.latest([few, many], "step")) == 2
    assert len(tables.latest([many, at(many, simd="avx2")], "step")) == 2, "one name, two processors"


def test_every_page_shows_the_latest_row_and_names_changed_files() -> None:
    clean = at(step_row("cpu", "fast", 200.0, {"reference": 2.0}), commit="a" * 40)
    dirty = at(step_row("cpu", "fast", 300.0, {"reference": 3.0, "timm": 9.0}), commit="b" * 40, dirty=True)
    others = [step_row("cpu", name, 20.0, {}) for name in ("reference", "timm")]
    screen = text(tables.first_screen([clean, *others, dirty], "cpu"))
    assert "| 300.0 | 3.00× | 9.00× | bbbbbbbbbb, files changed since |" in screen
    assert "| 200.0 | 2.00× | 9.00× | aaaaaaaaaa and bbbbbbbbbb, files changed since |" in text(
        tables.first_screen([dirty, *others, clean], "cpu")
    )
    table = text(tables.step_tables([clean, dirty], "cpu"))
    assert "300.0" in table
    assert "200.0" not in table
    assert "commit bbbbbbbbbb, files changed since;" in table


@pytest.mark.parametrize(("kind", "device"), [("step", "cpu"), ("op", "cuda"), ("op_host", "cuda")])
def test_who_is_absent_is_listed_with_the_reason(kind: str, device: str) -> None:
    reached = {"step": step_row(device, "fast", 2.0, {}), "op": op_row("native", 2.0), "op_host": op_row("native", 2.0)}
    row = {**reached[kind], "benchmark": kind}
    why = {name: row[name] for name in row.keys() & {"benchmark", "op", "case", "arguments", "time", "conditions"}}
    gone = {**why, "contestant": "xformers", "absent": "xformers is not installed"}

    def shown(*made: dict[str, Any]) -> str:
        return text(tables.step_tables(made, device)) if kind == "step" else op_page.render(made)

    assert "* `xformers`, " in shown(row, gone)
    assert ": xformers is not installed" in shown(row, gone)
    assert shown(row, gone, {**row, "contestant": "xformers"}) == shown(row, {**row, "contestant": "xformers"})
    assert "is not installed" in shown(gone)


def test_op_page() -> None:
    page = op_page.render(
        [op_row("native", 10.0, times_faster_than={"eager": 2.0}), op_row("eager", 20.0, gflop_per_s=0)]
    )
    assert "| bias_gelu | swin | bf16 | native | 10 | 10.0 | 0.100 | 20% | eager 2.00 | 0.5 | c0ffeec0ff |" in page
    assert "| bias_gelu | swin | bf16 | eager | 20 | 5.0 | - | 20% |  | 0.5 | c0ffeec0ff |" in page
    assert "Not measured yet." in op_page.render([])
