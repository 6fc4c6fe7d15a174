"""The fuzzing of ops itself: an error that shapes make is found whatever is drawn."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from simmim_fast.testing import BudgetError
from tests.ops.targets import DRAWS, fuzzed


def test_an_example_fails_that_fails_with_every_seed() -> None:
    seeds = []

    @fuzzed(size=st.just(3), seed=st.just(7))
    def wrong(size: int, seed: int) -> None:
        seeds.append(seed)
        if size == 3:
            raise BudgetError("wrong")

    with pytest.raises(BudgetError):
        wrong()
    assert set(seeds) == {7, 1007, 2007}


def test_an_example_passes_that_passes_with_one_seed() -> None:
    @fuzzed(seed=st.just(7))
    def unlucky(seed: int) -> None:
        if seed < 1000 * (DRAWS - 1):
            raise BudgetError("unlucky")

    unlucky()


def test_other_errors_are_not_tried_again() -> None:
    seeds = []

    @fuzzed(seed=st.just(7))
    def broken(seed: int) -> None:
        seeds.append(seed)
        raise AssertionError("written behind a buffer")

    with pytest.raises(AssertionError, match="written behind a buffer"):
        broken()
    assert set(seeds) == {7}
