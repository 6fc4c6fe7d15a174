"""Every runner explains itself."""

from __future__ import annotations

import importlib
import re

import pytest

from benchmarks import gate
from benchmarks.results import ROOT

RUNNERS = ("step", "ops", "parity", "loader", "traffic", "resources", "report", "compare", "gpu")
MEASURING = ("step", "ops", "parity", "loader", "traffic", "resources", "gpu")


@pytest.mark.parametrize("runner", RUNNERS)
def test_help_says_what_it_does_and_what_every_option_is(runner: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{runner}")
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m benchmarks.{runner}" in text
    assert module.__doc__.splitlines()[0].split()[0] in text
    for option in re.findall(r"^  (--[a-z-]+)", text, flags=re.MULTILINE):
        described = re.search(rf"^  {option}\b[^\n]*?(?:  |\n {{10,}})\S", text, flags=re.MULTILINE)
        assert described, f"{option} has no help"


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_page_names_it(runner: str) -> None:
    assert f"python -m benchmarks.{runner}" in (ROOT / "docs" / "benchmarks.md").read_text("utf-8")


@pytest.mark.parametrize("runner", MEASURING)
def test_conditions_are_noted_before_anything_else(runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        """The runner has come so far."""

    def begin() -> None:
        raise Begun

    module = importlib.import_module(f"benchmarks.{runner}")
    monkeypatch.setattr(module, "begin", begin)
    monkeypatch.setattr(gate, "require", None)  # it is not called yet
    with pytest.raises(Begun):
        module.main(["--dry-run"] if runner == "gpu" else [])
