"""biased_attention on every backend that it has."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from simmim_fast._backends import FLOAT_DTYPES
from simmim_fast.ops import bytes_loaded, bytes_moved
from simmim_fast.ops.biased_attention import biased_attention
from simmim_fast.ops.biased_attention.reference import biased_attention as reference
from simmim_fast.testing import (
    Guards,
    assert_equal,
    assert_ignores_threads,
    assert_matches,
    assert_repeats,
    permuted,
    random_gradient,
    run,
)
from simmim_fast.testing import biased_attention_inputs as make_inputs
from tests.ops import targets
from tests.ops.accesses import Accesses
from tests.ops.biased_attention_operators import operator_arguments, operators
from tests.ops.targets import Target, fuzzed

# There is no CUDA C++ for this op.
NATIVE, TRITON, TRITON_ON_GPU = (
    [param for param in targets.OPERATORS if param.id == name]
    for name in ("native", "triton-interpreted", "triton-gpu")
)
OPERATORS = NATIVE + TRITON + TRITON_ON_GPU
on_operators = pytest.mark.parametrize("target", OPERATORS, indirect=True)
on_every_backend = pytest.mark.parametrize("target", [targets.TARGETS[0], *OPERATORS], indirect=True)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALL = (2, 7, 2, 12)  # B, N, heads, D
SUBSET = 4

# Each shape stresses what its id says.
SHAPES = [
    pytest.param((2, 7, 2, 12), id="less-than-a-tile"),
    pytest.param((1, 64, 1, 16), id="exact-tiles"),
    pytest.param((2, 65, 1, 24), id="class-token"),
    pytest.param((5, 2, 1, 8), id="several-chunks"),
    pytest.param((1, 33, 1, 96), id="wide-head"),
    pytest.param((1, 1, 1, 1), id="single-token"),
    pytest.param((0, 7, 2, 12), id="empty-batch"),
    pytest.param((2, 0, 2, 12), id="no-tokens"),
]
DTYPES = [
    pytest.param((FP64, FP64), id="fp64"),
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((FP16, FP16), id="fp16"),
    pytest.param((BF16, FP32), id="bf16-beside-fp32"),
    pytest.param((FP16, FP32), id="fp16-beside-fp32"),
    pytest.param((FP32, BF16), id="fp32-beside-bf16"),
]
VARIANTS = [
    pytest.param({}, id="all-rows"),
    pytest.param({"queries": SUBSET}, id="queries"),
    pytest.param({"bias": False}, id="no-bias"),
    pytest.param({"bias": False, "queries": SUBSET}, id="queries-no-bias"),
]


def on(target: Target) -> Any:
    """The public function, bound to a backend."""
    return partial(biased_attention, backend=target.backend)


def forward_and_backward(target: Target, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return run(on(target), inputs, random_gradient(reference, inputs))


@on_every_backend
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(target: Target, shape: tuple, variant: dict) -> None:
    variant = variant | {"queries": min(SUBSET, shape[1])} if "queries" in variant else variant
    assert_matches(on(target), reference, make_inputs(shape, device=target.device, **variant))


@on_every_backend
@pytest.mark.parametrize("queries", [None, SUBSET], ids=["all-rows", "queries"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_matches_float64_in_every_dtype(target: Target, dtypes: tuple, queries: int | None) -> None:
    assert_matches(on(target), reference, make_inputs((2, 35, 2, 24), *dtypes, queries=queries, device=target.device))


@pytest.mark.parametrize("queries", [None, 120], ids=["all-rows", "queries"])
@pytest.mark.parametrize("tokens", [197, 577])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("target", NATIVE + TRITON_ON_GPU, indirect=True)
def test_matches_float64_at_many_tokens(target: Target, dtype: torch.dtype, tokens: int, queries: int | None) -> None:
    inputs = make_inputs((3, tokens, 2, 64), dtype, FP32, queries=queries, device=target.device)
    assert_matches(on(target), reference, inputs)


@pytest.mark.parametrize("queries", [None, 40], ids=["all-rows", "queries"])
@pytest.mark.parametrize(
    "shape",
    [(3, 197, 1, 16), (3, 260, 1, 8), (2, 130, 1, 96), (1, 577, 1, 16)],
    ids=["one-tile", "tiles", "wide", "vit-384"],
)
@pytest.mark.parametrize("target", TRITON, indirect=True)
def test_matches_float64_by_large_tiles(target: Target, shape: tuple, queries: int | None) -> None:
    """Those of half types: all keys in one tile, or a sum of q's gradient over several."""
    assert_matches(on(target), reference, make_inputs(shape, BF16, FP32, queries=queries, device=target.device))


