"""The CUDA C++ kernels of shifted_window_attention, on the CPU and on a GPU: up to 64 tokens, 32 channels a head."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from simmim_fast.ops.shifted_window_attention import shifted_window_attention
from simmim_fast.ops.shifted_window_attention.op import size_refusal
from simmim_fast.testing import (
    Guards,
    assert_equal,
    assert_matches,
    assert_repeats,
    permuted,
    random_gradient,
    run,
)
from simmim_fast.testing import shifted_window_attention_inputs as make_inputs
from tests.ops import targets
from tests.ops.library_kernels import library_kernels, on_architectures
from tests.ops.shifted_window_operators import operator_arguments, operators
from tests.ops.targets import Target, fuzzed

TARGETS = [param for param in targets.OPERATORS if param.id in ("cuda-on-host", "native-gpu")]
ON_GPU = [param for param in TARGETS if param.id == "native-gpu"]

on_cuda = pytest.mark.parametrize("target", TARGETS, indirect=True)
on_gpu = pytest.mark.parametrize("target", ON_GPU, indirect=True)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Padded, and the padding is not cut off from the grid by the roll.
SMALL = {"shape": (2, 2, 5, 1, 32), "window_size": (2, 3), "shift": (1, 1)}
SUBSET = {"shape": (2, 3, 3, 1, 32), "window_size": (3, 4), "shift": (1, 2), "queries": 4}

reference = partial(shifted_window_attention, backend="reference")

# Each case stresses what its id says.
CASES = [
    pytest.param({"shape": (1, 4, 4, 2, 32), "window_size": (2, 2), "shift": (1, 1)}, id="shifted"),
    pytest.param({"shape": (1, 4, 6, 1, 32), "window_size": (4, 3), "shift": (0, 2)}, id="shifted-along-one-axis"),
    pytest.param({"shape": (1, 3, 3, 1, 32), "window_size": (3, 3), "shift": (1, 2)}, id="shifted-single-window"),
    pytest.param({"shape": (2, 5, 7, 2, 32), "window_size": (3, 4), "shift": (2, 1)}, id="padded-shifted"),
    pytest.param({"shape": (1, 5, 7, 1, 32), "window_size": (3, 4), "pad_value": False}, id="padded-with-zeros"),
    pytest.param({"shape": (1, 4, 4, 3, 32), "window_size": (2, 2), "shift": (1, 0), "cosine": True}, id="cosine"),
    pytest.param(
        {"shape": (1, 5, 3, 2, 32), "window_size": (3, 2), "shift": (1, 1), "cosine": True}, id="cosine-padded"
    ),
    pytest.param({"shape": (2, 4, 3, 2, 32), "window_size": (4, 3), "queries": 5}, id="queries"),
    pytest.param(SUBSET | {"cosine": True}, id="queries-cosine-padded-shifted"),
    pytest.param(
        {"shape": (1, 6, 6, 1, 32), "window_size": (6, 6), "shift": (3, 3), "queries": 22}, id="two-warps-of-3"
    ),
    pytest.param({"shape": (2, 4, 3, 1, 32), "window_size": (4, 3), "queries": 0}, id="no-queries"),
    pytest.param({"shape": (9, 2, 2, 1, 32), "window_size": (2, 2)}, id="several-blocks"),
    pytest.param({"shape": (1, 2, 2, 1, 32), "window_size": (1, 1)}, id="windows-of-one-token"),
    pytest.param({"shape": (1, 4, 8, 1, 32), "window_size": (4, 8), "shift": (2, 4), "cosine": True}, id="two-warps"),
    pytest.param({"shape": (1, 6, 6, 1, 32), "window_size": (6, 6), "shift": (3, 3)}, id="three-warps"),
    pytest.param({"shape": (1, 7, 7, 1, 32), "window_size": (7, 7), "shift": (3, 3)}, id="four-warps"),
    pytest.param({"shape": (1, 8, 8, 1, 32), "window_size": (8, 8), "cosine": True}, id="exact-tiles"),
    pytest.param({"shape": (0, 4, 4, 2, 32), "window_size": (2, 2)}, id="empty-batch"),
]
DTYPES = [
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((FP16, FP16), id="fp16"),
    pytest.param((BF16, FP32), id="bf16-beside-fp32"),
    pytest.param((FP16, FP32), id="fp16-beside-fp32"),
    pytest.param((FP32, BF16), id="fp32-beside-bf16"),
]


def on(target: Target) -> Any:
    """The public function, bound to a backend."""
    return partial(shifted_window_attention, backend=target.backend)


def forward_and_backward(target: Target, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return run(on(target), inputs, random_gradient(reference, inputs))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES)
@on_cuda
def test_matches_float64(target: Target, case: dict, dtypes: tuple) -> None:
    assert_matches(
        on(target), reference, make_inputs(**case, dtype=dtypes[0], parameter_dtype=dtypes[1], device=target.device)
    )


@on_cuda
def test_matches_float64_where_blocks_take_several_windows(target: Target) -> None:
    """The forward gives each window a block of its own as long as there are fewer than 1024 for one head."""
    inputs = make_inputs((2, 32, 33, 1, 32), (1, 2), (0, 1), BF16, FP32, device=target.device)
    assert_matches(on(target), reference, inputs)


@fuzzed(
    images=st.integers(0, 2),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    window=st.tuples(st.sampled_from([2, 3, 5]), st.sampled_from([2, 4])),
    shift=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    heads=st.integers(1, 2),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    cosine=st.booleans(),
    pad_value=st.booleans(),
    scale=st.sampled_from([None, 0.0, -0.3]),
    seed=st.integers(0, 100),
)
@on_cuda
def test_matches_float64_at_boundary_shapes(
    target: Target,
    images: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
    dtype: torch.dtype,
    cosine: bool,
    pad_value: bool,
    scale: float | None,
    seed: int,
) -> None:
    shift = tuple(by % size for by, size in zip(shift, window, strict=True))
    shape = (images, *grid, heads, 32)
    inputs = make_inputs(
        shape, window, shift, dtype, cosine=cosine, pad_value=pad_value, device=target.device, seed=seed
    )
    assert_matches(on(target), reference, inputs | {"scale": scale})


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@on_cuda
def test_gives_short_vectors_no_gradient(target: Target, dtype: torch.dtype) -> None:
    """The inverse of their norm is beyond float16. The key is beside others, whose gradient is the reference's."""
    inputs = make_inputs((1, 2, 2, 1, 32), (2, 2), dtype=dtype, cosine=True, device=target.device)
    inputs["qkv"][0, 0, 0, :64] = 0
    inputs["qkv"][0, 0, 1, :64] *= 2.0**-12
    results = forward_and_backward(target, inputs)
    assert bool((results["grad_qkv"][0, 0, 0, :64] == 0).all())
    assert_matches(on(target), reference, inputs)


