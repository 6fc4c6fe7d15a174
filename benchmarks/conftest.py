"""Before pytest-benchmark times ops, their tests; after its own tables the rates, which it does not print."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gate
from benchmarks.measure import devices


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tests", **gate.OPTION)


def pytest_collection_finish(session: pytest.Session) -> None:
    ops = dict.fromkeys(item.module.OP for item in session.items if hasattr(item.module, "OP"))
    if not ops or session.config.option.collectonly:
        return
    with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        try:
            gate.require(gate.of_ops([*ops]), devices()[0], session.config.option.tests)
        except SystemExit as stopped:
            pytest.exit(str(stopped), returncode=1)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [_row(one) for one in session.benchmarks if "us" in one.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("microseconds and rates")
    for group, name, numbers in sorted(rows):
        terminalreporter.write_line(f"{group:<70} {name:<12} {numbers}")


def _row(benchmark: Any) -> tuple[str, str, str]:
    info = benchmark.extra_info
    rates = [
        f"{info[key]:>9} {unit}" for key, unit in (("gb_per_s", "GB/s"), ("gflop_per_s", "GFLOP/s")) if key in info
    ]
    return benchmark.group, benchmark.params["name"], f"{info['us']:>11} µs" + "".join(rates)
