"""Few kernels are compiled offline: 30 in `make test`, 300 with the slow tests. Each test is held to its own mark."""

from __future__ import annotations

import pytest

MOST_FAST, MOST = 30, 300


def compilations(items: list[pytest.Item], *, slow: bool) -> int:
    marks = [item.get_closest_marker("compiles") for item in items if bool(item.get_closest_marker("slow")) == slow]
    return sum(mark.args[0] for mark in marks if mark is not None)


def test_few_kernels_are_compiled(request: pytest.FixtureRequest) -> None:
    assert compilations(request.session.items, slow=False) <= MOST_FAST


@pytest.mark.slow
def test_few_kernels_are_compiled_by_slow_tests(request: pytest.FixtureRequest) -> None:
    assert compilations(request.session.items, slow=True) <= MOST - MOST_FAST
