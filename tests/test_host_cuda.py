"""csrc/testing/host_cuda.h does what a GPU does, and finds what a GPU finds by chance."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from tests import host_cuda

THREADS = 128

pytestmark = pytest.mark.skipif(host_cuda.WHY_NOT is not None, reason=f"not run: {host_cuda.WHY_NOT}")


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    library = ctypes.CDLL(str(host_cuda.build(Path(__file__).with_name("host_cuda_primitives.cu"))))
    library.run_deadlock.restype = library.run_partial_mask.restype = ctypes.c_char_p
    return library


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def test_shuffles_and_shared_memory_add_up(kernels):
    values = np.random.default_rng(0).integers(0, 1000, size=(5, THREADS), dtype=np.int32)
    sums = np.zeros(5, dtype=np.int32)
    kernels.run_block_sums(pointer(values), pointer(sums), 5)
    np.testing.assert_array_equal(sums, values.sum(axis=1))


def test_lanes_see_each_other(kernels):
    out = np.zeros((THREADS, 4), dtype=np.int32)
    kernels.run_lanes(pointer(out))
    lane = np.arange(THREADS) % 32
    np.testing.assert_array_equal(out[:, 0], np.maximum(lane - 1, 0))
    np.testing.assert_array_equal(out[:, 1], lane ^ 1)
    np.testing.assert_array_equal(out[:, 2], 5)
    assert out[0, 3] == THREADS


@pytest.mark.parametrize("direction", [1, -1], ids=["upwards", "downwards"])
def test_shows_a_forgotten_barrier(kernels, direction):
    neighbours = np.roll(np.arange(THREADS), -direction)
    right, wrong = np.zeros((2, 2, THREADS), dtype=np.int32)
    kernels.run_read_neighbour(pointer(right), direction, True)
    np.testing.assert_array_equal(right, [neighbours, neighbours])
    kernels.run_read_neighbour(pointer(wrong), direction, False)
    wrong_in_block = [int((block != neighbours).sum()) for block in wrong]
    assert sorted(wrong_in_block) == [1, THREADS - 1]


def test_reports_a_deadlock(kernels):
    assert b"deadlock" in kernels.run_deadlock()


def test_refuses_a_partial_mask(kernels):
    assert b"full mask" in kernels.run_partial_mask()


def test_barriers_do_not_wait_for_threads_that_returned(kernels):
    out = np.zeros(THREADS, dtype=np.int32)
    kernels.run_early_exit(pointer(out))
    np.testing.assert_array_equal(out, np.arange(THREADS) >= THREADS // 4)
