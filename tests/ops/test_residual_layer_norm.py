"""residual_layer_norm on every backend that it has."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from simmim_fast.ops import residual_layer_norm
from simmim_fast.ops.residual_layer_norm.reference import residual_layer_norm as reference
from simmim_fast.testing import (
    assert_equal,
    assert_ignores_threads,
    assert_matches,
    assert_repeats,
    differentiable,
    permuted,
    random_gradient,
    run,
)
from simmim_fast.testing import residual_layer_norm_inputs as make_inputs
from tests.ops import targets
from tests.ops.residual_layer_norm_operators import operator_arguments, operators
from tests.ops.targets import Target, fuzzed

# There is no CUDA C++ for this op.
OPERATORS = [param for param in targets.OPERATORS if param.id in ("native", "triton-interpreted", "triton-gpu")]
TARGETS = [param for param in targets.TARGETS if param.id == "reference" or param in OPERATORS]
ON_GPU = [param for param in OPERATORS if param.id == "triton-gpu"]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALL = (2, 3, 5, 20)

# Each shape stresses what its id says.
SHAPES = [
    pytest.param(SMALL, id="odd-grid"),
    pytest.param((2, 4, 128), id="exact-tiles"),
    pytest.param((3, 50, 7), id="several-chunks"),
    pytest.param((2, 3, 1029), id="many-channels"),
    pytest.param((3, 2), id="two-channels"),
    pytest.param((0, 3, 20), id="empty-batch"),
    pytest.param((2, 0, 20), id="empty-grid"),
]
FORMS = {
    "scaled": {},
    "biased": {"delta_bias": True},
    "plain": {"gamma": False, "keep": False},
    "dropped": {"gamma": False},
    "first": {"delta": False},
    "delta": {"norm": "delta"},
    "delta-biased": {"norm": "delta", "delta_bias": True},
    "delta-kept": {"norm": "delta", "keep": False},
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
three_forms = pytest.mark.parametrize("form", [FORMS[name] for name in ("biased", "first", "delta-biased")])
unbiased_forms = pytest.mark.parametrize("form", [FORMS[name] for name in ("scaled", "first", "delta")])
# Of x, delta and the parameters.
DTYPES = [
    pytest.param((FP64, FP64, FP64), id="fp64"),
    pytest.param((FP32, FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16, BF16), id="bf16"),
    pytest.param((FP16, FP16, FP16), id="fp16"),
    pytest.param((FP32, BF16, FP32), id="bf16-beside-fp32"),
    pytest.param((FP32, FP16, FP32), id="fp16-beside-fp32"),
    pytest.param((BF16, BF16, FP32), id="bf16-stream"),
    pytest.param((BF16, FP32, FP32), id="fp32-beside-bf16"),
    pytest.param((BF16, FP16, BF16), id="fp16-beside-bf16"),
    pytest.param((FP64, BF16, FP32), id="bf16-beside-fp64"),
]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, target: Target) -> Target:
    return target


def on(target: Target) -> Any:
    """The public function, bound to a backend."""
    return partial(residual_layer_norm, backend=target.backend)


def assert_same_but_for_contraction(actual: Tensor, expected: Tensor) -> None:
    """Compilers contract the products and sums of one formula differently in different places."""
    eps = 4 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=eps, atol=eps)


def forward_and_backward(target: Target, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return run(on(target), inputs, random_gradient(reference, inputs))


@every_form
@pytest.mark.parametrize("dtypes", DTYPES)
def test_matches_float64(target: Target, dtypes: tuple, form: dict) -> None:
    assert_matches(on(target), reference, make_inputs(SMALL, *dtypes, **form, device=target.device))


@unbiased_forms
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (FP32, BF16, FP32)], ids=["fp32", "bf16-beside-fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_at_shapes(target: Target, shape: tuple, dtypes: tuple, form: dict) -> None:
    assert_matches(on(target), reference, make_inputs(shape, *dtypes, **form, device=target.device))


@fuzzed(
    samples=st.sampled_from([0, 1, 2, 5]),
    tokens=st.sampled_from([1, 2, 15, 17, 33]),
    channels=st.sampled_from([3, 7, 8, 15, 16, 17, 127, 128, 129, 257]),  # of 2 the norm is ±1, its gradient rounding
    dtypes=st.sampled_from([param.values[0] for param in DTYPES]),
    form=st.sampled_from(list(FORMS.values())),
    seed=st.integers(0, 100),
)
def test_matches_float64_at_boundary_shapes(
    target: Target, samples: int, tokens: int, channels: int, dtypes: tuple, form: dict, seed: int
) -> None:
    inputs = make_inputs((samples, tokens, channels), *dtypes, **form, device=target.device, seed=seed)
    assert_matches(on(target), reference, inputs)


@pytest.mark.parametrize("form", [FORMS["plain"], FORMS["delta-kept"]], ids=["output", "delta"])
def test_matches_float64_far_from_zero(target: Target, form: dict) -> None:
    """Where a variance as the difference of two means would have no digit left."""
    inputs = make_inputs((4, 9, 40), **form, device=target.device)
    name = "delta" if form.get("norm") == "delta" else "x"
    inputs[name] = inputs[name] + 1000
    assert_matches(on(target), reference, inputs)


def test_single_row_and_single_channel(target: Target) -> None:
    for shape in ((20,), (3, 1)):
        inputs = make_inputs(shape, gamma=False, keep=False, device=target.device)
        assert_matches(on(target), reference, inputs, wanted=["delta", "bias"])


@three_forms
def test_takes_any_strides(target: Target, form: dict) -> None:
    inputs = make_inputs(SMALL, FP32, BF16, FP32, **form, device=target.device)
    for name in ("x", "delta"):
        inputs[name] = None if inputs[name] is None else permuted(inputs[name])
    inputs["weight"] = inputs["weight"].repeat_interleave(2)[::2]
    assert_matches(on(target), reference, inputs)
    if target.backend != "reference":
        results = forward_and_backward(target, inputs)
        if inputs["delta"] is None or inputs["norm"] == "delta":
            results.pop("grad_x"), results.pop("out_0", None)  # handed on as they are
        assert all(result.is_contiguous() for result in results.values())


@three_forms
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_takes_expanded_gradients(target: Target, form: dict) -> None:
    inputs = make_inputs(SMALL, **form, device=target.device)
    one = torch.ones(1, device=target.device).expand(SMALL)
    grad_out = one if form.get("norm") == "delta" else (one, one)
    dense = one.contiguous() if form.get("norm") == "delta" else (one.contiguous(), one.contiguous())
    expected = run(on(target), inputs, dense)
    for name, result in run(on(target), inputs, grad_out).items():
        assert_equal(result, expected[name], name)


@pytest.mark.parametrize("index", [0, 1], ids=["sum", "norm"])
def test_takes_the_gradient_of_one_output_alone(target: Target, index: int) -> None:
    inputs = make_inputs(SMALL, FP32, BF16, FP32, device=target.device)
    wanted = ["x", "delta", "gamma"] if index == 0 else differentiable(inputs)

    def one(**arguments: Any) -> Tensor:
        return on(target)(**arguments)[index]

    def expected(**arguments: Any) -> Tensor:
        return reference(**arguments)[index]

    assert_matches(one, expected, inputs, wanted=wanted)


@three_forms
@pytest.mark.float64
def test_gradcheck(target: Target, form: dict) -> None:
    inputs = make_inputs((2, 2, 3), FP64, **form, device=target.device)
    names = differentiable(inputs)
    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: on(target)(**inputs | dict(zip(names, values, strict=True))), leaves
    )


@pytest.mark.parametrize("dtypes", [param for param in DTYPES if param.id in ("fp64", "fp32", "bf16-beside-fp32")])
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_opcheck(target: Target, dtypes: tuple) -> None:
    forward, backward = operators(target)
    for form in (FORMS[name] for name in ("biased", "first", "delta-biased")):
        inputs = make_inputs((2, 3, 4), *dtypes, **form, device=target.device)
        _, backward_arguments = operator_arguments(inputs, forward)
        torch.library.opcheck(backward, backward_arguments)
        if inputs["norm"] == "output":
            adds_delta = inputs["delta"] is not None
            _, backward_arguments = operator_arguments(inputs, forward, recompute=True, adds_delta=adds_delta)
            torch.library.opcheck(backward, backward_arguments)
        for name in differentiable(inputs):
            inputs[name].requires_grad_()
        arguments, _ = operator_arguments(inputs, forward)
        torch.library.opcheck(forward, arguments)


def several_chunks(target: Target, form: dict) -> dict[str, Any]:
    shape = (2, 70, 33) if target.emulated else (3, 300, 33)
    return make_inputs(shape, FP32, BF16, FP32, **form, device=target.device)


@three_forms
def test_repeats_bit_for_bit(target: Target, form: dict) -> None:
    inputs = several_chunks(target, form)
    assert_repeats(partial(forward_and_backward, target, inputs), times=5 if target.emulated else 50)


@three_forms
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_ignores_the_number_of_threads(target: Target, form: dict) -> None:
    assert_ignores_threads(partial(forward_and_backward, target, several_chunks(target, form)))


@pytest.mark.parametrize("form", [FORMS[name] for name in ("biased", "plain", "dropped", "first")])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_the_backward_yields_the_norm_again(target: Target, dtypes: tuple, form: dict) -> None:
    forward, backward = operators(target)
    inputs = make_inputs((2, 30, 20), *dtypes, **form, device=target.device)
    arguments, plain = operator_arguments(inputs, forward)
    *expected, nothing = backward(*plain)
    assert nothing.shape == (0,)
    *gradients, normed = backward(*operator_arguments(inputs, forward, recompute=True)[1])
    assert_same_but_for_contraction(normed, forward(*arguments)[1])
    for gradient, alone in zip(gradients, expected, strict=True):
        assert_equal(gradient, alone, "gradient")


@pytest.mark.parametrize("form", [FORMS[name] for name in ("biased", "plain", "dropped")])
@pytest.mark.parametrize(
    "dtypes", [param for param in DTYPES if param.id not in ("fp32-beside-bf16", "fp16-beside-bf16")]
)
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_the_backward_adds_delta_as_the_forward_does(target: Target, dtypes: tuple, form: dict) -> None:
    """x must have the stream's dtype."""
    forward, backward = operators(target)
    inputs = make_inputs((2, 30, 20), *dtypes, **form, device=target.device)
    expected = backward(*operator_arguments(inputs, forward, recompute=True)[1])
    actual = backward(*operator_arguments(inputs, forward, recompute=True, adds_delta=True)[1])
    for result, other in zip(actual, expected, strict=True):
        assert_same_but_for_contraction(result, other)


