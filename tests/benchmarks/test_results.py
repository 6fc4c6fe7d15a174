"""Rows of measurements: what they hold, and that they are whole lines."""

from __future__ import annotations

import functools
import subprocess
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.results import ROOT, conditions, read_rows, write_row


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    first, second = (write_row(path, {"benchmark": "none", "value": value}) for value in (1, 2.5))
    assert read_rows(path) == [first, second]
    assert path.read_text().count("\n") == 2
    assert first["value"] == 1


def test_a_row_says_under_which_conditions_it_was_made(tmp_path: Path) -> None:
    row = write_row(tmp_path / "rows.jsonl", {"benchmark": "none"})
    assert row["conditions"].keys() == conditions().keys()
    assert row["conditions"]["load"] >= 0
    assert row["conditions"]["versions"]["torch"] == torch.__version__
    assert row["conditions"]["versions"].keys() >= {"transformers", "timm", "xformers"}
    assert row["conditions"]["threads"] == torch.get_num_threads()
    assert row["conditions"]["cpu"]
    if (ROOT / ".git").exists():
        assert len(row["conditions"]["commit"]) == 40
        assert row["conditions"]["dirty"] in (True, False)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        pytest.param(
            "1980, 2619, [N/A]\n", [{"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_limit_w": None}], id="N/A"
        ),
        pytest.param(FileNotFoundError("nvidia-smi"), [], id="no nvidia-smi"),
        pytest.param(subprocess.CalledProcessError(9, "nvidia-smi"), [], id="no driver"),
    ],
)
def test_clocks_that_are_not_told_cost_no_row(
    told: str | Exception, expected: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> types.SimpleNamespace:
        assert command[0] == "nvidia-smi"
        if isinstance(told, Exception):
            raise told
        return types.SimpleNamespace(stdout=told)

    conditions()  # what never changes is read before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(results.subprocess, "run", run)
    assert write_row(tmp_path / "rows.jsonl", {"benchmark": "none"})["conditions"]["clocks"] == expected


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """git in a repository of its own, which has one commit and is taken for the checkout."""
    monkeypatch.setattr(results, "_git", functools.partial(results._git, folder=tmp_path))

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.invalid", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    for name in (
        "simmim_fast/code.py",
        "simmim_fast/_measured.py",
        "benchmarks/results/a.jsonl",
        "docs/a.svg",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    yield git
    results._fixed_conditions.cache_clear()


def test_rows_are_of_the_commit_that_was_there_at_the_start(git: Callable[..., str], tmp_path: Path) -> None:
    results.begin()
    first = git("rev-parse", "HEAD")
    (tmp_path / "simmim_fast" / "code.py").write_text("2")
    edited = write_row(tmp_path / "rows.jsonl", {"benchmark": "none"})["conditions"]
    git("commit", "-qam", "two")
    committed = write_row(tmp_path / "rows.jsonl", {"benchmark": "none"})["conditions"]
    for row in (edited, committed):
        assert (row["commit"], row["dirty"]) == (first, False)
    results.begin()
    assert conditions()["commit"] == git("rev-parse", "HEAD") != first


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ("simmim_fast/_measured.py", True),
        ("benchmarks/results/a.jsonl", True),
        ("docs/a.svg", True),
        ("README.md", True),
        ("simmim_fast/code.py", False),
    ],
)
def test_rows_and_what_is_made_of_them_are_no_code(
    changed: str, same: bool, git: Callable[..., str], tmp_path: Path
) -> None:
    commit = git("rev-parse", "HEAD")
    (tmp_path / changed).write_text("2")
    assert results.is_same_code(commit) is same  # in the tree
    results.begin()
    assert conditions()["dirty"] is not same
    git("commit", "-qam", "two")
    assert results.is_same_code(commit) is same  # committed
    assert results.is_same_code(git("rev-parse", "HEAD"))
    assert not results.is_same_code("0" * 40)


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize(
    ("row", "error"),
    [
        pytest.param({"time": "now"}, "must leave time to write_row", id="time"),
        pytest.param({"value": float("nan")}, "JSON", id="nan"),
    ],
)
def test_a_row_that_is_refused_leaves_no_file(tmp_path: Path, row: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        write_row(tmp_path / "rows.jsonl", row)
    assert not (tmp_path / "rows.jsonl").exists()
