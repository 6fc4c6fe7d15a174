"""shifted_window_attention on every backend that it has."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from simmim_fast._backends import FLOAT_DTYPES
from simmim_fast.ops.shifted_window_attention import shifted_window_attention
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
from simmim_fast.testing import shifted_window_attention_inputs as make_inputs
from tests.ops import targets
from tests.ops.shifted_window_operators import operator_arguments, operators
from tests.ops.shifted_window_oracle import roll_and_partition
from tests.ops.targets import Target, fuzzed

# The CUDA C++ takes fewer sizes and has its tests in test_shifted_window_attention_cuda.py.
OPERATORS = [param for param in targets.OPERATORS if param.id in ("native", "triton-interpreted", "triton-gpu")]
TARGETS = [param for param in targets.TARGETS if param.id == "reference" or param in OPERATORS]
ON_CPU = [param for param in TARGETS if param.id in ("reference", "native")]
ON_GPU = [param for param in OPERATORS if param.id == "triton-gpu"]

on_every_backend = pytest.mark.parametrize("target", TARGETS, indirect=True)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Padded by one column, which lies beside a column of the grid after the roll. Were all padding cut off from the grid,
# its gradient would be near e^-100, a subnormal number, in which float32 has no digits to compare.
SMALL = {"shape": (2, 2, 5, 1, 5), "window_size": (2, 3), "shift": (1, 1)}
SUBSET = {"shape": (2, 3, 3, 1, 5), "window_size": (3, 4), "shift": (1, 2), "queries": 4}

reference = partial(shifted_window_attention, backend="reference")

# Each case stresses what its id says.
CASES = [
    pytest.param({"shape": (1, 4, 4, 2, 8), "window_size": (2, 2)}, id="windows"),
    pytest.param({"shape": (1, 4, 4, 2, 8), "window_size": (2, 2), "shift": (1, 1)}, id="shifted"),
    pytest.param({"shape": (1, 4, 6, 1, 8), "window_size": (4, 3), "shift": (0, 2)}, id="shifted-along-one-axis"),
    pytest.param({"shape": (1, 3, 3, 1, 8), "window_size": (3, 3), "shift": (1, 2)}, id="shifted-single-window"),
    pytest.param({"shape": (1, 5, 7, 2, 8), "window_size": (3, 4)}, id="padded"),
    pytest.param({"shape": (2, 5, 7, 2, 8), "window_size": (3, 4), "shift": (2, 1)}, id="padded-shifted"),
    pytest.param({"shape": (1, 5, 7, 1, 8), "window_size": (3, 4), "pad_value": False}, id="padded-with-zeros"),
    pytest.param({"shape": (1, 4, 4, 3, 8), "window_size": (2, 2), "shift": (1, 0), "cosine": True}, id="cosine"),
    pytest.param(
        {"shape": (1, 4, 4, 1, 8), "window_size": (2, 2), "shift": (1, 0), "cosine": True}, id="cosine-one-head"
    ),
    pytest.param(
        {"shape": (1, 5, 3, 2, 8), "window_size": (3, 2), "shift": (1, 1), "cosine": True}, id="cosine-padded"
    ),
    pytest.param({"shape": (2, 4, 3, 2, 8), "window_size": (4, 3), "queries": 5}, id="queries"),
    pytest.param(SUBSET | {"cosine": True}, id="queries-cosine-padded-shifted"),
    pytest.param({"shape": (2, 4, 3, 1, 8), "window_size": (4, 3), "queries": 0}, id="no-queries"),
    pytest.param({"shape": (9, 2, 2, 1, 8), "window_size": (2, 2)}, id="several-chunks"),
    pytest.param({"shape": (1, 2, 2, 1, 8), "window_size": (1, 1)}, id="windows-of-one-token"),
    pytest.param({"shape": (1, 8, 8, 1, 32), "window_size": (8, 8)}, id="exact-tile"),
    pytest.param({"shape": (1, 7, 7, 1, 32), "window_size": (7, 7), "shift": (3, 3)}, id="swin-window"),
    pytest.param({"shape": (2, 2, 2, 4, 96), "window_size": (2, 2), "cosine": True}, id="wide-heads"),
    pytest.param({"shape": (2, 2, 2, 1, 96), "window_size": (2, 2), "cosine": True}, id="wide-head"),
    pytest.param({"shape": (1, 2, 2, 3, 1), "window_size": (2, 2)}, id="head-of-one-channel"),
    pytest.param({"shape": (1, 12, 6, 1, 16), "window_size": (12, 6), "shift": (6, 3)}, id="blocks"),
    pytest.param({"shape": (1, 9, 7, 1, 16), "window_size": (9, 8), "cosine": True}, id="blocks-cosine-padded"),
    pytest.param({"shape": (1, 9, 8, 1, 8), "window_size": (9, 8), "queries": 70}, id="blocks-queries"),
    pytest.param({"shape": (5, 2, 3, 1, 33), "window_size": (2, 3)}, id="blocks-several-windows"),
    pytest.param({"shape": (1, 12, 11, 1, 96), "window_size": (12, 12), "shift": (6, 6)}, id="blocks-wide-head"),
    pytest.param({"shape": (0, 4, 4, 2, 8), "window_size": (2, 2)}, id="empty-batch"),
]
LARGE_CASES = [
    pytest.param({"shape": (1, 24, 24, 2, 32), "window_size": (12, 12), "shift": (6, 6), "cosine": True}, id="swinv2"),
    pytest.param({"shape": (2, 16, 16, 1, 24), "window_size": (16, 16)}, id="largest-window"),
    pytest.param({"shape": (3, 26, 23, 4, 32), "window_size": (7, 7), "shift": (3, 3)}, id="padded-swin"),
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


def on(target: Target) -> Any:
    """The public function, bound to a backend."""
    return partial(shifted_window_attention, backend=target.backend)


def forward_and_backward(target: Target, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return run(on(target), inputs, random_gradient(reference, inputs))


@pytest.mark.parametrize("case", CASES)
@on_every_backend
def test_matches_float64(target: Target, case: dict) -> None:
    assert_matches(on(target), reference, make_inputs(**case, device=target.device))


@pytest.mark.parametrize("cosine", [False, True], ids=["product", "cosine"])
@pytest.mark.parametrize("dtypes", DTYPES)
@on_every_backend
def test_matches_float64_in_every_dtype(target: Target, dtypes: tuple, cosine: bool) -> None:
    inputs = make_inputs((1, 3, 7, 2, 24), (3, 4), (2, 1), *dtypes, cosine=cosine, device=target.device)
    assert_matches(on(target), reference, inputs)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", LARGE_CASES)
@pytest.mark.parametrize("target", ON_CPU + ON_GPU, indirect=True)
def test_matches_float64_at_large_sizes(target: Target, case: dict, dtype: torch.dtype) -> None:
    inputs = make_inputs(**case, dtype=dtype, parameter_dtype=FP32, device=target.device)
    assert_matches(on(target), reference, inputs)


@on_every_backend
def test_matches_float64_in_the_largest_window(target: Target) -> None:
    inputs = make_inputs((1, 16, 15, 1, 8), (16, 16), (8, 8), BF16, FP32, device=target.device)  # padded
    assert_matches(on(target), reference, inputs)


@fuzzed(
    images=st.integers(0, 2),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    window=st.tuples(st.sampled_from([2, 3, 5]), st.sampled_from([2, 4])),
    shift=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    heads=st.integers(1, 2),
    head_size=st.sampled_from([1, 7, 8, 9, 15, 16, 17, 32, 33]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    cosine=st.booleans(),
    pad_value=st.booleans(),
    scale=st.sampled_from([None, 0.0, -0.3]),
    seed=st.integers(0, 100),
)
@on_every_backend
def test_matches_float64_at_boundary_shapes(
    target: Target,
    images: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
    head_size: int,
    dtype: torch.dtype,
    cosine: bool,
    pad_value: bool,
    scale: float | None,
    seed: int,
) -> None:
    shift = tuple(by % size for by, size in zip(shift, window, strict=True))
    shape = (images, *grid, heads, head_size)
    inputs = make_inputs(
        shape, window, shift, dtype, cosine=cosine, pad_value=pad_value, device=target.device, seed=seed
    )
    assert_matches(on(target), reference, inputs | {"scale": scale})


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({"shape": (2, 4, 6, 2, 3), "window_size": (2, 3)}, id="bias"),
        pytest.param({"shape": (2, 6, 6, 2, 3), "window_size": (3, 2), "shift": (1, 1)}, id="shift"),
        pytest.param({"shape": (2, 5, 7, 2, 3), "window_size": (3, 4)}, id="padding"),
        pytest.param({"shape": (2, 5, 4, 2, 3), "window_size": (3, 3), "shift": (2, 1)}, id="padding-and-shift"),
        pytest.param({"shape": (2, 2, 4, 1, 3), "window_size": (3, 4), "shift": (1, 2)}, id="padded-single-window"),
    ],
)
@on_every_backend
@pytest.mark.float64
def test_matches_an_oracle_that_rolls_and_partitions(target: Target, case: dict) -> None:
    inputs = make_inputs(**case, dtype=FP64, device=target.device)
    grad_out = random_gradient(reference, inputs)
    actual, expected = run(on(target), inputs, grad_out), run(roll_and_partition, inputs, grad_out)
    for name, result in expected.items():
        torch.testing.assert_close(actual[name], result, rtol=1e-11, atol=1e-11, check_stride=False)


@on_every_backend
@pytest.mark.float64
def test_divides_short_vectors_by_the_least_norm(target: Target) -> None:
    inputs = make_inputs((1, 2, 2, 1, 4), (2, 2), dtype=FP64, cosine=True, device=target.device)
    inputs["qkv"][0, 0, 0, :8] = 0
    inputs["qkv"][0, 0, 1, :8] = 1e-13
    results = forward_and_backward(target, inputs)
    assert bool((results["grad_qkv"][0, 0, :, :8] == 0).all())
    assert_matches(on(target), reference, inputs)


@pytest.mark.parametrize(
    "target", [one for one in TARGETS if one.id in ("reference", "triton-interpreted")], indirect=True
)
def test_passes_the_gradient_of_the_least_norm(target: Target) -> None:
    """Only shorter vectors have none; 1 / |x| is 1e12 here, too."""
    inputs = make_inputs((1, 2, 2, 1, 4), (2, 2), dtype=FP64, cosine=True, device=target.device)
    inputs["qkv"][0, 0, 0, :8] = 0
    inputs["qkv"][0, 0, 0, [0, 4]] = 1e-12
    results, expected = forward_and_backward(target, inputs), run(reference, inputs, random_gradient(reference, inputs))
    across = [1, 2, 3, 5, 6, 7]  # along the vector it has a kink
    assert bool((expected["grad_qkv"][0, 0, 0, across] != 0).all())
    torch.testing.assert_close(results["grad_qkv"][0, 0, 0, across], expected["grad_qkv"][0, 0, 0, across])


@on_every_backend
def test_clamps_the_logit_scale(target: Target) -> None:
    inputs = make_inputs((1, 2, 4, 3, 4), (2, 2), cosine=True, device=target.device)
    inputs["logit_scale"] = torch.tensor([math.log(99.0), 4.7, 9.0], device=target.device)
    results = forward_and_backward(target, inputs)
    assert results["grad_logit_scale"][0] != 0
    assert bool((results["grad_logit_scale"][1:] == 0).all())
    clamped = inputs | {"logit_scale": inputs["logit_scale"].clamp(max=math.log(100.0))}
    assert_equal(on(target)(**inputs), on(target)(**clamped), "out")


@on_every_backend
def test_keeps_large_logits_finite(target: Target) -> None:
    inputs = make_inputs(**SMALL, device=target.device)
    inputs["qkv"] *= 100
    assert_matches(on(target), reference, inputs, wanted=["qkv"])
    # The weights are 0 and 1, so these gradients are below 1e-100, where float32 has no digits to compare.
    results = forward_and_backward(target, inputs)
    for name in ("grad_bias_table", "grad_pad_value"):
        torch.testing.assert_close(results[name], torch.zeros_like(results[name]))


@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_pads_nothing_where_the_window_divides(target: Target) -> None:
    inputs = make_inputs((1, 2, 4, 1, 4), (2, 2), device=target.device)
    results = forward_and_backward(target, inputs)
    padded = forward_and_backward(target, inputs | {"pad_value": torch.ones(12, device=target.device)})
    assert bool((padded.pop("grad_pad_value") == 0).all())
    for name, result in padded.items():
        assert_equal(result, results[name], name)


@on_every_backend
def test_takes_one_size_for_both_axes(target: Target) -> None:
    inputs = make_inputs((1, 4, 6, 1, 4), (2, 2), (1, 1), device=target.device)
    assert_equal(on(target)(**inputs | {"window_size": 2, "shift": 1}), on(target)(**inputs), "out")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@on_every_backend
def test_takes_any_strides(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(**SUBSET, dtype=dtype, cosine=True, device=target.device)
    inputs |= {name: permuted(inputs[name]) for name in ("qkv", "bias_table", "queries")}
    inputs |= {name: inputs[name].repeat_interleave(2)[::2] for name in ("logit_scale", "pad_value")}
    assert_matches(on(target), reference, inputs)
    if target.backend != "reference":
        assert all(result.is_contiguous() for result in forward_and_backward(target, inputs).values())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64], ids=str)
@on_every_backend
def test_takes_any_integer_queries(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(**SUBSET, device=target.device)
    expected = on(target)(**inputs)
    assert_equal(on(target)(**inputs | {"queries": inputs["queries"].to(dtype)}), expected, "out")


@pytest.mark.parametrize("token", [-1, 9])
@pytest.mark.parametrize("target", ON_CPU, indirect=True)
def test_refuses_tokens_that_do_not_exist(target: Target, token: int) -> None:
    inputs = make_inputs(**SUBSET, device=target.device)
    inputs["queries"][1, 2] = token
    with pytest.raises((RuntimeError, ValueError), match=str(token)):
        on(target)(**inputs)


@pytest.mark.parametrize("token", [-1, 9, 2**31 - 1])
@pytest.mark.parametrize("target", OPERATORS[1:], indirect=True)
def test_answers_tokens_that_do_not_exist_by_nan(target: Target, token: int) -> None:
    inputs = make_inputs(**SUBSET, device=target.device)
    grad_out = random_gradient(reference, inputs)
    inputs["queries"][1, 2] = token
    with Guards() as guards:
        results = run(on(target), {name: guards.place(value) for name, value in inputs.items()}, grad_out)
    guards.check()
    assert bool(results["out"][1, 2].isnan().all())
    grad_out[1, 2] = 0
    inputs["queries"][1, 2] = next(token for token in range(9) if token not in inputs["queries"][1])
    expected = run(reference, inputs, grad_out)
    for name in ("grad_qkv", "grad_bias_table", "grad_pad_value"):
        torch.testing.assert_close(results[name], expected[name])


@pytest.mark.parametrize("case", [SMALL, SUBSET], ids=["all", "queries"])
@on_every_backend
@pytest.mark.float64
def test_gradcheck(target: Target, case: dict) -> None:
    case = case | {"shape": (1, *case["shape"][1:3], 1, 2)}
    inputs = make_inputs(**case, dtype=FP64, cosine=True, device=target.device)
    names = ("qkv", "bias_table", "logit_scale", "pad_value")
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*leaves: Tensor) -> Tensor:
        return on(target)(**inputs | dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=target.emulated)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_opcheck(target: Target, dtype: torch.dtype) -> None:
    forward, backward = operators(target)
    for case in ({**SMALL, "cosine": True}, {**SUBSET, "pad_value": False}):
        arguments, backward_arguments = operator_arguments(**case, dtype=dtype, device=target.device)
        torch.library.opcheck(forward, (permuted(arguments[0]), *arguments[1:]))
        torch.library.opcheck(backward, backward_arguments)
        torch.library.opcheck(backward, (*backward_arguments[:-3], False, False, False))
        leaves = [
            arg.requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in arguments
        ]
        torch.library.opcheck(forward, tuple(leaves))


class Module(torch.nn.Module):
    """Calls the public function on a backend."""

    def __init__(self, backend: str, **constants: Any) -> None:
        super().__init__()
        self.backend, self.constants = backend, constants

    def forward(self, qkv: Tensor, bias_table: Tensor) -> Tensor:
        return shifted_window_attention(qkv, bias_table, **self.constants, backend=self.backend)


@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_exports(target: Target) -> None:
    inputs = make_inputs(**SMALL, pad_value=False, device=target.device)
    arguments = (inputs.pop("qkv"), inputs.pop("bias_table"))
    module = Module(target.backend, **inputs)
    program = torch.export.export(module, arguments, dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    assert_equal(program.module()(*arguments), module(*arguments), "out")


@on_every_backend
def test_repeats_bit_for_bit(target: Target) -> None:
    inputs = make_inputs(**SMALL, dtype=BF16, parameter_dtype=FP32, cosine=True, device=target.device)
    assert_repeats(partial(forward_and_backward, target, inputs), times=3 if target.emulated else 50)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@on_every_backend
def test_ignores_the_number_of_threads(target: Target, dtype: torch.dtype) -> None:
    shape = (1, 2, 4, 1, 8) if target.emulated else (5, 5, 4, 3, 8)
    inputs = make_inputs(shape, (3, 2), (1, 1), dtype, FP32, cosine=True, device=target.device)
    assert_ignores_threads(partial(forward_and_backward, target, inputs))


@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_autocast_changes_nothing(target: Target) -> None:
    inputs = make_inputs(**SMALL, device=target.device)
    expected = forward_and_backward(target, inputs)
    with torch.autocast(target.device, BF16):
        actual = run(on(target), inputs, random_gradient(on(target), inputs))
    for name, result in actual.items():
        assert_equal(result, expected[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("target", ON_GPU, indirect=True)
def test_more_than_int32_elements(target: Target) -> None:
    last = make_inputs((1, 48, 48, 4, 32), (6, 6), (3, 3), BF16, FP32, device="cuda")
    qkv = torch.zeros(2428, 48, 48, 384, dtype=BF16, device="cuda")
    qkv[-1] = last["qkv"][0]
    assert qkv.numel() > 2**31
    grad_out = torch.ones(1, 1, 1, 1, dtype=BF16, device="cuda").expand(*qkv.shape[:3], 128)
    expected = run(on(target), last, grad_out[-1:], ["qkv"])
    for name, result in run(on(target), last | {"qkv": qkv}, grad_out, ["qkv"]).items():
        assert_equal(result[-1:], expected[name], name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": "no tensor"}, TypeError, "qkv must be a tensor; got str"),
        ({"qkv": torch.ones(2, 2, 4, 15).int()}, TypeError, "qkv must be float64, .* got torch.int32"),
        ({"qkv": torch.ones(2, 8, 15)}, ValueError, r"qkv must have 4 dimensions .* got shape \(2, 8, 15\)"),
        ({"num_heads": 0}, ValueError, "num_heads must be 1 or more; got 0"),
        ({"num_heads": 4}, ValueError, "3 x num_heads x head size channels; got 15 for 4 heads"),
        ({"window_size": 0}, ValueError, "window_size must be 1 or more; got 0"),
        ({"window_size": (2, 3, 4)}, ValueError, r"window_size must be an integer or a pair of them; got \(2, 3, 4\)"),
        ({"window_size": 6.0}, TypeError, "window_size must be an integer; got 6.0"),
        ({"window_size": True}, TypeError, "window_size must be an integer; got True"),
        ({"num_heads": None}, TypeError, "num_heads must be an integer; got None"),
        ({"scale": "x"}, TypeError, "scale must be a number; got 'x'"),
        ({"shift": (0, -1)}, ValueError, "shift must be 0 or more; got -1"),
        ({"shift": (2, 0)}, ValueError, r"shift must be below window_size = \(2, 3\); got \(2, 0\)"),
        ({"bias_table": torch.ones(15, 1).int()}, TypeError, "bias_table must be float64"),
        ({"bias_table": torch.ones(1, 15)}, ValueError, r"bias_table .* = \(15, 1\); got \(1, 15\)"),
        ({"logit_scale": torch.ones(1, 1, 1)}, ValueError, r"logit_scale must have shape \(heads\) = \(1,\)"),
        ({"pad_value": torch.ones(5)}, ValueError, r"pad_value must have shape \(3C\) = \(15,\)"),
        ({"pad_value": torch.ones(15, device="meta")}, ValueError, "pad_value must be on the device of qkv, cpu"),
        ({"queries": torch.ones(2, 1).int()}, ValueError, r"queries need a grid of one window, at most \(2, 3\)"),
        ({"backend": "tritn"}, ValueError, "got 'tritn' .did you mean 'triton'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shifted_window_attention(**make_inputs(**SMALL) | change)


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        ([0, 1], TypeError, "queries must be a tensor; got list"),
        (torch.ones(2, 3), TypeError, "queries must be an integer tensor; got torch.float32"),
        (torch.ones(3, 4).int(), ValueError, r"queries must have shape \(B, K\) with B = 2; got \(3, 4\)"),
        (torch.ones(2, 10).int(), ValueError, "queries must list at most H W = 9 tokens; got K = 10"),
    ],
    ids=["list", "float", "batch", "too-many"],
)
def test_refuses_queries(queries: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        shifted_window_attention(**make_inputs(**SUBSET) | {"queries": queries})


def test_native_refuses_a_token_that_is_named_twice() -> None:
    inputs = make_inputs((2, 2, 3, 1, 5), (2, 3), queries=3)
    shifted_window_attention(**inputs, backend="native")
    inputs["queries"][1, 2] = inputs["queries"][1, 0]
    with pytest.raises(RuntimeError, match=r"queries: expected distinct tokens, got \d twice in an image"):
        shifted_window_attention(**inputs, backend="native")