def test_without_a_delta_the_stream_is_x_itself(target: Target) -> None:
    inputs = make_inputs(SMALL, delta=False, device=target.device)
    y, _ = on(target)(**inputs)
    assert y is inputs["x"]


@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_keeps_no_norm_for_the_backward(target: Target) -> None:
    inputs = make_inputs(SMALL, FP32, BF16, FP32, gamma=False, device=target.device)
    for name in differentiable(inputs):
        inputs[name].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda one: one):
        y, _ = on(target)(**inputs)
    known = {tensor.data_ptr() for tensor in (y, inputs["weight"], inputs["keep"])}
    others = [tensor for tensor in saved if tensor.data_ptr() not in known]
    assert [tuple(tensor.shape) for tensor in others] == [SMALL[:-1]] * 2, "mean and 1 / deviation"


def test_dropped_samples_pass_through(target: Target) -> None:
    inputs = make_inputs(SMALL, FP32, BF16, FP32, gamma=False, device=target.device)
    inputs["keep"] = torch.tensor([0.0, 2.0], device=target.device)
    results = forward_and_backward(target, inputs)
    assert_equal(results["out_0"][0], inputs["x"][0], "y")
    assert not bool(results["grad_delta"][0].any())
    assert bool(results["grad_delta"][1].any())


