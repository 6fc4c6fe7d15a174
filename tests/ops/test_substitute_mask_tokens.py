"""substitute_mask_tokens on every backend. The template for the tests of an op."""

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
from simmim_fast.ops import bytes_moved, register_flop_formulas, substitute_mask_tokens
from simmim_fast.ops.substitute_mask_tokens import kernels
from simmim_fast.ops.substitute_mask_tokens.reference import substitute_mask_tokens as reference
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
from simmim_fast.testing import substitute_mask_tokens_inputs as make_inputs
from tests.ops.targets import GPU_OPERATORS, OPERATORS, Target, fuzzed

COPIES = ("out", "grad_x")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALL = (2, 3, 5, 20)

# Each shape stresses what its id says.
SHAPES = [
    pytest.param((2, 3, 5, 20), id="odd-grid"),
    pytest.param((1, 4, 4, 16), id="exact-tiles"),
    pytest.param((35, 1, 17, 3), id="several-chunks"),
    pytest.param((2, 1, 2, 261), id="several-channel-tiles"),
    pytest.param((3, 1, 1, 1), id="single-channel"),
    pytest.param((0, 3, 5, 20), id="empty-batch"),
    pytest.param((2, 0, 5, 20), id="empty-grid"),
]
DTYPES = [
    pytest.param((FP64, FP64), id="fp64"),
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((FP16, FP16), id="fp16"),
    pytest.param((BF16, FP32), id="bf16-beside-fp32"),
    pytest.param((FP16, FP32), id="fp16-beside-fp32"),
    pytest.param((FP32, BF16), id="fp32-beside-bf16"),
    pytest.param((BF16, FP16), id="bf16-beside-fp16"),
]


def on(target: Target) -> Any:
    """The public function, bound to a backend."""
    return partial(substitute_mask_tokens, backend=target.backend)


def operators(target: Target) -> tuple[Any, Any]:
    name = f"substitute_mask_tokens_{target.backend}"
    return getattr(torch.ops.simmim_fast, name), getattr(torch.ops.simmim_fast, f"{name}_backward")