@on_cuda
def test_clamps_the_logit_scale(target: Target) -> None:
    inputs = make_inputs((1, 2, 4, 3, 32), (2, 2), cosine=True, device=target.device)
    inputs["logit_scale"] = torch.tensor([math.log(99.0), 4.7, 9.0], device=target.device)
    results = forward_and_backward(target, inputs)
    assert results["grad_logit_scale"][0] != 0
    assert bool((results["grad_logit_scale"][1:] == 0).all())
    clamped = inputs | {"logit_scale": inputs["logit_scale"].clamp(max=math.log(100.0))}
    assert_equal(on(target)(**inputs), on(target)(**clamped), "out")


@on_cuda
def test_keeps_large_logits_finite(target: Target) -> None:
    inputs = make_inputs(**SMALL, device=target.device)
    inputs["qkv"] *= 100
    assert_matches(on(target), reference, inputs, wanted=["qkv", "pad_value"])


@on_cuda
def test_pads_nothing_where_the_window_divides(target: Target) -> None:
    inputs = make_inputs((1, 2, 4, 1, 32), (2, 2), device=target.device)
    results = forward_and_backward(target, inputs)
    padded = forward_and_backward(target, inputs | {"pad_value": torch.ones(96, device=target.device)})
    assert bool((padded.pop("grad_pad_value") == 0).all())
    for name, result in padded.items():
        assert_equal(result, results[name], name)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@on_cuda
