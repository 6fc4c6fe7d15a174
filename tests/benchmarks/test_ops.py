from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import contest, measured, op_page, ops
from benchmarks.cases import CASES
from benchmarks.contestants import eager
from benchmarks.results import read_rows
from tests.benchmarks.made_rows import op_row

CALL = [
    "--op",
    "masked_l1_loss",
    "--case",
    "vit",
    "--dtype",
    "fp32",
    "--device",
    "cpu",
    "--rounds",
    "3",
    "--tests",
    "passed",
]


def test_every_contestant_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    assert ops.main([*CALL, "--host", "--contestants", "eager", "native", "--results", str(path)]) == 0
    eager, native, *host = read_rows(path)
    assert [row["contestant"] for row in host] == ["eager", "native"]
    assert min(row["us"] for row in host) > 0
    assert op_page.render([eager, native, *host]).count("| masked_l1_loss |") == 4
    assert native["limit_share"] > eager["limit_share"] * eager["us"] / native["us"] * 0.99
    assert [row["contestant"] for row in (eager, native)] == ["eager", "native"]
    assert eager["times_faster_than"]["native"] * native["times_faster_than"]["eager"] == pytest.approx(1, rel=0.01)
    named = {"case": "vit", "contestants": ["eager", "native"], "host": True, "tests": "passed"}
    assert native["arguments"] == {"dtype": "fp32", "device": "cpu", "batch": 8, "rounds": 3, **named}
    assert native["us"] >= native["us_least"] > 0
    assert native["us"] > native["us_forward"] > 0
    assert native["gb_per_s"] > 0
    printed = capsys.readouterr().out
    assert printed.count("masked_l1_loss, vit_base_224, fp32") == 2
    assert f"{native['us']} us (forward {native['us_forward']}) " in printed
    assert f"{native['gb_per_s']:.1f} GB/s" in printed
    assert f"{native['gflop_per_s'] / 1e3:.3f} TFLOP/s" in printed


def test_who_cannot_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    assert ops.main([*CALL, "--host", "--contestants", "eager", "triton", "--results", str(path)]) == 0
    why = "masked_l1_loss: backend='triton' cannot run here"
    printed = capsys.readouterr().out
    assert printed.count(f"triton does not run: {why}") == 1
    assert f"a call of triton: does not run: {why}" in printed
    eager, triton, eager_host, triton_host = read_rows(path)
    assert [row["contestant"] for row in (eager, eager_host)] == ["eager"] * 2
    for row in (triton, triton_host):
        assert row["contestant"] == "triton"
        assert row["absent"].startswith(why)
        assert "us" not in row


@pytest.mark.parametrize("when", [1, 3], ids=["at once", "while it is timed"])
def test_who_fails_is_named_and_the_others_race(when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(**inputs: torch.Tensor) -> torch.Tensor:
        calls.append(inputs)
        if len(calls) >= when:
            raise torch.OutOfMemoryError("out of memory")
        return eager("masked_l1_loss")(**inputs)

    found = ops.contestant
    monkeypatch.setattr(
        ops, "contestant", lambda op, name, *rest: failing if name == "native" else found(op, name, *rest)
    )
    path = tmp_path / "rows.jsonl"
    assert ops.main([*CALL, "--contestants", "native", "eager", "--results", str(path)]) == 0
    measured, absent = read_rows(path)
    assert (measured["contestant"], measured["times_faster_than"]) == ("eager", {})
    assert (absent["contestant"], absent["absent"]) == ("native", "OutOfMemoryError: out of memory")


def test_a_backend_that_did_not_run_chooses_nothing() -> None:
    absent = op_row("native", 10.0, absent="no kernel image")
    del absent["us"]
    assert measured.fastest([absent, op_row("triton", 20.0)]) == {}


def wrong(**inputs: torch.Tensor) -> torch.Tensor:
    return 7 * eager("masked_l1_loss")(**inputs)


def without_gradient(**inputs: torch.Tensor) -> torch.Tensor:
    right = eager("masked_l1_loss")(**inputs)
    return right.detach() + 0 * right


@pytest.mark.parametrize(("function", "what"), [(wrong, "out"), (without_gradient, "grad_prediction")])
def test_nothing_is_timed_where_one_is_wrong(
    function: Callable[..., torch.Tensor],
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(ops, "contestant", lambda *_: function)
    assert ops.main([*CALL, "--contestants", "native", "--results", str(path)]) == 1
    assert f"native is wrong and is not timed: {what}: relative L2" in capsys.readouterr().err
    assert not path.exists()
    monkeypatch.setattr(contest, "contestant", lambda *_: function)
    with pytest.raises(contest.Disagreement, match=f"native is wrong and is not timed: {what}"):
        contest._prepared("native", CASES["masked_l1_loss"]["vit_base_224"], "fp32", "cpu")


class Stream:
    """A device that begins with what is recorded when its sleep is over: after so many calls for it as it takes."""

    def __init__(self, needed: int) -> None:
        self.needed, self.slept = needed, []

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles)

    def event(self, enable_timing: bool) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            record=lambda: None,
            synchronize=lambda: None,
            query=lambda: self.slept[-1] < self.needed,
            elapsed_time=lambda other: float(len(self.slept)),
        )


@pytest.mark.parametrize(("needed", "times"), [(0, 1), (2**23, 2), (2**40, 3)], ids=["short", "long", "waits"])
def test_a_gpu_sleeps_until_the_host_has_launched_all(needed: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(needed)
    monkeypatch.setattr(torch.cuda, "_sleep", stream.sleep)
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(ops, "_flushed", lambda: torch.ones(1))
    launched = []
    seconds = ops._seconds_on_device(lambda: launched.append("forward"), lambda _: launched.append("backward"))
    assert seconds == (times / 1e3, times / 1e3)
    assert stream.slept == [ops.SLEEP * 4**turn for turn in range(times)]
    assert launched == ["forward", "backward"] * times


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param(["--rounds", "0"], "--rounds must be at least 1, got 0", id="rounds"),
        pytest.param(["--case", "resnet"], "--case must be part of a case's name", id="case"),
        pytest.param(["--contestants", "cudnn"], "--contestants must be of .*; got cudnn", id="contestants"),
    ],
)
def test_bad_options_are_named(options: list[str], error: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        ops.parse(options)
    assert re.search(error, capsys.readouterr().err)
