"""The traffic counter's command line, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import aims, traffic, traffic_page
from benchmarks.counting import Call, Traffic
from benchmarks.models import build
from benchmarks.results import RESULTS, read_rows

SMALL = ["--model", "swin_micro_96", "--batch", "3"]


def test_prints_every_operator_and_appends_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "traffic.jsonl"
    traffic.main([*SMALL, "--json", str(path)])
    printed = capsys.readouterr().out
    (row,) = read_rows(path)
    assert (row["arguments"]["model"], row["arguments"]["batch"]) == ("swin_micro_96", 3)
    assert str(tmp_path) not in str(row)
    assert "lower bound, not a measurement" in printed
    for name, op in row["ops"].items():
        assert re.search(rf"^{re.escape(name)} +{op['calls']} +{op['launches']} ", printed, re.MULTILINE)
    for quantity in ("calls", "launches", "flops", "bytes", "lower_bound_seconds"):
        assert row[quantity] == pytest.approx(sum(op[quantity] for op in row["ops"].values()))
    assert row["bytes"] == pytest.approx(row["bytes_fixed"] + 3 * row["bytes_per_image"])


def test_what_is_computed_again_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    for options in ([], ["--recompute", "none"], ["--recompute", "mlp"], ["--backend", "reference"]):
        traffic.main(["--model", "vit_micro_96", "--batch", "3", "--json", str(path), *options])
    rows = {row["arguments"]["recompute"]: row for row in read_rows(path)}
    ours = [rows[name] for name in ("none", "pointwise", "mlp")]
    assert [row["saved_bytes"] for row in ours] == sorted((row["saved_bytes"] for row in ours), reverse=True)
    assert [row["bytes"] for row in ours] == sorted(row["bytes"] for row in ours)
    assert len({row["saved_bytes"] for row in ours}) == len({row["bytes"] for row in ours}) == 3
    page = traffic_page.render(rows.values())
    assert "| vit_micro_96 | auto | mlp | bf16 | 3 |" in page
    assert "| vit_micro_96 | reference | - | bf16 | 3 |" in page
    share = rows["mlp"]["saved_bytes"] / rows[None]["saved_bytes"]
    more = (rows["mlp"]["bytes"] - rows["none"]["bytes"]) / 3e6
    assert re.search(rf"bf16, batch 3 \| `mlp` \| .* \| {more:.1f} \| .* \| {share:.3f}× \|", page)


def test_all_rows_are_counted_again_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "traffic.jsonl"
    stored = ['{"arguments": {"backend": "auto"}}', '{"arguments": {"backend": "official"}, "calls": 1}']
    path.write_text("\n".join([*stored, ""]), encoding="utf-8")
    monkeypatch.setattr(traffic, "PLAN", ("--model vit_micro_96 --batch 2", "--model resnet"))
    with pytest.raises(SystemExit):
        traffic.main(["--all", str(path)])
    assert path.read_text("utf-8").splitlines() == stored
    monkeypatch.setattr(traffic, "PLAN", traffic.PLAN[:1])
    traffic.main(["--all", str(path)])
    official, row = read_rows(path)
    assert official == {"arguments": {"backend": "official"}, "calls": 1}
    assert row["arguments"]["batch"] == 2
    assert row["arguments"].keys() == {
        *("model", "backend", "batch", "dtype", "drop_path_rate", "recompute", "peak_tflops", "bandwidth_tbs")
    }
    assert list(tmp_path.iterdir()) == [path]


def test_the_fast_model_moves_less_than_the_reference() -> None:
    (fast,), (reference,) = (
        traffic.count_model(build("swin_micro_96", backend=backend), [2], "bf16") for backend in ("native", "reference")
    )
    assert any(call.op.startswith("simmim_fast.shifted_window_attention") for call in fast.calls)
    assert not any(call.op.startswith("simmim_fast.") for call in reference.calls)
    assert fast.nbytes < reference.nbytes
    assert len(fast.calls) < len(reference.calls)
    assert fast.saved < reference.saved


def test_parts_of_a_line() -> None:
    one, two = (Traffic((Call("op", 1, 0, 100 + 7 * batch),), saved=50 + 3 * batch) for batch in (4, 8))
    facts = traffic.summary(one, two, 4, peak=1.0, bandwidth=2.0)
    assert (facts["bytes"], facts["bytes_fixed"], facts["bytes_per_image"]) == (128, 100, 7)
    assert (facts["saved_bytes"], facts["saved_bytes_fixed"], facts["saved_bytes_per_image"]) == (62, 50, 3)
    assert facts["lower_bound_seconds"] == 64


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param(["--model", "resnet"], "invalid choice: 'resnet'", id="model"),
        pytest.param(["--batch", "0"], "--batch must be at least 1, got 0", id="batch"),
        pytest.param(
            ["--backend", "reference", "--recompute", "mlp"], "--recompute must be left out for plain", id="recompute"
        ),
    ],
)
def test_refuses(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        traffic.parse(arguments)
    assert error in capsys.readouterr().err


def test_the_official_code_is_asked_for_by_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="official must be a checkout of microsoft/SimMIM"):
        traffic.main([*SMALL, "--official", str(tmp_path)])
    with pytest.raises(ValueError, match="encoder of microsoft/SimMIM"):
        traffic.main(["--model", "swinv2_base_192", "--official", str(tmp_path)])


def test_counts_do_not_depend_on_those_before() -> None:
    alone = traffic.count_model(build("vit_micro_96"), [2], "bf16")
    again = traffic.count_model(build("vit_micro_96"), [4, 2], "bf16")
    assert alone == again[1:]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("model", aims.TRAFFIC)
def test_the_committed_rows_are_what_is_counted_now(model: str, backend: str) -> None:
    wanted = {"model": model, "backend": backend, "batch": 16, "dtype": "bf16", "drop_path_rate": None}
    wanted["recompute"] = "pointwise" if backend == "auto" else None
    rows = traffic_page.counted(read_rows(RESULTS / "traffic.jsonl"))
    (row,) = (row for row in rows if wanted.items() <= row["arguments"].items())
    if row["conditions"]["versions"]["torch"] != torch.__version__:
        pytest.skip(
            f"not run: counted with torch {row['conditions']['versions']['torch']}, this is {torch.__version__}"
        )
    with torch.device("meta"):
        built = build(model, backend=backend)
    (now,) = traffic.count_model(built, [16], "bf16")
    stored = {name: row[name] for name in ("calls", "launches", "flops", "bytes", "saved_bytes")}
    counted = {"calls": len(now.calls), "launches": now.launches, "flops": now.flops, "bytes": now.nbytes}
    assert {**counted, "saved_bytes": now.saved} == stored, "`make traffic` counts them again"
    if backend == "auto":
        asked = dict(zip(("megabytes", "calls"), aims.TRAFFIC[model], strict=True))
        reached = {"megabytes": now.nbytes / 16e6, "calls": len(now.calls)}
        assert {what: figure for what, figure in reached.items() if figure > asked[what]} == {}


@pytest.mark.parametrize("recompute", aims.SAVED_SHARES)
@pytest.mark.parametrize("model", aims.TRAFFIC)
def test_what_is_saved_is_as_little_as_asked(model: str, recompute: str) -> None:
    saved = {}
    for backend, how in (("auto", {"recompute": recompute}), ("reference", {})):
        with torch.device("meta"):
            built = build(model, backend=backend, **how)
        (counted,) = traffic.count_model(built, [8], "bf16")
        saved[backend] = counted.saved
    assert saved["auto"] <= aims.SAVED_SHARES[recompute] * saved["reference"]
