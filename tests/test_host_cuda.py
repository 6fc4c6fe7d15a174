"""csrc/testing/host_cuda.h does what a GPU does, and finds what a GPU finds by chance."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import host_cuda

THREADS = 128

pytestmark = pytest.mark.skipif(host_cuda.WHY_NOT is not None, reason=f"not run: {host_cuda.WHY_NOT}")


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    library = ctypes.CDLL(str(host_cuda.build(Path(__file__).with_name("host_cuda_primitives.cu"))))
    library.run_deadlock.restype = library.run_partial_mask.restype = ctypes.c_char_p
    return library


def pointer(array: np.ndarray | torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr())


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers, whose products and sums every dtype and order of summation gives exactly."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def padded(matrix: torch.Tensor) -> torch.Tensor:
    """With NaN behind every row, 16 bytes of it."""
    return torch.nn.functional.pad(matrix, (0, 16 // matrix.element_size()), value=float("nan")).contiguous()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_multiplies(kernels, dtype):
    a, b, product = integers(16, 16, dtype=dtype), integers(16, 8, dtype=dtype), torch.zeros(16, 8)
    kernels.run_mma(pointer(a), pointer(b), pointer(product), dtype == torch.bfloat16)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_its_pairs(kernels, transposed):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    pairs = np.zeros((32, 4, 2), dtype=np.uint16)  # of each lane, by matrix
    kernels.run_load_matrices(pointer(matrices), pointer(pairs), transposed)
    expected = matrices.transpose(0, 2, 1) if transposed else matrices
    np.testing.assert_array_equal(pairs, expected.reshape(4, 32, 2).transpose(1, 0, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("a_by_rows", [True, False], ids=["a-by-rows", "a-by-columns"])
@pytest.mark.parametrize("b_by_rows", [True, False], ids=["b-by-rows", "b-by-columns"])
def test_a_warp_multiplies_matrices_in_either_order(kernels, dtype, a_by_rows, b_by_rows):
    a, b, product = integers(16, 32, dtype=dtype), integers(32, 16, dtype=dtype), torch.zeros(16, 16)
    stored_a, stored_b = padded(a if a_by_rows else a.T), padded(b if b_by_rows else b.T)
    kernels.run_multiply(
        pointer(stored_a), pointer(stored_b), pointer(product), dtype == torch.bfloat16, a_by_rows, b_by_rows
    )
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=0, atol=0)


def test_shows_copies_that_are_not_waited_for(kernels):
    values = np.random.default_rng(0).integers(1, 255, size=(THREADS, 16), dtype=np.uint8)
    right, wrong = np.zeros((2, THREADS, 16), dtype=np.uint8)
    kernels.run_copy(pointer(values), pointer(right), True)
    np.testing.assert_array_equal(right, np.where(np.arange(THREADS)[:, None] % 2 == 0, values, 0))
    kernels.run_copy(pointer(values), pointer(wrong), False)
    assert (wrong == 0xFF).all()
