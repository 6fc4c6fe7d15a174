"""masked_patch_embed on every backend that it has."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from simmim_fast._backends import FLOAT_DTYPES
from simmim_fast.ops import masked_patch_embed
from simmim_fast.ops.masked_patch_embed.op import CHUNK_IMAGES
from simmim_fast.ops.masked_patch_embed.reference import masked_patch_embed as reference
from simmim_fast.testing import (
    assert_equal,
    assert_ignores_threads,
    assert_matches,
    assert_repeats,
    permuted,
    random_gradient,
    run,
)
from simmim_fast.testing import masked_patch_embed_inputs as make_inputs
from tests.ops import targets
from tests.ops.masked_patch_embed_operators import PARAMETERS, operator_arguments, operators
from tests.ops.targets import Target, fuzzed

# There is no CUDA C++ for this op.
OPERATORS = [param for param in targets.OPERATORS if param.id in ("native", "triton-interpreted", "triton-gpu")]
TARGETS = [param for param in targets.TARGETS if param.id == "reference" or param in OPERATORS]
ON_CPU = [param for param in TARGETS if param.id in ("reference", "native", "triton-interpreted")]
ON_GPU = [param for param in OPERATORS if param.id == "triton-gpu"]

BF16, FP16, FP32, FP64, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8
SMALL = (2, 3, 5, 3, 4, 20)  # B, H / p, W / p, channels of the image, p, C

# Each shape stresses what its id says.
SHAPES = [
    pytest.param(SMALL, id="odd-grid"),
    pytest.param((1, 4, 4, 3, 4, 128), id="swin"),
    pytest.param((1, 3, 2, 3, 16, 80), id="large-patch"),
    pytest.param((2, 3, 3, 1, 3, 17), id="odd-patch"),
    pytest.param((2, 2, 3, 13, 2, 131), id="multi-band"),
    pytest.param((CHUNK_IMAGES + 2, 1, 17, 1, 2, 3), id="several-chunks"),
    pytest.param((3, 1, 1, 1, 1, 1), id="single-number"),
    pytest.param((0, 3, 5, 3, 4, 20), id="empty-batch"),
]
VARIANTS = [
    pytest.param({}, id="norm"),
    pytest.param({"norm": False}, id="no-norm"),
    pytest.param({"pos_embed": False}, id="no-positions"),
    pytest.param({"visible": True}, id="visible"),
    pytest.param({"image_dtype": UINT8, "norm": False, "visible": True}, id="uint8"),
]
# Of image, weight and the other parameters.
DTYPES = [
    pytest.param((FP64, FP64, FP64), id="fp64"),
    pytest.param((FP32, FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16, BF16), id="bf16"),
    pytest.param((FP16, FP16, FP16), id="fp16"),
    pytest.param((BF16, BF16, FP32), id="bf16-beside-fp32"),
    pytest.param((FP16, FP16, FP32), id="fp16-beside-fp32"),
    pytest.param((FP32, BF16, BF16), id="fp32-image"),
    pytest.param((BF16, FP32, FP32), id="bf16-image"),
    pytest.param((UINT8, BF16, FP32), id="uint8-bf16"),
    pytest.param((UINT8, FP64, FP64), id="uint8-fp64"),
]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, target: Target) -> Target:
    return target


def on(target: Target) -> Any:
    """The public function, bound to a backend."""
    return partial(masked_patch_embed, backend=target.backend)


def parameters_of(inputs: dict[str, Any]) -> list[str]:
    """The inputs that get a gradient."""
    return [name for name in PARAMETERS if inputs[name] is not None]


def forward_and_backward(target: Target, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return run(on(target), inputs, random_gradient(reference, inputs), parameters_of(inputs))


def check(target: Target, inputs: dict[str, Any], wanted: list[str] | None = None) -> None:
    assert_matches(on(target), reference, inputs, wanted=wanted or parameters_of(inputs))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(target: Target, shape: tuple, variant: dict) -> None:
    check(target, make_inputs(shape, device=target.device, **variant))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_matches_float64_in_every_dtype(target: Target, dtypes: tuple, norm: bool) -> None:
    image, weight, parameters = dtypes
    check(target, make_inputs(SMALL, weight, parameters, image_dtype=image, norm=norm, device=target.device))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("target", targets.TARGETS[:2], indirect=True)
def test_matches_float64_over_many_chunks(target: Target, dtype: torch.dtype) -> None:
    check(target, make_inputs((2, 48, 48, 3, 4, 128), dtype, FP32, pos_embed=False, device=target.device))
    check(target, make_inputs((4, 14, 14, 3, 16, 112), dtype, FP32, norm=False, device=target.device))


@fuzzed(
    images=st.integers(0, 3),
    height=st.integers(1, 4),
    width=st.sampled_from([1, 3, 8, 17]),
    planes=st.sampled_from([1, 2, 3, 5]),
    patch=st.sampled_from([1, 2, 3, 4, 8]),
    channels=st.sampled_from([1, 2, 7, 15, 16, 17, 63, 64, 65, 129]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    image_dtype=st.sampled_from([None, UINT8]),
    hidden=st.sampled_from([0.0, 0.6, 1.0]),
    norm=st.booleans(),
    pos_embed=st.booleans(),
    visible=st.booleans(),
    seed=st.integers(0, 100),
)
def test_matches_float64_at_boundary_shapes(
    target: Target,
    images: int,
    height: int,
    width: int,
    planes: int,
    patch: int,
    channels: int,
    dtype: torch.dtype,
    image_dtype: torch.dtype | None,
    hidden: float,
    norm: bool,
    pos_embed: bool,
    visible: bool,
    seed: int,
) -> None:
    shape = (images, height, width, planes, patch, channels)
    norm = norm and channels > 2  # of two numbers the norm is a sign
    options = {"norm": norm, "pos_embed": pos_embed, "visible": visible, "hidden": hidden, "seed": seed}
    check(target, make_inputs(shape, dtype, image_dtype=image_dtype, device=target.device, **options))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_takes_any_strides(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, dtype, visible=True, device=target.device)
    strided = {
        name: permuted(value) if isinstance(value, Tensor) and value.ndim > 1 else value
        for name, value in inputs.items()
    }
    strided["bias"] = inputs["bias"].repeat_interleave(2)[::2]
    check(target, strided)
    if target.backend != "reference":
        results = forward_and_backward(target, strided)
        assert all(result.is_contiguous() for result in results.values())


@pytest.mark.float64
def test_gradcheck(target: Target) -> None:
    inputs = make_inputs((2, 1, 3, 1, 2, 3), FP64, device=target.device)
    arguments = [inputs[name].requires_grad_() for name in PARAMETERS]
    assert torch.autograd.gradcheck(
        lambda *parameters: on(target)(inputs["image"], inputs["mask"], *parameters), arguments
    )


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_opcheck(target: Target, dtype: torch.dtype, requires_grad: bool) -> None:
    forward, backward = operators(target)
    for variant in ({}, {"norm": False, "pos_embed": False, "visible": True, "image_dtype": UINT8}):
        inputs = make_inputs((2, 2, 3, 3, 2, 4), dtype, device=target.device, **variant)
        inputs["image"] = permuted(inputs["image"])
        _, backward_arguments = operator_arguments(inputs, dtype, dtype)
        torch.library.opcheck(backward, backward_arguments)
        torch.library.opcheck(backward, (*backward_arguments[:-6], dtype, None, None, None, None, dtype))
        for name in parameters_of(inputs):
            inputs[name].requires_grad_(requires_grad)
        torch.library.opcheck(forward, operator_arguments(inputs, dtype, dtype)[0])


def test_repeats_bit_for_bit(target: Target) -> None:
    inputs = make_inputs(SMALL if target.emulated else (3, 24, 16, 3, 4, 33), BF16, FP32, device=target.device)
    assert_repeats(partial(forward_and_backward, target, inputs), times=10 if target.emulated else 50)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("target", OPERATORS, indirect=True)
def test_ignores_the_number_of_threads(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL if target.emulated else (3, 24, 16, 3, 4, 33), dtype, FP32, device=target.device)
    assert_ignores_threads(partial(forward_and_backward, target, inputs))


@pytest.mark.parametrize("visible", [False, True], ids=["all", "visible"])
def test_drops_what_lies_under_the_mask(target: Target, visible: bool) -> None:
    inputs = make_inputs(SMALL, visible=visible, device=target.device)
    expected = forward_and_backward(target, inputs)
    hidden_pixels = inputs["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    inputs["image"] = inputs["image"].masked_fill(hidden_pixels, float("nan"))
    for name, result in forward_and_backward(target, inputs).items():
        assert_equal(result, expected[name], name)


def test_listed_patches_may_be_hidden(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device)
    expected = forward_and_backward(target, inputs)
    inputs["visible"] = torch.arange(15, dtype=torch.int32, device=target.device).expand(2, 15)
    for name, result in forward_and_backward(target, inputs).items():
        torch.testing.assert_close(result, expected[name], msg=name)


@pytest.mark.parametrize("target", ON_CPU, indirect=True)
@pytest.mark.parametrize("flaw", ["missing", "negative", "beyond"])
def test_refuses_a_wrong_list(target: Target, flaw: str) -> None:
    inputs = make_inputs(SMALL, visible=True)
    message = "every patch that is not hidden" if flaw == "missing" else "flat patches from 0 to 14"
    if flaw == "missing":
        inputs["visible"] = inputs["visible"][:, 1:]
    else:
        inputs["visible"][0, 0] = -1 if flaw == "negative" else 15
    with pytest.raises(ValueError, match=message):
        on(target)(**inputs)


@pytest.mark.parametrize("target", OPERATORS[:1], indirect=True)
def test_refuses_a_wrong_list_when_compiled(target: Target) -> None:
    torch._dynamo.reset()
    inputs = make_inputs(SMALL, visible=True)
    inputs["visible"] = inputs["visible"][:, 1:]
    with pytest.raises(ValueError, match="every patch that is not hidden"):
        torch.compile(on(target), fullgraph=True, backend="aot_eager")(**inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("target", ON_GPU, indirect=True)
def test_missing_patches_are_nan(target: Target) -> None:
    inputs = make_inputs(SMALL, visible=True, device="cuda")
    missing = inputs["visible"][:, 0].long()
    inputs["visible"] = inputs["visible"][:, 1:]
    out = on(target)(**inputs).flatten(1, 2)
    assert bool(out[torch.arange(2), missing].isnan().all())
    assert int(out.isnan().sum()) == 2 * out.shape[2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64], ids=str)
def test_integer_masks_hide_where_non_zero(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, device=target.device)
    expected = on(target)(**inputs)
    inputs["mask"] = inputs["mask"].to(dtype) * 3
    assert_equal(on(target)(**inputs), expected, "out")


def composed(image: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, *others: Tensor | None) -> Tensor:
    """The operators that a model has without this one."""
    norm_weight, norm_bias, mask_token, pos_embed = others
    x = F.conv2d(image, weight, bias, stride=weight.shape[3]).permute(0, 2, 3, 1)
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[3:], norm_weight, norm_bias)
    x = torch.where(mask[..., None], mask_token, x)
    return x if pos_embed is None else x + pos_embed


@pytest.mark.parametrize("parameters", [FP32, BF16], ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "no-autocast"])
def test_has_the_dtype_of_its_parts(target: Target, norm: bool, autocast: bool, parameters: torch.dtype) -> None:
    inputs = make_inputs(SMALL, parameters, norm=norm, device=target.device)
    with torch.autocast(target.device, BF16, enabled=autocast):
        expected = composed(*(inputs[name] for name in ("image", "mask", *PARAMETERS)))
        actual = on(target)(**inputs)
    assert actual.dtype == expected.dtype
    assert float((actual - expected).norm() / expected.norm()) < 4 * torch.finfo(BF16).eps


def test_autocast_takes_operands_to_its_dtype(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device)
    grad_out = random_gradient(reference, inputs)
    with torch.autocast(target.device, BF16):
        actual, plain = (run(f, inputs, grad_out, PARAMETERS) for f in (on(target), reference))
    exact = run(reference, inputs, grad_out, PARAMETERS)
    for name, result in actual.items():
        assert result.dtype == FP32
        error, budget = ((one[name] - exact[name]).norm() for one in (actual, plain))
        assert error <= 3 * budget + 4 * torch.finfo(FP32).eps * exact[name].norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("target", ON_GPU, indirect=True)
def test_more_than_int32_elements(target: Target) -> None:
    inputs = make_inputs((1, 8, 8, 3, 4, 1024), BF16, hidden=0.0, pos_embed=False, norm=False, device="cuda")
    one = torch.ones(1, 1, 1, 1, dtype=BF16, device="cuda")
    expected = run(on(target), inputs, one.expand(1, 8, 8, 1024), ["weight"])
    images = 2**15 + 1
    inputs |= {name: inputs[name].expand(images, *inputs[name].shape[1:]).contiguous() for name in ("image", "mask")}
    results = run(on(target), inputs, one.expand(images, 8, 8, 1024), ["weight"])
    for image in (0, -1):
        assert_equal(results["out"][image], expected["out"][0], "out")
    torch.testing.assert_close(results["grad_weight"] / images, expected["grad_weight"])


@pytest.mark.interpreted
def test_more_than_int32_elements_in_an_image() -> None:
    """Two thousand million bytes, of which only those of one patch are ever touched."""
    from tests.ops.load_patches_kernel import load_patch_kernel

    image = torch.from_numpy(np.zeros((1, 33, 64, 2**20), np.uint8))
    image[0, -1, 0, -16:] = torch.arange(16)
    assert image.numel() > 2**31
    out = torch.empty(16, dtype=torch.uint8)
    load_patch_kernel[(1,)](image, out, 2**14 - 1, 32 * 64**2 + 48, 33 * 64**2, 64, 2**20, PATCH_SIZE=64, NUMBERS=16)
    assert out.tolist() == list(range(16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": "no tensor"}, TypeError, "image must be a tensor; got str"),
        ({"eps": "a"}, TypeError, "eps must be a number; got 'a'"),
        (
            {"image": torch.ones(2, 3, 12, 20, dtype=torch.int32)},
            TypeError,
            "image must be float64, .* got torch.int32",
        ),
        ({"image": torch.ones(3, 12, 20)}, ValueError, r"image must have 4 dimensions .* got shape \(3, 12, 20\)"),
        ({"image": torch.ones(2, 4, 12, 20)}, ValueError, "image must have as many channels as weight, 3; got"),
        ({"image": torch.ones(2, 3, 12, 21)}, ValueError, "image must have sides that patch_size = 4 divides"),
        ({"image": torch.ones(2, 3, 12, 20).byte()}, ValueError, "mean is needed where image is torch.uint8"),
        ({"image": torch.ones(2, 3, 12, 20, requires_grad=True)}, ValueError, "image must not require a gradient"),
        ({"mean": torch.ones(3)}, ValueError, "mean must be None where image is torch.float32"),
        ({"mask": torch.ones(2, 3, 5)}, TypeError, "mask must be bool or an integer dtype; got torch.float32"),
        ({"mask": torch.ones(2, 15, dtype=torch.bool)}, ValueError, r"mask must have shape .* = \(2, 3, 5\)"),
        ({"weight": torch.ones(20, 48)}, ValueError, r"weight must have shape \(C, channels, p, p\)"),
        ({"weight": torch.ones(20, 3, 4, 2)}, ValueError, r"weight must have shape \(C, channels, p, p\)"),
        ({"bias": torch.ones(19)}, ValueError, r"bias must have shape \(C\) = \(20,\); got \(19,\)"),
        ({"norm_bias": None}, ValueError, "norm_bias must be given where"),
        ({"norm_weight": None}, ValueError, "norm_weight must be given where"),
        ({"mask_token": torch.ones(1, 1, 20)}, ValueError, r"mask_token must have shape \(C\) = \(20,\)"),
        ({"pos_embed": torch.ones(15, 20)}, ValueError, r"pos_embed must have shape .* = \(3, 5, 20\)"),
        ({"visible": torch.ones(2, 3)}, TypeError, "visible must be an integer tensor; got torch.float32"),
        ({"visible": torch.ones(3).int()}, ValueError, r"visible must have shape \(B, K\) with B = 2; got \(3,\)"),
        ({"bias": torch.ones(20, device="meta")}, ValueError, "bias must be on the device of image, cpu; got meta"),
        ({"backend": "tritn"}, ValueError, "got 'tritn' .did you mean 'triton'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masked_patch_embed(**make_inputs(SMALL) | change)
