"""masked_l1_loss on every backend."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simmim_fast._backends import FLOAT_DTYPES
from simmim_fast.ops import bytes_moved, register_flop_formulas
from simmim_fast.ops.masked_l1_loss import masked_l1_loss
from simmim_fast.ops.masked_l1_loss.reference import masked_l1_loss as reference
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
from simmim_fast.testing import masked_l1_loss_inputs as make_inputs
from tests.ops.library_kernels import library_kernels, on_architectures
from tests.ops.targets import GPU_OPERATORS, OPERATORS, TARGETS, Target, fuzzed

BF16, FP16, FP32, FP64, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8
WANTED = ("prediction",)
SMALL = (2, 3, 8, 12)

on_every_backend = pytest.mark.parametrize("target", TARGETS, indirect=True)
on_operators = pytest.mark.parametrize("target", OPERATORS, indirect=True)
on_gpu = pytest.mark.parametrize("target", GPU_OPERATORS, indirect=True)

# Shape and patch; each stresses what its id says.
SHAPES = [
    pytest.param((2, 3, 8, 12), 4, id="small"),
    pytest.param((1, 1, 16, 16), 1, id="patch-of-one-pixel"),
    pytest.param((2, 1, 9, 15), 3, id="odd-sides"),
    pytest.param((2, 5, 6, 6), 6, id="one-entry"),
    pytest.param((1, 3, 24, 264), 8, id="several-column-tiles"),
    pytest.param((0, 3, 8, 12), 4, id="empty-batch"),
    pytest.param((2, 3, 0, 12), 4, id="empty-image"),
]
DTYPES = [
    pytest.param((FP64, FP64), id="fp64"),
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((FP16, FP16), id="fp16"),
    pytest.param((BF16, FP32), id="bf16-beside-fp32"),
    pytest.param((FP16, FP32), id="fp16-beside-fp32"),
    pytest.param((FP32, BF16), id="fp32-beside-bf16"),
    pytest.param((FP64, UINT8), id="fp64-beside-uint8"),
    pytest.param((FP32, UINT8), id="fp32-beside-uint8"),
    pytest.param((BF16, UINT8), id="bf16-beside-uint8"),
]


def on(target: Target) -> Any:
    """The public function, bound to a backend."""
    return partial(masked_l1_loss, backend=target.backend)


def operators(target: Target) -> tuple[Any, Any]:
    name = f"masked_l1_loss_{target.backend}"
    return getattr(torch.ops.simmim_fast, name), getattr(torch.ops.simmim_fast, f"{name}_backward")


def forward_and_backward(target: Target, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return run(on(target), inputs, random_gradient(reference, inputs), WANTED)


def operator_arguments(inputs: dict[str, Any], keep_sign: bool = True) -> tuple:
    names = ("prediction", "target", "mask", "mean", "std", "patch_size")
    return (*(inputs[name] for name in names), keep_sign)


@on_every_backend
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_matches_float64(target: Target, shape: tuple, patch: int, dtypes: tuple) -> None:
    assert_matches(on(target), reference, make_inputs(shape, patch, *dtypes, device=target.device), wanted=WANTED)


@on_every_backend
@fuzzed(
    images=st.integers(0, 3),
    channels=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.sampled_from([1, 2, 3, 7, 8, 9, 17]),
    patch=st.integers(1, 5),
    dtypes=st.sampled_from([(dtype, dtype) for dtype in FLOAT_DTYPES] + [(FP32, UINT8), (BF16, UINT8), (BF16, FP32)]),
    hidden=st.sampled_from([0.0, 0.6, 1.0]),
    seed=st.integers(0, 100),
)
def test_matches_float64_at_boundary_shapes(
    target: Target,
    images: int,
    channels: int,
    rows: int,
    columns: int,
    patch: int,
    dtypes: tuple,
    hidden: float,
    seed: int,
) -> None:
    shape = (images, channels, rows * patch, columns * patch)
    inputs = make_inputs(shape, patch, *dtypes, hidden=hidden, device=target.device, seed=seed)
    assert_matches(on(target), reference, inputs, wanted=WANTED)


@on_every_backend
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_takes_any_strides(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, 4, dtype, device=target.device)
    inputs |= {name: permuted(inputs[name]) for name in ("prediction", "target", "mask")}
    assert_matches(on(target), reference, inputs, wanted=WANTED)


@on_every_backend
def test_drops_what_is_visible(target: Target) -> None:
    inputs = make_inputs(SMALL, 4, device=target.device)
    expected = forward_and_backward(target, inputs)
    visible = ~inputs["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(SMALL)
    inputs["prediction"][visible] = float("nan")
    inputs["target"][visible] = float("inf")
    for name, result in forward_and_backward(target, inputs).items():
        assert_equal(result, expected[name], name)
    assert bool((expected["grad_prediction"][visible] == 0).all())


@on_every_backend
def test_gradient_is_zero_where_the_residual_is(target: Target) -> None:
    inputs = make_inputs(SMALL, 4, hidden=1.0, device=target.device)
    inputs["prediction"] = inputs["target"].clone()
    results = forward_and_backward(target, inputs)
    assert all(bool((result == 0).all()) for result in results.values())


@on_every_backend
def test_is_zero_where_nothing_is_masked(target: Target) -> None:
    results = forward_and_backward(target, make_inputs(SMALL, 4, hidden=0.0, device=target.device))
    assert all(bool((result == 0).all()) for result in results.values())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_integer_masks_hide_where_non_zero(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, 4, device=target.device)
    expected = on(target)(**inputs)
    assert_equal(on(target)(**inputs | {"mask": inputs["mask"].to(dtype) * 3}), expected, "out")


@on_every_backend
@pytest.mark.float64
def test_gradcheck(target: Target) -> None:
    inputs = make_inputs((1, 2, 2, 4), 2, FP64, device=target.device)
    prediction = inputs.pop("prediction").requires_grad_()
    assert torch.autograd.gradcheck(lambda prediction: on(target)(prediction, **inputs), prediction)


@on_operators
@pytest.mark.parametrize("target_dtype", [None, UINT8], ids=["float", "uint8"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(target: Target, dtype: torch.dtype, target_dtype: torch.dtype | None) -> None:
    forward, backward = operators(target)
    inputs = make_inputs((2, 2, 4, 4), 2, dtype, target_dtype, device=target.device)
    torch.library.opcheck(forward, operator_arguments(inputs, keep_sign=False))
    loss, sign, scale = forward(*operator_arguments(inputs))
    torch.library.opcheck(backward, (loss, permuted(sign), scale, dtype))
    inputs["prediction"] = permuted(inputs["prediction"]).requires_grad_()
    torch.library.opcheck(forward, operator_arguments(inputs))


@on_every_backend
def test_repeats_bit_for_bit(target: Target) -> None:
    inputs = make_inputs((3, 3, 16, 40), 4, BF16, FP32, device=target.device)
    assert_repeats(partial(forward_and_backward, target, inputs), times=10 if target.emulated else 50)


@on_operators
def test_ignores_the_number_of_threads(target: Target) -> None:
    inputs = make_inputs((4, 3, 96, 96), 4, device=target.device)
    assert_ignores_threads(partial(forward_and_backward, target, inputs))


@on_every_backend
def test_autocast_changes_nothing(target: Target) -> None:
    inputs = make_inputs(SMALL, 4, BF16, FP32, device=target.device)
    expected = forward_and_backward(target, inputs)
    with torch.autocast(target.device, BF16):
        actual = forward_and_backward(target, inputs)
    assert actual["out"].dtype == FP32
    for name, result in actual.items():
        assert_equal(result, expected[name], name)


@pytest.mark.gpu
@on_gpu
def test_more_than_int32_elements(target: Target) -> None:
    shape = (2**15 + 1, 1, 256, 256)
    prediction = torch.zeros(1, 1, 1, 1, dtype=BF16, device="cuda").expand(shape).contiguous()
    mask = torch.zeros((shape[0], 1, 1), dtype=torch.bool, device="cuda")
    mask[-1] = True
    target_pixels = torch.ones(1, 1, 1, 1, dtype=UINT8, device="cuda").expand(shape).contiguous()
    zero, one = torch.zeros(1, device="cuda"), torch.ones(1, device="cuda") / 255
    loss = on(target)(prediction.requires_grad_(), target_pixels, mask, 256, mean=zero, std=one)
    (gradient,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(loss.item(), 1.0)
    assert bool((gradient[-1] < 0).all())
    assert not bool(gradient[:-1].any())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prediction": "no tensor"}, TypeError, "prediction must be a tensor; got str"),
        ({"prediction": torch.ones(SMALL).int()}, TypeError, "prediction must be float64, .* got torch.int32"),
        (
            {"prediction": torch.ones(3, 8, 12)},
            ValueError,
            r"prediction must have 4 dimensions .* got shape \(3, 8, 12\)",
        ),
        (
            {"target": torch.ones(2, 1, 8, 12)},
            ValueError,
            r"target must have shape \(B, channels, H, W\) = \(2, 3, 8, 12\)",
        ),
        ({"target": torch.ones(SMALL).int()}, TypeError, "target must be .* uint8; got torch.int32"),
        ({"target": torch.ones(SMALL).byte()}, ValueError, "mean is needed where target is torch.uint8"),
        ({"target": torch.ones(SMALL, requires_grad=True)}, ValueError, "target must not require a gradient"),
        ({"mean": torch.ones(3)}, ValueError, "mean must be None where target is torch.float32"),
        ({"mask": torch.ones(2, 2, 3)}, TypeError, "mask must be bool or an integer dtype; got torch.float32"),
        ({"mask": torch.ones(2, 8, 12).bool()}, ValueError, r"mask must have shape .* = \(2, 2, 3\); got \(2, 8, 12\)"),
        (
            {"mask": torch.ones(2, 2, 3, device="meta").bool()},
            ValueError,
            "mask must be on the device of prediction, cpu",
        ),
        ({"patch_size": 5}, ValueError, r"target must have sides that patch_size = 5 divides; got \(8, 12\)"),
        ({"patch_size": 2.0}, TypeError, "patch_size must be an integer; got 2.0"),
        ({"patch_size": 0}, ValueError, "patch_size must be 1 or more; got 0"),
        ({"backend": "tritn"}, ValueError, "got 'tritn' .did you mean 'triton'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masked_l1_loss(**make_inputs(SMALL, 4) | change)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_cost_formulas(backend: str) -> None:
    forward, backward = operators(Target(backend))
    inputs = make_inputs((4, 3, 16, 24), 4, BF16, UINT8, device="meta")
    loss, sign, scale = forward(*operator_arguments(inputs))
    partials = 16 * 12  # a float64 and an int64 for each of 192 rows / 16
    read = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    written = loss.nbytes + sign.nbytes + scale.nbytes
    assert bytes_moved(forward, *operator_arguments(inputs)) == (read + partials, partials + written)
    gradient = backward(loss, sign, scale, BF16)
    assert bytes_moved(backward, loss, sign, scale, BF16) == (loss.nbytes + sign.nbytes + scale.nbytes, gradient.nbytes)

    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        forward(*operator_arguments(inputs))
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("model", "shape", "patch", "hidden"),
    [("Swin-B 192", (64, 3, 192, 192), 4, 22 / 36), ("ViT-B 224", (64, 3, 224, 224), 16, 30 / 49)],
    ids=["swin", "vit"],
)
def test_readme_states_the_bytes(model: str, shape: tuple, patch: int, hidden: float) -> None:
    forward, backward = operators(Target("native"))
    inputs = make_inputs(shape, patch, BF16, FP32, device="meta")
    loss, sign, scale = forward(*operator_arguments(inputs))
    counted = sum(bytes_moved(forward, *operator_arguments(inputs)))
    partials = 2 * 16 * shape[0] * 3 * shape[2] // 16  # a float64 and an int64 for 16 rows, written and read
    least = counted - partials - (1 - hidden) * (inputs["prediction"].nbytes + inputs["target"].nbytes)
    backward_counted = sum(bytes_moved(backward, loss, sign, scale, BF16))
    readme = Path(inspect.getfile(reference)).with_name("README.md").read_text()
    for direction, moved, minimum in (("forward", counted, least), ("backward", backward_counted, backward_counted)):
        row = f"| {model}, {shape} | {direction} | {moved / 1e6:.1f} | {minimum / 1e6:.1f} |"
        assert row in readme, row


COMPILED = [
    pytest.param((BF16, UINT8), 90),
    *(pytest.param((BF16, UINT8), capability, marks=pytest.mark.slow) for capability in (80, 100)),
    *(pytest.param((FP32, FP32), capability, marks=pytest.mark.slow) for capability in offline.CAPABILITIES),
]


@pytest.mark.compiles(3)
@pytest.mark.parametrize(("dtypes", "capability"), COMPILED, ids=str)
def test_triton_kernels_compile(dtypes: tuple, capability: int, tmp_path: Path) -> None:
    from simmim_fast.ops.masked_l1_loss import kernels

    inputs = make_inputs((64, 3, 192, 192), 4, *dtypes, device="meta")  # Swin-B
    loss, sign, scale = torch.ops.simmim_fast.masked_l1_loss_triton(*operator_arguments(inputs))
    launches = offline.launches(kernels.forward, *operator_arguments(inputs))
    launches += offline.launches(kernels.backward, loss, sign, scale, dtypes[0])
    compiled = [offline.compile_launch(launch, capability, tmp_path) for launch in launches]
    assert len(compiled) == 3
    for one in compiled:
        offline.assert_frugal(one, capability)
    # Of one thread. Under the mask, whose cells have four pixels in a row, the forward loads so many at a time.
    itemsize, tile = dtypes[0].itemsize, launches[0].arguments
    elements = tile["ROWS"] * tile["COLUMNS"] / launches[0].threads
    assert compiled[0].wide_bytes("LDG", 32 * itemsize) >= elements * itemsize
    elements = launches[2].arguments["PIXELS"] / launches[2].threads
    assert compiled[2].wide_bytes("LDG") >= elements  # int8 signs
    assert compiled[2].wide_bytes("STG") >= elements * itemsize


@on_architectures
def test_native_kernels_move_16_bytes_at_a_time(architecture: str) -> None:
    """Those for rows of whole vectors, V pixels each; their twins for V = 1 take the others."""
    kernels = library_kernels("masked_l1_loss_(fwd|bwd)_kernel", architecture)
    wide = {name: body for name, body in kernels.items() if "Li1E" not in name}
    assert len(wide) == 4 + 4 * 2 + 2, "a backward for each dtype, a forward for each beside itself, float32 and uint8"
    for name, body in wide.items():
        assert len(re.findall(r"LDG\.E\S*\.128", body)) > 0, name
        assert "_fwd_" in name or len(re.findall(r"STG\.E\S*\.(128|256)", body)) > 0, name
        assert len(re.findall(r"\b(LDL|STL)\b", body)) == 0, name
