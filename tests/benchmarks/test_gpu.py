"""The plan for a GPU, without one: what comes first, what is passed over, what stops it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, ops, parity, step
from benchmarks.results import ROOT
from benchmarks.trainees import Setting
from simmim_fast.ops import OPS

COMMIT, CARD = "c0ffee", "NVIDIA H100"
RUNNERS = {"benchmarks.step": step, "benchmarks.ops": ops, "benchmarks.parity": parity}


def row(benchmark: str, commit: str = COMMIT, dirty: bool = False, card: str = CARD, **facts: Any) -> dict[str, Any]:
    conditions = {"commit": commit, "dirty": dirty, "gpus": [{"name": card}]}
    return {"benchmark": benchmark, "conditions": conditions, **facts}


def rows_of(stage: gpu.Stage, **conditions: Any) -> list[dict[str, Any]]:
    """What the stage's command writes."""
    return [row(**conditions, **{**filled(wanted), "extra": 1}) for wanted in stage.wanted]


def filled(wanted: Any) -> Any:
    """Something where a stage wants anything."""
    if isinstance(wanted, Mapping):
        return {name: filled(value) for name, value in wanted.items()}
    return None if wanted is ... else wanted


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
def test_every_command_is_one_that_its_runner_takes(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for runner in RUNNERS.values():
        monkeypatch.setattr(runner, "devices", lambda: ["cuda", "cpu"])
    for stage in gpu.plan(full):
        _, module, *arguments = stage.arguments
        options = RUNNERS[module].parse(arguments)
        assert options.device == "cuda"
        assert options.tests == ("passed" if full else "smoke-passed")  # rows tell which tests went before


def test_the_most_important_comes_first() -> None:
    short, full = gpu.plan(), gpu.plan(full=True)
    assert [stage.title for stage in full[: len(short)]] == [stage.title for stage in short]
    assert [stage.benchmark for stage in short] == ["step"] * 4 + ["op"] * 3 + ["parity"]
    assert "swin_base_192" in short[0].title
    assert "vit_base_224" in short[1].title
    assert sum(stage.cap for stage in short) <= gpu.BUDGET - 80  # which are the smoke tests' where Triton has compiled
    raced = {name for stage in short[:4] for name in stage.wanted[0]["arguments"]["contestants"]}
    assert raced >= {"fast", "reference", "compiled", "hf_sdpa"}
    titles = [stage.title for stage in full]
    assert len(set(titles)) == len(titles)


def test_a_stage_is_done_where_all_of_it_is_there() -> None:
    for stage in gpu.plan():
        rows = rows_of(stage)
        assert gpu.is_done(stage, rows), stage.title
        assert not gpu.is_done(stage, rows[:-1])


def test_rows_of_the_same_code_on_this_gpu_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_same_code", lambda commit: commit in (COMMIT, "rows committed"))
    kept = [row("step"), row("step", commit="rows committed")]
    others = [row("step", commit="decade"), row("step", dirty=True), row("step", card="NVIDIA A100")]
    assert gpu.comparable([*others, *kept], CARD) == kept


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
def test_a_stage_wants_the_arguments_that_its_command_writes(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for runner in RUNNERS.values():
        monkeypatch.setattr(runner, "devices", lambda: ["cuda", "cpu"])
    for stage in gpu.plan(full):
        _, module, *arguments = stage.arguments
        options = RUNNERS[module].parse(arguments)
        for wanted in stage.wanted:
            given = wanted["arguments"]
            if module == "benchmarks.step":
                setting = Setting(*options.models, *options.dtype, *options.batch, options.device, options.official)
                written = step.given(options, setting)
            elif module == "benchmarks.ops":
                written = ops.given(options, *options.dtype)
            else:
                written = parity.given(options, *options.models, *options.dtype)
            assert gpu._says(written, given), stage.title


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"pairs": 1}, ["step"]),
        ({"rounds": 1}, ["op"]),
        ({"steps": 3}, ["parity"]),
        ({"contestants": ["native"]}, ["step", "op"]),
    ],
    ids=str,
)
def test_a_shorter_measurement_is_not_the_stage(change: dict[str, Any], kinds: list[str]) -> None:
    for stage in gpu.plan():
        if stage.benchmark in kinds:
            rows = [{**one, "arguments": {**one["arguments"], **change}} for one in rows_of(stage)]
            assert not gpu.is_done(stage, rows), stage.title


def test_somebody_must_have_run() -> None:
    for stage in gpu.plan():
        rows = rows_of(stage)
        gone = [{**one, "absent": "out of memory"} for one in rows]
        assert not gpu.is_done(stage, gone), stage.title
        if stage.benchmark == "step":
            assert gpu.is_done(stage, [rows[0], *gone[1:]]), stage.title
        if stage.benchmark == "op":
            ran = {one["benchmark"]: one for one in rows}
            assert gpu.is_done(stage, [*gone, *ran.values()]), stage.title
            assert not gpu.is_done(stage, [*gone, ran["op"]]), stage.title


def test_a_race_of_others_is_another_stage() -> None:
    eager, _, compiled, _ = gpu.plan()[:4]
    assert not gpu.is_done(compiled, rows_of(eager))


def test_a_race_without_the_official_code_is_run_again_with_it(tmp_path: Path) -> None:
    without, with_it = (gpu.plan(full=True, official=path) for path in (None, tmp_path))
    for plain, official in zip(without, with_it, strict=True):
        has_it = "--official" in official.arguments
        assert has_it == ("official" in official.title)
        assert gpu.is_done(official, rows_of(plain)) is not has_it, official.title
        assert gpu.is_done(plain, rows_of(official))
    with_another = gpu.plan(full=True, official=tmp_path / "another")
    assert not all(gpu.is_done(stage, rows_of(one)) for stage, one in zip(with_it, with_another, strict=True))