@on_every_backend
@fuzzed(
    images=st.integers(0, 3),
    tokens=st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65]),
    heads=st.integers(1, 3),
    head_size=st.sampled_from([1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 96]),
    share=st.sampled_from([0.0, 0.5, 1.0, None]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    bias=st.booleans(),
    scale=st.sampled_from([None, 0.0, -0.3]),
    seed=st.integers(0, 100),
)
def test_matches_float64_at_boundary_shapes(
    target: Target,
    images: int,
    tokens: int,
    heads: int,
    head_size: int,
    share: float | None,
    dtype: torch.dtype,
    bias: bool,
    scale: float | None,
    seed: int,
) -> None:
    queries = None if share is None else int(share * tokens)
    shape = (images, tokens, heads, head_size)
    inputs = make_inputs(shape, dtype, bias=bias, queries=queries, device=target.device, seed=seed)
    assert_matches(on(target), reference, inputs | {"scale": scale})


@on_every_backend
def test_masks_by_an_infinite_bias(target: Target) -> None:
    inputs = make_inputs((2, 65, 2, 12), device=target.device)
    inputs["bias"][:, :, :40] = float("-inf")
    results = forward_and_backward(target, inputs)
    rest = inputs | {"qkv": inputs["qkv"][:, 40:], "bias": inputs["bias"][:, 40:, 40:]}
    torch.testing.assert_close(results["out"][:, 40:], reference(**rest))
    assert all(result.isfinite().all() for result in results.values())
    assert bool((results["grad_bias"][:, :, :40] == 0).all())


@on_every_backend
def test_keeps_large_logits_finite(target: Target) -> None:
    inputs = make_inputs((2, 33, 2, 12), device=target.device)
    inputs["qkv"] *= 100
    results = forward_and_backward(target, inputs)
    torch.testing.assert_close(results["out"], reference(**inputs))
    assert all(result.isfinite().all() for result in results.values())


@on_every_backend
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_takes_any_strides(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, dtype, queries=SUBSET, device=target.device)
    inputs |= {name: permuted(inputs[name]) for name in ("qkv", "bias", "queries")}
    assert_matches(on(target), reference, inputs)
    if target.backend != "reference":
        assert all(result.is_contiguous() for result in forward_and_backward(target, inputs).values())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64], ids=str)
def test_takes_any_integer_queries(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, queries=SUBSET, device=target.device)
    expected = on(target)(**inputs)
    assert_equal(on(target)(**inputs | {"queries": inputs["queries"].to(dtype)}), expected, "out")


@pytest.mark.parametrize("token", [-1, 7, 2**32 + 1])
@pytest.mark.parametrize("target", [targets.TARGETS[0], *NATIVE], indirect=True)
def test_refuses_tokens_that_do_not_exist(target: Target, token: int) -> None:
    inputs = make_inputs(SMALL, queries=SUBSET, device=target.device)
    inputs["queries"] = inputs["queries"].long()
    inputs["queries"][1, 2] = token
    with pytest.raises((RuntimeError, ValueError), match=str(min(token, 2**31 - 1))):
        on(target)(**inputs)


@pytest.mark.parametrize("token", [-1, 7, 2**31 - 1])
@pytest.mark.parametrize("target", TRITON + TRITON_ON_GPU, indirect=True)
def test_answers_tokens_that_do_not_exist_by_nan(target: Target, token: int) -> None:
    inputs = make_inputs(SMALL, queries=SUBSET, device=target.device)
    grad_out = random_gradient(reference, inputs)
    inputs["queries"][1, 2] = token
    with Guards() as guards:
        results = run(on(target), {name: guards.place(value) for name, value in inputs.items()}, grad_out)
    guards.check()
    assert bool(results["out"][1, 2].isnan().all())
    grad_out[1, 2] = 0
    inputs["queries"][1, 2] = next(token for token in range(SMALL[1]) if token not in inputs["queries"][1])
    expected = run(reference, inputs, grad_out)
    for name in ("grad_qkv", "grad_bias"):
        torch.testing.assert_close(results[name], expected[name])


@on_every_backend
@pytest.mark.parametrize("queries", [None, 2], ids=["all-rows", "queries"])
@pytest.mark.float64
def test_gradcheck(target: Target, queries: int | None) -> None:
    inputs = make_inputs((2, 3, 1, 2), FP64, queries=queries, device=target.device)
    leaves = [inputs.pop(name).requires_grad_() for name in ("qkv", "bias")]
    assert torch.autograd.gradcheck(lambda qkv, bias: on(target)(qkv, bias, **inputs), leaves)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@on_operators
def test_opcheck(target: Target, dtype: torch.dtype) -> None:
    forward, backward = operators(target)
    for variant in ({}, {"bias": False, "queries": 2}):
        arguments, backward_arguments = operator_arguments((2, 3, 2, 4), dtype, dtype, target.device, **variant)
        torch.library.opcheck(backward, backward_arguments)
        torch.library.opcheck(forward, (permuted(arguments[0]), *arguments[1:]))
        leaves = [
            arg.requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in arguments
        ]
        torch.library.opcheck(forward, tuple(leaves))


