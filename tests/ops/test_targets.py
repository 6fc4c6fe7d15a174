"""The fuzzing of ops itself: an error that shapes make is found whatever is drawn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from simmim_fast.testing import BudgetError
from tests.ops.targets import DRAWS, Target, fuzzed

FP32, FP64 = torch.float32, torch.float64


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


def test_triton_on_a_gpu_is_drawn_no_float64() -> None:
    seen = []

    @fuzzed(dtype=st.sampled_from([FP64, FP32]), seed=st.just(7))
    def of(target: Target, dtype: torch.dtype, seed: int) -> None:
        seen.append(dtype)

    of(target=Target("triton", "cuda"))
    assert set(seen) == {FP32}
    of(target=Target("triton"))
    assert set(seen) == {FP32, FP64}


@pytest.mark.parametrize(
    ("target", "dtypes", "takes"),
    [
        (Target("triton", "cuda"), (FP32, (FP32, FP64)), False),
        (Target("triton", "cuda"), (FP32, (FP32, FP32)), True),
        (Target("native", "cuda"), (FP64,), True),
        (Target("triton"), (FP64,), True),
    ],
)
def test_says_which_dtypes_a_target_takes(target: Target, dtypes: tuple, takes: bool) -> None:
    assert target.takes(*dtypes) == takes


@pytest.mark.float64
@pytest.mark.parametrize("target", [Target("triton", "cuda"), Target("native", "cuda")], ids=["triton-gpu", "native"])
def test_what_is_marked_is_left_out_where_triton_would_take_float64_on_a_gpu(target: Target) -> None:
    assert target.backend == "native"
