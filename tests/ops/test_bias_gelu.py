"""bias_gelu on every backend that it has."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simmim_fast._backends import FLOAT_DTYPES
from simmim_fast.ops import bias_gelu, bytes_moved, register_flop_formulas
from simmim_fast.ops.bias_gelu import kernels
from simmim_fast.ops.bias_gelu.op import CHUNK_ROWS
from simmim_fast.ops.bias_gelu.reference import bias_gelu as reference
from simmim_fast.testing import (
    assert_equal,
    assert_ignores_threads,
    assert_matches,
    assert_repeats,
    offline,
    permuted,
    random_gradient,
    run,
)
from simmim_fast.testing import bias_gelu_inputs as make_inputs
from tests.ops import targets
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
    pytest.param((1, 4, 4, 128), id="exact-tiles"),
    pytest.param((2 * CHUNK_ROWS + 3, 7), id="several-chunks"),
    pytest.param((3, 261), id="several-channel-tiles"),
    pytest.param((20,), id="one-row"),
    pytest.param((3, 1), id="single-channel"),
    pytest.param((0, 3, 20), id="empty-batch"),
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


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, target: Target) -> Target:
    return target


def on(target: Target) -> Any:
    """The public function, bound to a backend."""
    return partial(bias_gelu, backend=target.backend)


def operators(target: Target) -> tuple[Any, Any]:
    name = f"bias_gelu_{target.backend}"
    return getattr(torch.ops.simmim_fast, name), getattr(torch.ops.simmim_fast, f"{name}_backward")


def forward_and_backward(target: Target, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return run(on(target), inputs, random_gradient(reference, inputs))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(target: Target, shape: tuple, dtypes: tuple) -> None:
    assert_matches(on(target), reference, make_inputs(shape, *dtypes, device=target.device))


@fuzzed(
    rows=st.sampled_from([0, 1, 2, 15, 16, 17, 127, 128, 129]),
    channels=st.sampled_from([1, 2, 7, 8, 15, 16, 17, 127, 128, 129, 257]),
    dtypes=st.sampled_from([param.values[0] for param in DTYPES]),
    seed=st.integers(0, 100),
)
def test_matches_float64_at_boundary_shapes(target: Target, rows: int, channels: int, dtypes: tuple, seed: int) -> None:
    inputs = make_inputs((rows, channels), *dtypes, device=target.device, seed=seed)
    assert_matches(on(target), reference, inputs)


@pytest.mark.parametrize("scale", [1e-4, 10.0], ids=["near-zero", "far"])
def test_matches_float64_at_any_scale(target: Target, scale: float) -> None:
    inputs = make_inputs((40, 50), device=target.device)
    assert_matches(on(target), reference, {name: value * scale for name, value in inputs.items()})


@pytest.mark.parametrize("target", [param for param in OPERATORS if param.id == "native"], indirect=True)
def test_keeps_its_digits_in_the_lower_tail(target: Target) -> None:
    """1 + erf has none left at -5.5, where a GELU of -1e-7 is still a number as good as any."""
    x = torch.linspace(-12, -3, 2000)[:, None]
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    error = (on(target)(x, torch.zeros(1)) / exact - 1).abs()
    assert bool((error < torch.finfo(FP32).eps * (4 + x**2)).all())  # an exponent x^2 / 2 is rounded, too


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=str)
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_limits(target: Target, dtype: torch.dtype) -> None:
    x, expected = (
        torch.tensor(values, dtype=dtype, device=target.device)[:, None]
        for values in ([0, 100, -100, torch.inf, torch.nan], [0, 100, 0, torch.inf, torch.nan])
    )
    assert_equal(on(target)(x, torch.zeros(1, dtype=dtype, device=target.device)), expected, "out")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_takes_any_strides(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, dtype, device=target.device)
    inputs = {"x": permuted(inputs["x"]), "bias": inputs["bias"].repeat_interleave(2)[::2]}
    assert_matches(on(target), reference, inputs)
    if target.backend != "reference":
        assert all(result.is_contiguous() for result in forward_and_backward(target, inputs).values())


@pytest.mark.float64
def test_gradcheck(target: Target) -> None:
    x, bias = make_inputs((2, 3, 2), FP64, device=target.device).values()
    assert torch.autograd.gradcheck(on(target), (x.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_opcheck(target: Target, dtype: torch.dtype, requires_grad: bool) -> None:
    forward, backward = operators(target)
    x, bias = (t.requires_grad_(requires_grad) for t in make_inputs((2, 3, 4), dtype, device=target.device).values())
    torch.library.opcheck(forward, (x, bias))
    torch.library.opcheck(forward, (permuted(x), bias))
    for wanted in ((True, dtype, dtype), (False, dtype, None), (False, None, dtype), (True, None, None)):
        torch.library.opcheck(backward, (permuted(x.detach()), x.detach(), bias.detach(), *wanted))


def test_repeats_bit_for_bit(target: Target) -> None:
    inputs = make_inputs((140, 33) if target.emulated else (700, 33), BF16, FP32, device=target.device)
    assert_repeats(partial(forward_and_backward, target, inputs), times=10 if target.emulated else 50)


def test_ignores_the_number_of_threads(target: Target) -> None:
    inputs = make_inputs((140, 33) if target.emulated else (700, 33), device=target.device)
    assert_ignores_threads(partial(forward_and_backward, target, inputs))


def test_autocast_changes_nothing(target: Target) -> None:
    inputs = make_inputs(SMALL, BF16, FP32, device=target.device)
    expected = forward_and_backward(target, inputs)
    with torch.autocast(target.device, BF16):
        actual = forward_and_backward(target, inputs)
    assert actual["out"].dtype == BF16
    for name, result in actual.items():
        assert_equal(result, expected[name], name)


@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_keeps_its_inputs_alone(target: Target) -> None:
    inputs = {name: value.requires_grad_() for name, value in make_inputs(SMALL, device=target.device).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda one: one):
        on(target)(**inputs)
    assert {tensor.data_ptr() for tensor in saved} == {value.data_ptr() for value in inputs.values()}


@pytest.mark.parametrize("shape", [SMALL, (300, 7), (0, 20)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_the_backward_yields_the_result_again(target: Target, dtypes: tuple, shape: tuple) -> None:
    forward, backward = operators(target)
    x, bias = make_inputs(shape, *dtypes, device=target.device).values()
    out = forward(x, bias)
    *gradients, again = backward(out, x, bias, True, *dtypes)
    assert_equal(again, out, "out")
    *expected, nothing = backward(out, x, bias, False, *dtypes)
    assert nothing.shape == (0,)
    for gradient, alone in zip(gradients, expected, strict=True):
        assert_equal(gradient, alone, "gradient")


@pytest.mark.gpu
@pytest.mark.parametrize("target", ON_GPU, indirect=True)
def test_more_than_int32_elements(target: Target) -> None:
    x = torch.ones(1, 1, dtype=BF16, device="cuda").expand(2**21 + 1, 1024).contiguous()
    x[-1] = 2
    bias = torch.zeros(1024, dtype=BF16, device="cuda")
    grad_out = torch.ones(1, 1, dtype=BF16, device="cuda").expand(x.shape)
    results = run(on(target), {"x": x, "bias": bias}, grad_out, ["x"])
    for row in (0, 2**20, -1):
        rows = slice(row, row + 1 or None)
        for name, expected in run(on(target), {"x": x[rows], "bias": bias}, grad_out[rows], ["x"]).items():
            assert_equal(results[name][rows], expected, name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "no tensor"}, TypeError, "x must be a tensor; got str"),
        ({"x": torch.ones(SMALL, dtype=torch.int32)}, TypeError, "x must be float64, .* got torch.int32"),
        ({"x": torch.ones(())}, ValueError, r"x must have shape \(\.\.\., C\) .* got \(\)"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x must have shape \(\.\.\., C\) with C at least 1; got \(3, 0\)"),
        ({"bias": torch.ones(1, 20)}, ValueError, r"bias must have shape \(C\) = \(20,\); got \(1, 20\)"),
        ({"bias": torch.ones(20).int()}, TypeError, "bias must be float64"),
        ({"bias": torch.ones(20, device="meta")}, ValueError, "bias must be on the device of x, cpu; got meta"),
        ({"backend": "tritn"}, ValueError, "got 'tritn' .did you mean 'triton'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bias_gelu(**make_inputs(SMALL) | change)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_cost_formulas(backend: str) -> None:
    forward, backward = operators(Target(backend))
    x, bias = make_inputs((500, 8), BF16, BF16, device="meta").values()
    out = forward(x, bias)
    assert bytes_moved(forward, x, bias) == (x.nbytes + bias.nbytes, out.nbytes)

    for recompute in (False, True):
        arguments = (out, x, bias, recompute, BF16, BF16)
        (launch,) = offline.launches(kernels.backward, *arguments)
        workspace = launch.arguments["partial_ptr"].nbytes + 4 * bias.numel()  # and the sum that is rounded
        read, written = bytes_moved(backward, *arguments)
        assert read == out.nbytes + x.nbytes + bias.nbytes + workspace
        assert written == workspace + sum(result.nbytes for result in backward(*arguments))

    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        forward(x, bias)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("model", "shape"),
    [("Swin-B 192, stage 1", (64, 48, 48, 512)), ("ViT-B 224", (64, 197, 3072))],
    ids=["swin", "vit"],
)
def test_readme_states_the_bytes(model: str, shape: tuple) -> None:
    forward, backward = operators(Target("native"))
    x, bias = make_inputs(shape, BF16, FP32, device="meta").values()
    minimum = {"forward": 2 * x.nbytes, "backward": 3 * x.nbytes, "backward, out again": 4 * x.nbytes}
    counted = {
        "forward": bytes_moved(forward, x, bias),
        "backward": bytes_moved(backward, x, x, bias, False, BF16, FP32),
        "backward, out again": bytes_moved(backward, x, x, bias, True, BF16, FP32),
    }
    readme = Path(kernels.__file__).with_name("README.md").read_text()
    for direction, both in counted.items():
        assert f"| {model}, {shape} | {direction} | {sum(both) / 1e6:.1f} | {minimum[direction] / 1e6:.1f} |" in readme


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=[] if c == 90 else pytest.mark.slow) for c in offline.CAPABILITIES]
)
@pytest.mark.compiles(2)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP32, marks=pytest.mark.slow)], ids=str)
def test_triton_kernels_compile(dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    x, bias = make_inputs((64, 48, 48, 512), dtype, FP32, device="meta").values()  # Swin-B, stage 1
    (forward,) = offline.launches(kernels.forward, x, bias)
    (backward,) = offline.launches(kernels.backward, x, x, bias, True, dtype, FP32)
    for launch, loads, stores in ((forward, 1, 1), (backward, 2, 2)):
        compiled = offline.compile_launch(launch, capability, tmp_path)
        offline.assert_frugal(compiled, capability)
        elements = launch.arguments["TILE_R"] * launch.arguments["TILE_C"] / launch.threads  # of one thread
        assert compiled.wide_bytes("LDG") >= elements * loads * dtype.itemsize
        assert compiled.wide_bytes("STG") >= elements * stores * dtype.itemsize