@three_forms
@pytest.mark.parametrize("dtypes", [(FP32, BF16, FP32), (FP32, FP32, FP32), (FP64, FP64, FP64)], ids=str)
def test_autocast_takes_the_norm_to_its_dtype(target: Target, dtypes: tuple, form: dict) -> None:
    inputs = make_inputs(SMALL, *dtypes, **form, device=target.device)
    expected = run(on(target), inputs)
    with torch.autocast(target.device, BF16):
        actual = run(on(target), inputs)
    if "out_1" in expected and dtypes[0] == FP32:
        assert actual["out_1"].dtype == BF16
        expected["out_1"] = expected["out_1"].to(BF16)
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], msg=name)


@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (FP32, BF16, FP32)], ids=str)
@three_forms
def test_differentiates_under_autocast(target: Target, dtypes: tuple, form: dict) -> None:
    with torch.autocast(target.device, BF16):
        assert_matches(on(target), reference, make_inputs(SMALL, *dtypes, **form, device=target.device))


@pytest.mark.gpu
@pytest.mark.parametrize("target", ON_GPU, indirect=True)
def test_more_than_int32_elements(target: Target) -> None:
    rows = 2**21 + 1
    inputs = make_inputs((3, 1024), BF16, gamma=False, keep=False, device="cuda")
    one = torch.ones(1, 1, dtype=BF16, device="cuda")
    expected = run(on(target), inputs, (one.expand(3, 1024),) * 2, ["x", "delta"])
    for name in ("x", "delta"):
        inputs[name] = torch.cat([inputs[name][:1].expand(rows - 2, -1), inputs[name][1:]])
    for name, result in run(on(target), inputs, (one.expand(rows, 1024),) * 2, ["x", "delta"]).items():
        assert_equal(result[-2:], expected[name][1:], name)
        assert_equal(result[:1], expected[name][:1], name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "no tensor"}, TypeError, "x must be a tensor; got str"),
        ({"x": torch.ones(SMALL, dtype=torch.int32)}, TypeError, "x must be float64, .* got torch.int32"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x must have shape \(\.\.\., C\) with C at least 1; got \(3, 0\)"),
        ({"delta": torch.ones(2, 15, 20)}, ValueError, r"delta must have shape of x = \(2, 3, 5, 20\)"),
        ({"delta": None}, ValueError, "gamma must be None where delta is None"),
        ({"delta": None, "gamma": None}, ValueError, "keep must be None where delta is None"),
        ({"weight": torch.ones(1, 20)}, ValueError, r"weight must have shape \(C\) = \(20,\); got \(1, 20\)"),
        ({"eps": "a"}, TypeError, "eps must be a number; got 'a'"),
        ({"bias": torch.ones(20).int()}, TypeError, "bias must be float64"),
        ({"gamma": torch.ones(19)}, ValueError, r"gamma must have shape \(C\) = \(20,\); got \(19,\)"),
        ({"delta_bias": torch.ones(21)}, ValueError, r"delta_bias must have shape \(C\) = \(20,\); got \(21,\)"),
        (
            {"delta": None, "gamma": None, "keep": None, "delta_bias": torch.ones(20)},
            ValueError,
            "delta_bias must be None where delta is None",
        ),
        ({"keep": torch.ones(2, 1, 1, 1)}, ValueError, r"keep must have shape \(B\) = \(2,\); got \(2, 1, 1, 1\)"),
        ({"keep": torch.ones(2).bool()}, TypeError, "keep must be float64, .* got torch.bool"),
        ({"keep": torch.ones(2, requires_grad=True)}, ValueError, "keep must not require a gradient"),
        ({"x": torch.ones(20), "delta": torch.ones(20)}, ValueError, "keep must be None where x has no batch axis"),
        ({"norm": "input"}, ValueError, "norm must be 'output' or 'delta'; got 'input'"),
        ({"norm": "delta"}, ValueError, "gamma must be None with norm='delta'"),
        ({"norm": "delta", "delta": None}, ValueError, "delta must be given with norm='delta'"),
        ({"bias": torch.ones(20, device="meta")}, ValueError, "bias must be on the device of x, cpu; got meta"),
        ({"backend": "tritn"}, ValueError, "got 'tritn' .did you mean 'triton'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        residual_layer_norm(**make_inputs(SMALL) | change)