def test_takes_any_strides_and_alignment(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(**SUBSET, dtype=dtype, cosine=True, device=target.device)
    expected = forward_and_backward(target, inputs)
    qkv = inputs["qkv"]
    unaligned = torch.empty(qkv.numel() + 1, dtype=dtype, device=target.device)[1:].view(qkv.shape).copy_(qkv)
    strided = {name: permuted(inputs[name]) for name in ("qkv", "bias_table", "queries")}
    strided |= {name: inputs[name].repeat_interleave(2)[::2] for name in ("logit_scale", "pad_value")}
    for others in ({"qkv": unaligned}, strided):
        for name, result in forward_and_backward(target, inputs | others).items():
            assert result.is_contiguous()
            assert_equal(result, expected[name], name)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("token", [-1, 9, 2**31 - 1])
@on_cuda
def test_answers_tokens_that_do_not_exist_by_nan(target: Target, token: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(**SUBSET, dtype=dtype, device=target.device)
    grad_out = random_gradient(reference, inputs)
    inputs["queries"][1, 2] = token
    with Guards() as guards:
        results = run(on(target), {name: guards.place(value) for name, value in inputs.items()}, grad_out)
    guards.check()
    assert bool(results["out"][1, 2].isnan().all())
    assert int(results["out"].isnan().sum()) == 32
    grad_out[1, 2] = 0
    inputs["queries"][1, 2] = next(token for token in range(9) if token not in inputs["queries"][1])
    expected = run(on(target), inputs, grad_out)
    for name in ("grad_qkv", "grad_bias_table", "grad_pad_value"):
        assert_equal(results[name], expected[name], name)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@on_cuda
def test_opcheck(target: Target, dtype: torch.dtype) -> None:
    forward, backward = operators(target)
    for case in ({**SMALL, "cosine": True}, {**SUBSET, "pad_value": False}):
        arguments, backward_arguments = operator_arguments(**case, dtype=dtype, device=target.device)
        torch.library.opcheck(forward, (permuted(arguments[0]), *arguments[1:]))
        torch.library.opcheck(backward, backward_arguments)
        torch.library.opcheck(backward, (*backward_arguments[:-3], False, False, False))


@on_cuda
def test_repeats_bit_for_bit(target: Target) -> None:
    """Blocks run upwards and downwards in turn on the CPU, so that sums whose order is left to chance would differ."""
    inputs = make_inputs((9, 2, 5, 2, 32), (2, 3), (1, 1), BF16, FP32, cosine=True, device=target.device)
    assert_repeats(partial(forward_and_backward, target, inputs), times=3 if target.emulated else 250)


@pytest.mark.gpu
@on_gpu
def test_more_than_int32_elements(target: Target) -> None:
    last = make_inputs((1, 48, 48, 4, 32), (6, 6), (3, 3), BF16, FP32, device="cuda")
    qkv = torch.zeros(2428, 48, 48, 384, dtype=BF16, device="cuda")
    qkv[-1] = last["qkv"][0]
    assert qkv.numel() > 2**31
    grad_out = torch.ones(1, 1, 1, 1, dtype=BF16, device="cuda").expand(*qkv.shape[:3], 128)
    actual = run(on(target), last | {"qkv": qkv}, grad_out, ["qkv"])
    expected = run(on(target), last, grad_out[-1:], ["qkv"])
    for name, result in actual.items():
        assert_equal(result[-1:], expected[name], name)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"shape": (1, 5, 13, 1, 32), "window_size": (5, 13)}, "at most 64 tokens .* got 5 x 13"),
        ({"shape": (1, 2, 2, 1, 16), "window_size": (2, 2)}, "heads of 32 channels, got .* 48 channels for 1 heads"),
        ({"shape": (1, 2, 2, 1, 32), "window_size": (2, 2), "dtype": FP64}, "expected float32, .* got float64"),
    ],
    ids=["tokens", "head-size", "float64"],
)
@pytest.mark.parametrize("target", TARGETS[:1], indirect=True)
def test_the_launcher_refuses(target: Target, case: dict, message: str) -> None:
    for operator, arguments in zip(operators(target), operator_arguments(**case), strict=True):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


def test_auto_passes_over_what_the_kernels_do_not_take() -> None:
    refused = partial(size_refusal, "native")
    size = {"device_type": "cuda", "tokens": 64, "head_size": 32, "dtype": BF16}
    limits = "it takes windows of at most 64 tokens and heads of 32 channels; got"
    assert refused(**size) is None
    assert refused(**size | {"tokens": 65}) == f"{limits} 65 and 32"
    assert refused(**size | {"head_size": 24}) == f"{limits} 64 and 24"
    assert refused(**size | {"dtype": FP64}) == "it has no CUDA kernel for torch.float64"
    assert refused(device_type="cpu", tokens=65, head_size=24, dtype=FP64) is None


ACCESSES = {"fwd": (3, 1), "bwd": (4, 3)}  # matrices of rows that come in and go out, by direction


@on_architectures
def test_rows_move_16_bytes_at_a_time(architecture: str) -> None:
    """And halves are multiplied by tensor cores, float32 by none."""
    kernels = library_kernels("shifted_window_attention_(fwd|bwd)_kernel", architecture)
    assert len(kernels) == 2 * 3 * 4, "two directions, three dtypes, one to four warps"
    for name, body in kernels.items():
        incoming, outgoing = ACCESSES["fwd" if "_fwd_" in name else "bwd"]
        pieces = 4 if "kernelIf" in name else 2  # of a thread, of each matrix
        assert len(re.findall(r"LDGSTS\.E\S*\.128", body)) == pieces * incoming
        assert len(re.findall(r"STG\.E\S*\.128", body)) == pieces * outgoing
        assert len(re.findall(r"\b(LDL|STL)\b", body)) == 0, "registers are spilled to local memory"
        products = re.findall(r"\bHMMA\S*", body)
        assert bool(products) == ("kernelIf" not in name)
        assert all("TF32" not in product and ("BF16" in product) == ("BFloat16" in name) for product in products)