@pytest.mark.skipif(shutil.which("make") is None, reason="not run: make is not installed")
def test_the_whole_plan_takes_the_official_code_by_its_makefile_variable() -> None:
    make = ["make", "-n", "bench-gpu-full", "SETUP=", "OFFICIAL=some/where"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m benchmarks.gpu --full --official some/where" in printed


def run_plan(statuses: Sequence[int | None], budget: float = 60.0, there: int = 0) -> tuple[list[str], list[str]]:
    """Titles that are left, and commands that were run; the first stages after the tests are there already."""
    tests = gpu.Stage("tests", ("tests",), "gpu_tests")
    stages = [tests, *gpu.plan()[: there + len(statuses) - 1]]
    ran, coming = [], iter(statuses)

    def run(arguments: Sequence[str], seconds: float) -> int | None:
        assert 0 < seconds <= budget
        ran.append(arguments[0])
        return next(coming)

    def passed(stage: gpu.Stage) -> None:
        ran.append(f"{stage.title} passed")

    left = gpu.run_all(stages, budget, run, lambda stage: stage in stages[1 : 1 + there], passed)
    return left, ran


def test_what_is_there_is_passed_over_and_what_failed_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    left, ran = run_plan([0, 0, None], there=1)
    assert ran == ["tests", "tests passed", "-m", "-m"]
    assert left == [gpu.plan()[2].title]
    assert f"there already: {gpu.plan()[0].title}" in capsys.readouterr().out


@pytest.mark.parametrize("status", [1, None], ids=["failed", "cut off"])
def test_nothing_is_measured_where_the_tests_did_not_pass(status: int | None) -> None:
    with pytest.raises(SystemExit, match="nothing is measured: tests failed or took too long"):
        run_plan([status, 0])


@pytest.mark.parametrize(("took", "left"), [(0.0, 405), (240.0, 165), (410.0, None)], ids=str)
def test_the_smoke_tests_leave_the_first_steps_their_time(
    took: float, left: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, given = [0.0], []
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def run(arguments: Sequence[str], seconds: float) -> int | None:
        is_build = arguments == gpu.BUILD
        assert is_build or arguments == smoke.arguments or "benchmarks.step" in arguments
        now[0] += took if is_build else min(seconds, 405.0 if arguments == smoke.arguments else 60.0)
        given.append(round(seconds))
        return 0

    *_, smoke = gpu.first()
    stages = [gpu.Stage("compiling", gpu.BUILD), smoke, *gpu.plan()[:2]]
    if left is None:
        with pytest.raises(SystemExit, match="nothing is measured: the smoke tests failed or took too long"):
            gpu.run_all(stages, gpu.BUDGET, run, lambda _: False, lambda _: None)
        assert len(given) == 1
        return
    assert gpu.run_all(stages, gpu.BUDGET, run, lambda _: False, lambda _: None) == []
    assert given[1:] == [left, 60, 60]
    assert now[0] <= 540


def test_a_budget_that_is_over_leaves_the_rest() -> None:
    stages = gpu.plan()
    left = gpu.run_all(stages, -1.0, lambda *_: 0, lambda _: False, lambda _: None)
    assert left == [stage.title for stage in stages]


def test_what_ran_over_its_cap_has_what_is_left_behind_the_others() -> None:
    stages = [gpu.Stage("slow", ("slow",), "op", cap=5.0), gpu.Stage("next", ("next",), "op", cap=7.0)]
    given: list[tuple[str, float]] = []

    def run(arguments: Sequence[str], seconds: float) -> int | None:
        given.append((arguments[0], round(seconds)))
        return None if seconds < 10 and arguments[0] == "slow" else 0

    assert gpu.run_all(stages, 60.0, run, lambda _: False, lambda _: None) == []
    assert given == [("slow", 5), ("next", 7), ("slow", 60)]
    given.clear()
    assert gpu.run_all(stages, 5.0, run, lambda _: False, lambda _: None) == ["slow"]  # no more time than it had
    assert given == [("slow", 5), ("next", 5)]


def test_smoke_tests_are_where_they_are_looked_for() -> None:
    tests = ROOT / "tests"
    marked = [path for path in tests.rglob("test_*.py") if "pytest.mark.smoke" in path.read_text()]
    marked.remove(Path(__file__))
    assert sorted(path.relative_to(ROOT).as_posix() for path in marked) == sorted(gpu.SMOKE)
    (short,), (full,) = ([stage for stage in gpu.first(full) if stage.benchmark] for full in (False, True))
    assert short.arguments[-len(gpu.SMOKE) - 1 :] == ("gpu and smoke", *gpu.SMOKE)
    assert full.arguments[-1] == "gpu and not slow"
    assert not gpu.is_done(full, rows_of(short))


def test_every_op_and_backend_is_among_the_smoke_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu and smoke", *gpu.SMOKE]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for op in OPS:
        for backend in ("native", "triton"):
            assert f"test_every_op.py::test_is_right_as_it_is_timed[{backend}-gpu-{op}]" in listed
    assert "test_graph.py::test_a_replay_equals_train_step" in listed
    assert "test_cuda.py::test_is_right_beside_the_reference" in listed
    assert len([line for line in listed.splitlines() if "::" in line]) <= 30


def test_the_plan_is_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry-run"])
    printed = capsys.readouterr().out
    assert all(f"to do  {stage.title}" in printed for stage in gpu.plan())
    assert "the smoke tests" in printed


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
