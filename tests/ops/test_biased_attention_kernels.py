"""The kernels of biased_attention: sizes, cost, what the Triton compiler makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simmim_fast.ops import bytes_loaded, bytes_moved, flops, register_flop_formulas
from simmim_fast.ops._devices import MULTIPROCESSORS
from simmim_fast.ops.biased_attention import kernels, op
from simmim_fast.ops.biased_attention.op import size_refusal
from simmim_fast.testing import offline
from tests.ops.biased_attention_operators import operator_arguments, operators
from tests.ops.targets import Target

BF16, FP32 = torch.bfloat16, torch.float32
VIT_BASE = (197, 12, 64)
README = Path(kernels.__file__).with_name("README.md").read_text()


def test_says_which_sizes_it_takes() -> None:
    vit = {"tokens": 197, "num_heads": 12}
    assert size_refusal("native", **vit, channels=12_000) is None
    assert size_refusal("triton", **vit, channels=12 * 128) is None
    assert size_refusal("triton", **vit, channels=12 * 129) == "it takes heads of at most 128 channels; got 129"
    assert size_refusal("triton", tokens=46_340, channels=8, num_heads=1) is None
    assert "fewer than 2^31; got 46341 tokens" in size_refusal("triton", tokens=46_341, channels=8, num_heads=1)


@pytest.mark.parametrize("queries", [None, 120], ids=["all-rows", "queries"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_flop_formulas(backend: str, queries: int | None) -> None:
    forward, backward = operators(Target(backend))
    arguments, backward_arguments = operator_arguments((2, *VIT_BASE), BF16, FP32, "meta", queries=queries)
    one_product = 2 * 2 * 12 * 64 * 197 * (queries or 197)
    register_flop_formulas()
    for operator, args, products in ((forward, arguments, 2), (backward, backward_arguments, 5)):
        with FlopCounterMode(display=False) as counter:
            operator(*args)
        assert counter.get_total_flops() == products * one_product


@pytest.mark.parametrize("images", [8, 16, 64])
def test_programs_fill_a_gpu(images: int) -> None:
    """Of the forward; those of the backward, each with a sum of the bias, do not grow with the batch for ever."""
    arguments, backward_arguments = operator_arguments((images, *VIT_BASE), BF16, FP32, "meta")
    (forward,) = offline.launches(kernels.forward, *arguments)
    (backward,) = offline.launches(kernels.backward, *backward_arguments)
    assert prod(forward.grid) >= MULTIPROCESSORS
    assert prod(backward.grid) <= MULTIPROCESSORS
    sums, bias = backward.arguments["partial_ptr"], arguments[1]
    assert sums.shape == (prod(backward.grid) // 12, *bias.shape)
    assert 2 * sums.shape[0] <= images, "as many sums as logits"
    assert f"| {images} | {prod(forward.grid)} | {prod(backward.grid)} |" in README


README_ROWS = [
    pytest.param(dtype, queries, id=f"{label}-{queries}")
    for label, dtype, queries in (("bf16", BF16, None), ("bf16", BF16, 120), ("fp32", FP32, None))
]


@pytest.mark.parametrize(("dtype", "queries"), README_ROWS)
def test_readme_states_the_bytes(dtype: torch.dtype, queries: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "HOPPER_IMAGES", 2)
    label = f"{'bf16' if dtype == BF16 else 'fp32'} | {'197' if queries is None else f'{queries} queries'}"
    calls = operator_arguments((64, *VIT_BASE), dtype, FP32, "meta", queries=queries)
    for direction, operator, args in zip(("forward", "backward"), operators(Target("triton")), calls, strict=True):
        tensors = [value for value in (*args, *operator(*args)) if isinstance(value, Tensor)]
        least = sum(tensor.nbytes for tensor in tensors)
        if queries is not None:  # of q, only those rows
            least -= (1 - queries / 197) * calls[0][0].nbytes / 3
        read, written = bytes_moved(operator, *args)
        loaded = bytes_loaded(operator, *args) + written
        numbers = " | ".join(f"{nbytes / 1e6:.0f}" for nbytes in (read + written, loaded, least))
        numbers = f"{flops(operator, *args) / 1e9:.1f} | {numbers}"
        row = f"| {label} | {direction} | {numbers} |"
        assert row in README, row


# Products of both directions: q k', p v; and q k', p' dO, dO v', ds' q, ds k.
PRODUCTS = (2, 5)
IN_MAKE_TEST = {(*VIT_BASE, None, BF16, 90), (*VIT_BASE, None, FP32, 80)}
EVERYWHERE = [(*VIT_BASE, None), (197, 12, 96, None)]
ONCE_A_DTYPE = [(*VIT_BASE, 120), (577, 12, 64, None), (197, 12, 8, None)]


def compiled_cases() -> Iterator[Any]:
    cases = [*product(EVERYWHERE, (BF16, FP32), offline.CAPABILITIES)]
    cases += [(shape, *rest) for shape in ONCE_A_DTYPE for rest in ((BF16, 90), (FP32, 80))]
    for case in cases:
        tokens, _, head_size, queries = case[0]
        label = f"{tokens}-tokens-head-{head_size}{'-queries' if queries else ''}"
        marks = [] if (*case[0], *case[1:]) in IN_MAKE_TEST else [pytest.mark.slow]
        yield pytest.param(*case, id=f"{label}-{str(case[1]).removeprefix('torch.')}-{case[2]}", marks=marks)


@pytest.mark.compiles(len(PRODUCTS))
@pytest.mark.parametrize(("shape", "dtype", "capability"), list(compiled_cases()))
def test_triton_kernels_compile(
    shape: tuple, dtype: torch.dtype, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "capability_of", lambda device, known: capability)
    *sizes, queries = shape
    arguments, backward_arguments = operator_arguments((64, *sizes), dtype, FP32, "meta", queries=queries)
    launches = offline.launches(kernels.forward, *arguments) + offline.launches(kernels.backward, *backward_arguments)
    for launch, products in zip(launches, PRODUCTS, strict=True):
        compiled = offline.compile_launch(launch, capability, tmp_path)
        offline.assert_frugal(compiled, capability)
        offline.assert_products(compiled, dtype, products * launch.arguments.get("IMAGES", 1))
        if sizes[2] >= 64:  # with 8 channels a thread has less than 16 bytes to load
            wide = compiled.wide_bytes("LDG") + compiled.wide_bytes("LDGSTS")
            rows = 1 if launch is launches[0] else 3  # q; q, dO and out
            keys, row_bytes = min(launch.arguments["TILE_K"], sizes[0]), sizes[2] * dtype.itemsize
            tile = rows * min(launch.arguments["TILE_R"], sizes[0])
            if keys * row_bytes >= 16 * launch.threads:  # of 16 keys a thread has less
                tile += 2 * keys
            assert wide >= tile * row_bytes / launch.threads
