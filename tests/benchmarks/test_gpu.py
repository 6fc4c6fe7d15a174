"""The plan for a GPU, without one: what comes first, what is passed over, what stops it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import gpu, ops, parity, step

COMMIT, CARD = "c0ffee", "NVIDIA H100"
RUNNERS = {"benchmarks.step": step, "benchmarks.ops": ops, "benchmarks.parity": parity}


def row(benchmark: str, commit: str = COMMIT, dirty: bool = False, card: str = CARD, **facts: Any) -> dict[str, Any]:
    conditions = {"commit": commit, "dirty": dirty, "gpus": [{"name": card}]}
    return {"benchmark": benchmark, "conditions": conditions, **facts}


def rows_of(stage: gpu.Stage, **conditions: Any) -> list[dict[str, Any]]:
    """What the stage's command writes."""
    return [row(stage.benchmark, **conditions, **{**wanted, "extra": 1}) for wanted in stage.wanted]


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
def test_every_command_is_one_that_its_runner_takes(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for runner in RUNNERS.values():
        monkeypatch.setattr(runner, "devices", lambda: ["cuda", "cpu"])
    for stage in gpu.plan(full):
        _, module, *arguments = stage.arguments
        options = RUNNERS[module].parse(arguments)
        assert options.device == "cuda"
        assert options.tests == "passed"


def test_the_most_important_comes_first() -> None:
    short, full = gpu.plan(), gpu.plan(full=True)
    assert full[: len(short)] == short
    assert [stage.benchmark for stage in short] == ["step"] * 4 + ["op"] * 3 + ["parity"]
    assert "swin_base_192" in short[0].title
    assert "vit_base_224" in short[1].title
    raced = {name for stage in short[:4] for name in stage.wanted[0]["arguments"]["contestants"]}
    assert raced >= {"fast", "reference", "compiled", "hf_sdpa"}
    titles = [stage.title for stage in full]
    assert len(set(titles)) == len(titles)


def test_a_stage_is_done_where_this_commit_has_all_of_it_on_this_gpu() -> None:
    for stage in gpu.plan():
        rows = rows_of(stage)
        assert gpu.is_done(stage, rows, COMMIT, CARD), stage.title
        assert not gpu.is_done(stage, rows[:-1], COMMIT, CARD)
        assert not gpu.is_done(stage, rows, "decade", CARD)
        assert not gpu.is_done(stage, rows, COMMIT, "NVIDIA A100")
        assert not gpu.is_done(stage, rows_of(stage, dirty=True), COMMIT, CARD)


def test_a_race_of_others_is_another_stage() -> None:
    eager, _, compiled, _ = gpu.plan()[:4]
    assert not gpu.is_done(compiled, rows_of(eager), COMMIT, CARD)


def run_plan(statuses: Sequence[int | None], budget: float = 60.0, there: int = 0) -> tuple[list[str], list[str]]:
    """Titles that are left, and commands that were run; the first stages after the tests are there already."""
    tests = gpu.Stage("tests", ("tests",), "gpu_tests")
    stages = [tests, *gpu.plan()[: there + len(statuses) - 1]]
    ran, coming = [], iter(statuses)

    def run(arguments: Sequence[str], seconds: float) -> int | None:
        assert 0 < seconds <= budget
        ran.append(arguments[0])
        return next(coming)

    left = gpu.run_all(stages, budget, run, lambda stage: stage in stages[1 : 1 + there], lambda: ran.append("passed"))
    return left, ran


def test_what_is_there_is_passed_over_and_what_failed_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    left, ran = run_plan([0, 0, None], there=1)
    assert ran == ["tests", "passed", "-m", "-m"]
    assert left == [gpu.plan()[2].title]
    assert f"there already: {gpu.plan()[0].title}" in capsys.readouterr().out


@pytest.mark.parametrize("status", [1, None], ids=["failed", "cut off"])
def test_nothing_is_measured_where_the_tests_did_not_pass(status: int | None) -> None:
    with pytest.raises(SystemExit, match="nothing is measured: tests failed or took too long"):
        run_plan([status, 0])


def test_a_budget_that_is_over_leaves_the_rest() -> None:
    stages = gpu.plan()
    left = gpu.run_all(stages, -1.0, lambda *_: 0, lambda _: False, lambda: None)
    assert left == [stage.title for stage in stages]


def test_the_plan_is_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry-run"])
    printed = capsys.readouterr().out
    assert all(f"to do  {stage.title}" in printed for stage in gpu.plan())
    assert "the GPU tests" in printed


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param(["--budget", "0"], "--budget must be positive, got 0", id="budget"),
        pytest.param(["--official", "x"], "--official needs --full", id="official"),
        pytest.param([], "PyTorch sees no CUDA device", id="no gpu"),
    ],
)
def test_bad_options_are_named(
    options: list[str], error: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.parse(options)
    assert error in capsys.readouterr().err
