"""Few kernels are compiled offline: 30 in `make test`, 300 with the slow tests. Each test is held to its own mark."""

from __future__ import annotations

import pytest

from tests.ops.conftest import COMPILATIONS

MOST_FAST, MOST = 30, 300


def test_few_kernels_are_compiled(request: pytest.FixtureRequest) -> None:
    """In all that was collected, whether it is run or not."""
    counts = request.config.stash[COMPILATIONS]
    assert counts[False] <= MOST_FAST
    assert sum(counts.values()) <= MOST