def forward_and_backward(target: Target, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return run(on(target), inputs, random_gradient(reference, inputs))


@pytest.mark.parametrize("pos_embed", [True, False], ids=["positions", "no-positions"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(target: Target, shape: tuple, dtypes: tuple, pos_embed: bool) -> None:
    inputs = make_inputs(shape, *dtypes, pos_embed=pos_embed, device=target.device)
    assert_matches(on(target), reference, inputs, copies=COPIES)


@fuzzed(
    images=st.integers(0, 35),
    height=st.integers(1, 5),
    width=st.sampled_from([1, 3, 8, 17]),
    channels=st.sampled_from([1, 2, 7, 8, 15, 16, 17, 127, 128, 129, 257]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    hidden=st.sampled_from([0.0, 0.6, 1.0]),
    pos_embed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_matches_float64_at_boundary_shapes(
    target: Target,
    images: int,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    hidden: float,
    pos_embed: bool,
    seed: int,
) -> None:
    shape = (images, height, width, channels)
    inputs = make_inputs(shape, dtype, pos_embed=pos_embed, hidden=hidden, device=target.device, seed=seed)
    assert_matches(on(target), reference, inputs, copies=COPIES)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_takes_any_strides(target: Target, dtype: torch.dtype) -> None:
    inputs = {name: permuted(value) for name, value in make_inputs(SMALL, dtype, device=target.device).items()}
    inputs["mask_token"] = inputs["mask_token"].repeat_interleave(2)[::2]
    assert_matches(on(target), reference, inputs, copies=COPIES)
    if target.backend != "reference":
        assert all(result.is_contiguous() for result in forward_and_backward(target, inputs).values())


@pytest.mark.float64
def test_gradcheck(target: Target) -> None:
    x, mask, mask_token, pos_embed = make_inputs((2, 1, 3, 2), FP64, device=target.device).values()
    arguments = [t.requires_grad_() for t in (x, mask_token, pos_embed)]
    assert torch.autograd.gradcheck(lambda x, token, pos: on(target)(x, mask, token, pos), arguments)


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_opcheck(target: Target, dtype: torch.dtype, requires_grad: bool) -> None:
    forward, backward = operators(target)
    x, mask, mask_token, pos_embed = make_inputs((2, 2, 3, 4), dtype, device=target.device).values()
    x, mask_token, pos_embed = (t.requires_grad_(requires_grad) for t in (x, mask_token, pos_embed))
    torch.library.opcheck(forward, (x, mask, mask_token, None))
    torch.library.opcheck(forward, (permuted(x), permuted(mask), mask_token, permuted(pos_embed)))
    for dtypes in ((dtype, dtype, dtype), (dtype, dtype, None), (None, None, dtype)):
        torch.library.opcheck(backward, (permuted(x.detach()), permuted(mask), *dtypes))


def test_repeats_bit_for_bit(target: Target) -> None:
    shape = (3, 2, 9, 33) if target.emulated else (17, 16, 16, 33)
    inputs = make_inputs(shape, BF16, device=target.device)
    assert_repeats(partial(forward_and_backward, target, inputs), times=50)


def test_ignores_the_number_of_threads(target: Target) -> None:
    shape = (3, 2, 9, 33) if target.emulated else (17, 16, 16, 33)
    inputs = make_inputs(shape, device=target.device)
    assert_ignores_threads(partial(forward_and_backward, target, inputs))


def test_drops_what_lies_under_the_mask(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device)
    inputs["x"][inputs["mask"]] = float("nan")
    grad_out = torch.full(SMALL, 2.0, device=target.device)
    results = run(on(target), inputs, grad_out)
    assert all(result.isfinite().all() for result in results.values())
    assert_equal(results["grad_x"], torch.where(inputs["mask"][..., None], 0.0, grad_out), "grad_x")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_integer_masks_hide_where_non_zero(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, device=target.device)
    expected = on(target)(**inputs)
    inputs["mask"] = inputs["mask"].to(dtype) * 3
    assert_equal(on(target)(**inputs), expected, "out")


def test_autocast_changes_nothing(target: Target) -> None:
    inputs = make_inputs(SMALL, BF16, FP32, device=target.device)
    expected = forward_and_backward(target, inputs)
    with torch.autocast(target.device, BF16):
        actual = forward_and_backward(target, inputs)
    assert actual["out"].dtype == FP32
    for name, result in actual.items():
        assert_equal(result, expected[name], name)


@pytest.mark.gpu
@pytest.mark.parametrize("target", GPU_OPERATORS, indirect=True)
def test_more_than_int32_elements(target: Target) -> None:
    shape = (2**15 + 1, 8, 8, 1024)
    x = torch.ones(1, 1, 1, 1, dtype=BF16, device="cuda").expand(shape).contiguous()
    mask = torch.zeros(shape[:3], dtype=torch.bool, device="cuda")
    mask[-1, -1, -1] = True
    inputs = {"x": x, "mask": mask, "mask_token": torch.full(shape[3:], 2.0, dtype=BF16, device="cuda")}
    results = run(on(target), inputs, torch.ones(1, 1, 1, 1, dtype=BF16, device="cuda").expand(shape))
    for name, visible, hidden in (("out", 1, 2), ("grad_x", 1, 0)):
        assert bool((results[name][-1, -1, -1] == hidden).all())
        assert bool((results[name].flatten()[: -shape[3]] == visible).all())
    assert bool((results["grad_mask_token"] == 1).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": "no tensor"}, TypeError, "x must be a tensor; got str"),
        ({"x": torch.ones(SMALL, dtype=torch.int32)}, TypeError, "x must be float64, .* got torch.int32"),
        ({"x": torch.ones(3, 5, 20)}, ValueError, r"x must have 4 dimensions .* got shape \(3, 5, 20\)"),
        ({"mask": torch.ones(2, 3, 5)}, TypeError, "mask must be bool or an integer dtype; got torch.float32"),
        ({"mask": torch.ones(2, 15, dtype=torch.bool)}, ValueError, r"mask must have shape \(B, H, W\) = \(2, 3, 5\)"),
        ({"mask_token": torch.ones(1, 1, 20)}, ValueError, r"mask_token .* \(C\) = \(20,\); got \(1, 1, 20\)"),
        ({"mask_token": torch.ones(20).int()}, TypeError, "mask_token must be float64"),
        ({"pos_embed": torch.ones(15, 20)}, ValueError, r"pos_embed must have shape \(H, W, C\) = \(3, 5, 20\)"),
        ({"mask": torch.ones(2, 3, 5, device="meta").bool()}, ValueError, "mask must be on the device of x, cpu"),
        ({"backend": "tritn"}, ValueError, "got 'tritn' .did you mean 'triton'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        substitute_mask_tokens(**make_inputs(SMALL) | change)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_cost_formulas(backend: str) -> None:
    forward, backward = operators(Target(backend))
    x, mask, mask_token, pos_embed = make_inputs((20, 6, 6, 8), BF16, FP32, device="meta").values()
    out = forward(x, mask, mask_token, pos_embed)
    parameters = mask_token.nbytes + pos_embed.nbytes
    assert bytes_moved(forward, x, mask, mask_token, pos_embed) == (x.nbytes + mask.nbytes + parameters, out.nbytes)

    (launch,) = offline.launches(kernels.backward, out, mask, BF16, FP32, FP32)
    partials = [launch.arguments[name] for name in ("token_partial_ptr", "pos_partial_ptr")]
    assert all(partial.dtype == FP32 for partial in partials), "sums accumulate in float32"
    partial_sums = sum(partial.nbytes for partial in partials)
    read, written = bytes_moved(backward, out, mask, BF16, FP32, FP32)
    assert read == out.nbytes + mask.nbytes + partial_sums
    assert written == partial_sums + sum(grad.nbytes for grad in backward(out, mask, BF16, FP32, FP32))

    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        forward(x, mask, mask_token, pos_embed)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("model", "shape", "visible", "dtype", "pos_embed"),
    [
        ("Swin-B 192", (64, 48, 48, 128), 14 / 36, FP32, False),
        ("ViT-B 224", (64, 14, 14, 768), 19 / 49, BF16, True),
    ],
    ids=["swin", "vit"],
)
def test_readme_states_the_bytes(model: str, shape: tuple, visible: float, dtype: torch.dtype, pos_embed: bool) -> None:
    forward, backward = operators(Target("native"))
    arguments = tuple(make_inputs(shape, dtype, FP32, pos_embed=pos_embed, device="meta").values())
    grad_out, mask = forward(*arguments), arguments[1]
    backward_arguments = (grad_out, mask, dtype, FP32, FP32 if pos_embed else None)
    counted, counted_backward = sum(bytes_moved(forward, *arguments)), sum(bytes_moved(backward, *backward_arguments))
    minimum = counted - (1 - visible) * arguments[0].nbytes
    minimum_backward = grad_out.nbytes + mask.nbytes + sum(grad.nbytes for grad in backward(*backward_arguments))
    readme = Path(kernels.__file__).with_name("README.md").read_text()
    assert f"| {model}, {shape} | forward | {counted / 1e6:.1f} | {minimum / 1e6:.1f} |" in readme
    assert f"| {model}, {shape} | backward | {counted_backward / 1e6:.1f} | {minimum_backward / 1e6:.1f} |" in readme


COMPILED = [
    pytest.param(BF16, FP32, 90),
    *(pytest.param(BF16, FP32, capability, marks=pytest.mark.slow) for capability in (80, 100)),
    *(pytest.param(FP32, FP32, capability, marks=pytest.mark.slow) for capability in offline.CAPABILITIES),
]


@pytest.mark.compiles(2)
@pytest.mark.parametrize(("dtype", "parameter_dtype", "capability"), COMPILED, ids=str)
def test_triton_kernels_compile(
    dtype: torch.dtype, parameter_dtype: torch.dtype, capability: int, tmp_path: Path
) -> None:
    shape = (64, 48, 48, 128)  # Swin-B, stage 1
    inputs = make_inputs(shape, dtype, parameter_dtype, device="meta")
    grad_out = torch.empty(shape, dtype=parameter_dtype, device="meta")
    dtypes = (dtype, parameter_dtype, parameter_dtype)
    (forward,) = offline.launches(kernels.forward, *inputs.values())
    (backward,) = offline.launches(kernels.backward, grad_out, inputs["mask"], *dtypes)

    # What is as large as activations moves in 128-bit accesses: x, positions, out; grad_out, grad_x, sum of grad_pos.
    x, parameter, partial_sum = dtype.itemsize, parameter_dtype.itemsize, FP32.itemsize
    for launch, loaded, stored in ((forward, x + parameter, parameter), (backward, parameter, x + partial_sum)):
        compiled = offline.compile_launch(launch, capability, tmp_path)
        offline.assert_frugal(compiled, capability)
        elements = launch.arguments["TILE_P"] * launch.arguments["TILE_C"] / launch.threads  # of one thread
        assert compiled.wide_bytes("LDG") >= elements * loaded
        assert compiled.wide_bytes("STG") >= elements * stored