@on_every_backend
def test_repeats_bit_for_bit(target: Target) -> None:
    inputs = make_inputs((2, 33, 1, 8), BF16, FP32, device=target.device)
    assert_repeats(partial(forward_and_backward, target, inputs), times=4 if target.emulated else 50)


@pytest.mark.parametrize("target", NATIVE, indirect=True)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_ignores_the_number_of_threads(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs((3, 33, 5, 8), dtype, FP32, device=target.device)
    assert_ignores_threads(partial(forward_and_backward, target, inputs))


@on_operators
def test_autocast_changes_nothing(target: Target) -> None:
    inputs = make_inputs(SMALL, FP32, device=target.device)
    expected = forward_and_backward(target, inputs)
    with torch.autocast(target.device, BF16):
        actual = run(on(target), inputs, random_gradient(on(target), inputs))
    for name, result in actual.items():
        assert_equal(result, expected[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("target", TRITON_ON_GPU, indirect=True)
def test_more_than_int32_elements(target: Target) -> None:
    images, tokens, heads, head_size = 4736, 197, 12, 64
    last = make_inputs((1, tokens, heads, head_size), BF16, FP32, device="cuda")
    qkv = torch.zeros(images, tokens, 3 * heads * head_size, dtype=BF16, device="cuda")
    qkv[-1] = last["qkv"][0]
    assert qkv.numel() > 2**31
    grad_out = torch.ones(1, 1, 1, dtype=BF16, device="cuda").expand(images, tokens, heads * head_size)
    expected = run(on(target), last, grad_out[-1:], ["qkv"])
    for name, result in run(on(target), last | {"qkv": qkv}, grad_out, ["qkv"]).items():
        assert_equal(result[-1:], expected[name], name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": "no tensor"}, TypeError, "qkv must be a tensor; got str"),
        ({"qkv": torch.ones(2, 7, 72).int()}, TypeError, "qkv must be float64, .* got torch.int32"),
        ({"qkv": torch.ones(2, 7, 3, 24)}, ValueError, r"qkv must have 3 dimensions .* got shape \(2, 7, 3, 24\)"),
        ({"num_heads": 0}, ValueError, "num_heads must be 1 or more; got 0"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an integer; got 2.0"),
        ({"scale": "x"}, TypeError, "scale must be a number; got 'x'"),
        ({"num_heads": 5}, ValueError, "3 x num_heads x head size channels; got 72 for 5 heads"),
        ({"bias": torch.ones(2, 7, 7).int()}, TypeError, "bias must be float64"),
        ({"bias": torch.ones(1, 7, 7)}, ValueError, r"bias must have shape \(heads, N, N\) = \(2, 7, 7\)"),
        ({"bias": torch.ones(2, 7, 7, device="meta")}, ValueError, "bias must be on the device of qkv, cpu; got meta"),
        ({"queries": [0, 1]}, TypeError, "queries must be a tensor; got list"),
        ({"queries": torch.ones(2, 3)}, TypeError, "queries must be an integer tensor; got torch.float32"),
        ({"queries": torch.ones(3, 4).int()}, ValueError, r"queries must have shape \(B, K\) with B = 2; got \(3, 4\)"),
        ({"queries": torch.ones(2, 8).int()}, ValueError, "queries must list at most N = 7 tokens; got K = 8"),
        ({"backend": "tritn"}, ValueError, "got 'tritn' .did you mean 'triton'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        biased_attention(**make_inputs(SMALL) | change)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["several-tiles-of-keys", "one-tile-of-keys"])
@pytest.mark.parametrize("target", TRITON, indirect=True)
def test_registers_every_load_and_store(
    target: Target, dtype: torch.dtype, variant: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = variant | {"queries": 40} if "queries" in variant else variant
    arguments, backward_arguments = operator_arguments((5, 70, 2, 8), dtype, FP32, "cpu", **variant)
    forward, backward = operators(target)
    qkv, bias, queries = arguments[:3]
    if queries is not None:  # images 0, 3 and 1, 4 are chunks, which name every token between them
        queries.copy_((torch.arange(40) + 40 * (torch.arange(5)[:, None] // 3)) % 70)
    accesses = Accesses(monkeypatch)
    forward(*arguments)
    assert bytes_moved(forward, *arguments) == (accesses.moved(), accesses.written())
    assert bytes_loaded(forward, *arguments) == accesses.loaded()

    accesses.clear()
    backward(*backward_arguments)
    partials = 0 if bias is None else 3 * bias.nbytes  # for two images each; PyTorch adds them up
    written_by_pytorch = 0 if bias is None else bias.nbytes
    if queries is not None:
        written_by_pytorch += partials + qkv.nbytes // 3  # zeros
    moved = accesses.moved() + partials, accesses.written() + written_by_pytorch
    assert bytes_moved(backward, *backward_arguments) == moved
    assert bytes_loaded(backward, *backward_arguments) == accesses.loaded() + partials
