"""After pytest-benchmark's own tables: the rates, which it does not print."""

from __future__ import annotations

from typing import Any

import pytest


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
