"""linear_masked_loss on every backend that it has."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simmim_fast._backends import FLOAT_DTYPES
from simmim_fast.ops import bytes_loaded, bytes_moved, flops, register_flop_formulas
from simmim_fast.ops.linear_masked_loss import linear_masked_loss
from simmim_fast.ops.linear_masked_loss.op import LOSSES, row_chunks, slope_dtype
from simmim_fast.ops.linear_masked_loss.reference import linear_masked_loss as reference
from simmim_fast.testing import (
    Guards,
    assert_equal,
    assert_ignores_threads,
    assert_matches,
    assert_repeats,
    offline,
    permuted,
    random_gradient,
    run,
)
from simmim_fast.testing import linear_masked_loss_inputs as make_inputs
from tests.ops import targets
from tests.ops.targets import Target, fuzzed

BF16, FP16, FP32, FP64, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8
WANTED = ("features", "weight", "bias")
SMALL = (2, 3, 2, 20, 4, 3)  # B, h, w, D, stride, channels

# There is no CUDA C++ for this op.
OPERATORS = [param for param in targets.OPERATORS if param.id in ("native", "triton-interpreted", "triton-gpu")]
TARGETS = [param for param in targets.TARGETS if param.id == "reference" or param in OPERATORS]
on_every_backend = pytest.mark.parametrize("target", TARGETS, indirect=True)
on_operators = pytest.mark.parametrize("target", OPERATORS, indirect=True)
on_gpu = pytest.mark.parametrize("target", [param for param in OPERATORS if param.id == "triton-gpu"], indirect=True)

# Shape and patch; each stresses what its id says.
SHAPES = [
    pytest.param((2, 3, 2, 20, 4, 3), 2, id="mask-finer-than-stride"),
    pytest.param((2, 4, 2, 20, 4, 3), 8, id="mask-coarser-than-stride"),
    pytest.param((1, 3, 3, 16, 4, 1), 6, id="mask-across-tokens"),
    pytest.param((2, 6, 6, 64, 8, 3), 8, id="several-tiles"),
    pytest.param((3, 5, 5, 33, 5, 2), 5, id="odd-sizes"),
    pytest.param((1, 1, 1, 1, 1, 1), 1, id="single-pixel"),
    pytest.param((0, 3, 2, 20, 4, 3), 2, id="empty-batch"),
    pytest.param((2, 0, 2, 20, 4, 3), 2, id="empty-grid"),
]
DTYPES = [
    pytest.param((FP64, FP64), id="fp64"),
    pytest.param((FP32, FP32), id="fp32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((FP16, FP16), id="fp16"),
    pytest.param((BF16, FP32), id="bf16-beside-fp32"),
    pytest.param((FP32, BF16), id="fp32-beside-bf16"),
    pytest.param((FP64, UINT8), id="fp64-beside-uint8"),
    pytest.param((FP32, UINT8), id="fp32-beside-uint8"),
    pytest.param((BF16, UINT8), id="bf16-beside-uint8"),
]


def on(target: Target) -> Any:
    """The public function, bound to a backend."""
    return partial(linear_masked_loss, backend=target.backend)


def operators(target: Target) -> tuple[Any, Any]:
    name = f"linear_masked_loss_{target.backend}"
    return getattr(torch.ops.simmim_fast, name), getattr(torch.ops.simmim_fast, f"{name}_backward")


def forward_and_backward(target: Target, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return run(on(target), inputs, random_gradient(reference, inputs), WANTED)


def operator_arguments(inputs: dict[str, Any], keep_slope: bool = True) -> tuple:
    names = ("features", "weight", "bias", "target", "mask", "tokens", "mean", "std", "patch_size")
    return (*(inputs.get(name) for name in names), LOSSES.index(inputs["loss"]), keep_slope)


def backward_arguments(inputs: dict[str, Any], loss: Tensor, slope: Tensor, scale: Tensor) -> tuple:
    features, weight, mask, tokens = (inputs.get(name) for name in ("features", "weight", "mask", "tokens"))
    options = (inputs["target"].shape[1], inputs["patch_size"], LOSSES.index(inputs["loss"]))
    return (loss, features, weight, slope, scale, mask, tokens, *options)


@on_every_backend
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_matches_float64(target: Target, shape: tuple, patch: int, loss: str) -> None:
    assert_matches(on(target), reference, make_inputs(shape, patch, loss=loss, device=target.device), wanted=WANTED)


@on_every_backend
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tokens", [False, True], ids=["all-tokens", "tokens"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_matches_float64_in_every_dtype(target: Target, dtypes: tuple, tokens: bool, loss: str) -> None:
    inputs = make_inputs((2, 3, 4, 36, 4, 3), 2, *dtypes, tokens=tokens, loss=loss, device=target.device)
    assert_matches(on(target), reference, inputs, wanted=WANTED)


@on_every_backend
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_matches_float64_where_rows_are_cut_into_chunks(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs((1, 48, 48, 17, 2, 1), 1, dtype, FP32, device=target.device)
    assert row_chunks(48 * 48, inputs["weight"]) == (2, 1152)
    assert_matches(on(target), reference, inputs, wanted=WANTED)


@on_every_backend
@fuzzed(
    images=st.integers(0, 3),
    height=st.integers(1, 2),
    width=st.integers(1, 4),
    depth=st.sampled_from([1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65]),
    stride=st.integers(1, 5),
    channels=st.integers(1, 3),
    patch=st.sampled_from(["pixel", "stride", "row"]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    tokens=st.booleans(),
    hidden=st.sampled_from([0.0, 0.6, 1.0]),
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 100),
)
def test_matches_float64_at_boundary_shapes(
    target: Target,
    images: int,
    height: int,
    width: int,
    depth: int,
    stride: int,
    channels: int,
    patch: str,
    dtype: torch.dtype,
    tokens: bool,
    hidden: float,
    loss: str,
    seed: int,
) -> None:
    side = {"pixel": 1, "stride": stride, "row": stride if tokens else stride * width}[patch]
    shape = (images, height * width if patch == "row" else height, width, depth, stride, channels)
    options = {"tokens": tokens, "hidden": hidden, "loss": loss, "device": target.device, "seed": seed}
    assert_matches(on(target), reference, make_inputs(shape, side, dtype, **options), wanted=WANTED)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("target", OPERATORS[:1], indirect=True)
def test_matches_float64_at_many_tokens(target: Target, dtype: torch.dtype) -> None:
    """More tokens, outputs and channels than are packed at a time."""
    inputs = make_inputs((3, 20, 20, 70, 14, 6), 2, dtype, hidden=0.9, device=target.device)
    assert_matches(on(target), reference, inputs, wanted=WANTED)


@on_every_backend
def test_listing_the_tokens_changes_nothing(target: Target) -> None:
    inputs = make_inputs((2, 3, 4, 36, 4, 3), 2, tokens=True, device=target.device)
    listed = forward_and_backward(target, inputs)
    for name, result in forward_and_backward(target, inputs | {"tokens": None}).items():
        torch.testing.assert_close(result, listed[name])


@on_every_backend
@pytest.mark.float64
def test_equals_prediction_and_masked_loss(target: Target) -> None:
    from simmim_fast.ops.linear_masked_loss.reference import predict_pixels
    from simmim_fast.ops.masked_l1_loss.reference import masked_l1_loss

    inputs = make_inputs(SMALL, 2, FP64, device=target.device)
    prediction = predict_pixels(inputs["features"], inputs["weight"], inputs["bias"], 3)
    expected = masked_l1_loss(prediction, inputs["target"], inputs["mask"], 2)
    torch.testing.assert_close(on(target)(**inputs), expected, rtol=1e-12, atol=0)


@on_every_backend
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_takes_any_strides(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, 2, dtype, tokens=True, device=target.device)
    inputs |= {name: permuted(inputs[name]) for name in ("features", "weight", "target", "mask", "tokens")}
    assert_matches(on(target), reference, inputs, wanted=WANTED)


@on_every_backend
def test_drops_what_is_visible(target: Target) -> None:
    inputs = make_inputs(SMALL, 2, device=target.device)
    expected = forward_and_backward(target, inputs)
    visible = ~inputs["mask"].repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(inputs["target"].shape)
    inputs["target"][visible] = float("nan")
    for name, result in forward_and_backward(target, inputs).items():
        assert_equal(result, expected[name], name)


@on_every_backend
@pytest.mark.parametrize("tokens", [False, True], ids=["all-tokens", "tokens"])
def test_is_zero_where_nothing_is_masked(target: Target, tokens: bool) -> None:
    results = forward_and_backward(target, make_inputs(SMALL, 2, hidden=0.0, tokens=tokens, device=target.device))
    assert all(bool((result == 0).all()) for result in results.values())


WRONG_TOKENS = {
    "missing": lambda tokens: tokens[:, 1:],
    "repeated": lambda tokens: torch.cat([tokens[:, :1], tokens[:, :1], tokens[:, 2:]], 1),
    "descending": lambda tokens: tokens.flip(1),
    "negative": lambda tokens: torch.cat([tokens[:, :1] * 0 - 1, tokens[:, 1:]], 1),
    "off-the-grid": lambda tokens: torch.cat([tokens[:, :-1], tokens[:, -1:] * 0 + 6], 1),
}


@on_every_backend
@pytest.mark.parametrize("wrong", WRONG_TOKENS)
def test_refuses_wrong_tokens(target: Target, wrong: str) -> None:
    """An error on the CPU, which reads them anyway; NaN and nothing out of bounds on CUDA."""
    inputs = make_inputs(SMALL, 2, tokens=True, device=target.device)
    inputs["tokens"] = WRONG_TOKENS[wrong](inputs["tokens"])
    if target.device == "cpu":
        with pytest.raises(ValueError, match="tokens must list, in ascending order, every token with a masked pixel"):
            on(target)(**inputs)
    else:
        assert on(target)(**inputs).isnan()


@pytest.mark.parametrize("wrong", WRONG_TOKENS)
@pytest.mark.parametrize("target", OPERATORS[1:2], indirect=True)
def test_triton_answers_wrong_tokens_by_nan(target: Target, wrong: str) -> None:
    inputs = make_inputs(SMALL, 2, tokens=True, device=target.device)
    inputs["tokens"] = WRONG_TOKENS[wrong](inputs["tokens"]).contiguous()
    forward, backward = operators(target)
    with Guards() as guards:
        placed = {name: guards.place(value) for name, value in inputs.items()}
        loss, slope, scale = forward(*operator_arguments(placed))
        gradients = backward(*backward_arguments(placed, loss, slope, scale), True, True, True)
    guards.check()
    assert loss.isnan()
    assert all(bool(gradient.isnan().any()) for gradient in gradients)


@pytest.mark.parametrize("target", OPERATORS[:1], indirect=True)
def test_native_operator_refuses_wrong_tokens(target: Target) -> None:
    inputs = make_inputs(SMALL, 2, tokens=True)
    inputs["tokens"] = inputs["tokens"][:, 1:]
    with pytest.raises(RuntimeError, match="masked pixels lie elsewhere"):
        operators(target)[0](*operator_arguments(inputs))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("target", OPERATORS[:1], indirect=True)
def test_native_operator_refuses_slopes_of_another_dtype(target: Target, loss: str) -> None:
    inputs = make_inputs(SMALL, 2, loss=loss)
    forward, backward = operators(target)
    value, slope, scale = forward(*operator_arguments(inputs))
    wrong = slope.to(FP32 if loss == "l1" else torch.int8)
    with pytest.raises(RuntimeError, match="slope: expected dtype"):
        backward(*backward_arguments(inputs, value, wrong, scale), True, True, True)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64], ids=str)
def test_takes_any_integer_tokens(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, 2, tokens=True, device=target.device)
    expected = on(target)(**inputs)
    assert_equal(on(target)(**inputs | {"tokens": inputs["tokens"].to(dtype)}), expected, "out")


@on_every_backend
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tokens", [False, True], ids=["all-tokens", "tokens"])
@pytest.mark.float64
def test_gradcheck(target: Target, tokens: bool, loss: str) -> None:
    inputs = make_inputs((1, 2, 2, 2, 2, 1), 2, FP64, tokens=tokens, loss=loss, device=target.device)
    leaves = [inputs.pop(name).requires_grad_() for name in WANTED]
    assert torch.autograd.gradcheck(lambda *leaves: on(target)(*leaves, **inputs), leaves)


@on_operators
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(target: Target, dtype: torch.dtype) -> None:
    forward, backward = operators(target)
    for options in ({"loss": "l1"}, {"loss": "l2", "tokens": True}, {"target_dtype": UINT8}):
        inputs = make_inputs((2, 2, 2, 4, 2, 2), 2, dtype, device=target.device, **options)
        torch.library.opcheck(forward, operator_arguments(inputs, keep_slope=False))
        results = forward(*operator_arguments(inputs))
        torch.library.opcheck(backward, (*backward_arguments(inputs, *results), True, True, True))
        torch.library.opcheck(backward, (*backward_arguments(inputs, *results), False, True, False))
        leaves = {name: inputs[name].requires_grad_() for name in WANTED}
        torch.library.opcheck(forward, operator_arguments(inputs | leaves))


@on_every_backend
def test_repeats_bit_for_bit(target: Target) -> None:
    inputs = make_inputs((2, 4, 4, 40, 4, 3), 2, BF16, device=target.device)
    assert_repeats(partial(forward_and_backward, target, inputs), times=10 if target.emulated else 50)


@on_operators
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_ignores_the_number_of_threads(target: Target, dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 5, 5, 130, 8, 3), 4, dtype, device=target.device)
    assert_ignores_threads(partial(forward_and_backward, target, inputs))


@on_every_backend
def test_autocast_casts_as_a_linear_layer(target: Target) -> None:
    inputs = make_inputs(SMALL, 2, FP32, device=target.device)
    halves = {name: inputs[name].to(BF16) for name in WANTED}
    grad_out = random_gradient(reference, inputs)
    expected = run(on(target), inputs | halves, grad_out, WANTED)
    with torch.autocast(target.device, BF16):
        actual = run(on(target), inputs, grad_out, WANTED)
    assert actual["out"].dtype == FP32
    for name, result in actual.items():
        assert_equal(result, expected[name].float(), name)


@pytest.mark.gpu
@on_gpu
def test_more_than_int32_elements(target: Target) -> None:
    images = 2**21 // 196 + 1
    last = make_inputs((1, 14, 14, 1024, 1, 1), 1, BF16, UINT8, device="cuda")
    features = torch.zeros(images, 14, 14, 1024, dtype=BF16, device="cuda")
    assert features.numel() > 2**31
    features[-1] = last["features"][0]
    mask = torch.zeros(images, 14, 14, dtype=torch.bool, device="cuda")
    mask[-1] = last["mask"][0]
    pixels = last["target"].expand(images, -1, -1, -1)
    large = last | {"features": features, "mask": mask, "target": pixels}
    one = torch.ones((), device="cuda")
    actual, expected = (run(on(target), inputs, one, ["features"]) for inputs in (large, last))
    assert_equal(actual["out"], expected["out"], "out")
    assert_equal(actual["grad_features"][-1:], expected["grad_features"], "grad_features")
    assert not bool(actual["grad_features"][:-1].any())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": "no tensor"}, TypeError, "features must be a tensor; got str"),
        ({"features": torch.ones(2, 6, 20)}, ValueError, r"features must have 4 dimensions .* got shape \(2, 6, 20\)"),
        (
            {"weight": torch.ones(47, 20)},
            ValueError,
            r"weight must have shape \(s\^2 channels, D\) with 3 channels; got",
        ),
        ({"weight": torch.ones(48, 21)}, ValueError, r"weight must have shape \(s\^2 channels, D\) = \(48, 20\)"),
        ({"weight": torch.ones(48, 20).half()}, TypeError, "weight must have the dtype of features, torch.float32"),
        ({"bias": torch.ones(47)}, ValueError, r"bias must have shape \(s\^2 channels\) = \(48,\); got \(47,\)"),
        ({"target": torch.ones(2, 12, 8)}, ValueError, r"target must have 4 dimensions"),
        ({"target": torch.ones(2, 3, 8, 8)}, ValueError, r"target must have shape .* = \(2, 3, 12, 8\)"),
        ({"target": torch.ones(2, 3, 12, 8, requires_grad=True)}, ValueError, "target must not require a gradient"),
        ({"target": torch.ones(2, 3, 12, 8).byte()}, ValueError, "mean is needed where target is torch.uint8"),
        ({"mask": torch.ones(2, 6, 4)}, TypeError, "mask must be bool or an integer dtype; got torch.float32"),
        ({"mask": torch.ones(2, 3, 2).bool()}, ValueError, r"mask must have shape .* = \(2, 6, 4\); got \(2, 3, 2\)"),
        ({"patch_size": 5}, ValueError, "target must have sides that patch_size = 5 divides"),
        ({"loss": "huber"}, ValueError, "loss must be one of l1, l2, smooth_l1; got 'huber'"),
        ({"tokens": [0]}, TypeError, "tokens must be a tensor; got list"),
        ({"tokens": torch.ones(2, 3)}, TypeError, "tokens must be an integer tensor; got torch.float32"),
        ({"tokens": torch.ones(3, 3).int()}, ValueError, r"tokens must have shape \(B, K\) with B = 2; got \(3, 3\)"),
        ({"tokens": torch.ones(2, 7).int()}, ValueError, "tokens must list at most h w = 6 tokens; got K = 7"),
        ({"bias": torch.ones(48, device="meta")}, ValueError, "bias must be on the device of features, cpu; got meta"),
        ({"backend": "tritn"}, ValueError, "got 'tritn' .did you mean 'triton'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_masked_loss(**make_inputs(SMALL, 2) | change)


def swin_b(loss: str = "l1", tokens: bool = True, dtype: torch.dtype = BF16, device: str = "meta") -> dict[str, Any]:
    return make_inputs((64, 6, 6, 1024, 32, 3), 4, dtype, FP32, tokens=tokens, loss=loss, device=device)


@pytest.mark.parametrize("tokens", [False, True], ids=["all-tokens", "tokens"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_cost_formulas(backend: str, loss: str, tokens: bool) -> None:
    forward, backward = operators(Target(backend))
    inputs = make_inputs((2, 5, 4, 64, 8, 3), 4, BF16, FP32, tokens=tokens, loss=loss, device="meta")
    rows = 2 * (12 if tokens else 20)
    product, chunks = 2 * rows * 192 * 64, 2
    value, slope, scale = forward(*operator_arguments(inputs))
    assert (slope.shape, slope.dtype) == ((2, rows // 2, 192), slope_dtype(BF16, LOSSES.index(loss)))
    written = slope.nbytes + value.nbytes + scale.nbytes + 8 + 16 * chunks
    assert bytes_moved(forward, *operator_arguments(inputs))[1] == written

    arguments = (*backward_arguments(inputs, value, slope, scale), True, True, True)
    gradients = backward(*arguments)
    zeros = inputs["features"].nbytes if tokens else 0
    assert bytes_moved(backward, *arguments)[1] == zeros + 2 * 64 * rows + gradients[1].nbytes + gradients[2].nbytes

    register_flop_formulas()
    for operator, args, products in ((forward, operator_arguments(inputs), 1), (backward, arguments, 2)):
        with FlopCounterMode(display=False) as counter:
            operator(*args)
        assert counter.get_total_flops() == products * product


@pytest.mark.parametrize(
    ("row", "shape", "listed"),
    [
        ("Swin-B 192, D = 1024, s = 32 | all 36", (64, 6, 6, 1024, 32, 3), None),
        ("Swin-B 192, D = 1024, s = 32 | 22 listed", (64, 6, 6, 1024, 32, 3), 22),
        ("ViT-B 224, D = 768, s = 16 | all 196", (64, 14, 14, 768, 16, 3), None),
        ("ViT-B 224, D = 768, s = 16 | 120 listed", (64, 14, 14, 768, 16, 3), 120),
    ],
)
def test_readme_states_the_bytes(row: str, shape: tuple, listed: int | None) -> None:
    forward, backward = operators(Target("native"))
    inputs = make_inputs(shape, 4 if shape[1] == 6 else 16, BF16, FP32, device="meta")
    if listed is not None:
        inputs["tokens"] = torch.empty((64, listed), dtype=torch.int32, device="meta")
    arguments = operator_arguments(inputs)
    arguments_of_backward = (*backward_arguments(inputs, *forward(*arguments)), True, True, True)
    computed = (listed or shape[1] * shape[2]) / (shape[1] * shape[2])
    masked = {6: 22 / 36, 14: 120 / 196}[shape[1]]
    unread = (1 - computed) * inputs["features"].nbytes
    unread = {forward: unread + (1 - masked) * inputs["target"].nbytes, backward: unread}
    for operator, args in ((forward, arguments), (backward, arguments_of_backward)):
        read, written = bytes_moved(operator, *args)
        row += f" | {(read + written) / 1e6:.1f} | {(bytes_loaded(operator, *args) + written) / 1e6:.1f}"
        once = sum(tensor.nbytes for tensor in (*args, *operator(*args)) if isinstance(tensor, Tensor))
        row += f" | {(once - unread[operator]) / 1e6:.1f}"
    row = f"| {row} | {flops(forward, *arguments) / 1e9:.1f} |"
    assert row in Path(inspect.getfile(reference)).with_name("README.md").read_text(), row


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bytes_formula_counts_sums_over_chunks(dtype: torch.dtype) -> None:
    from simmim_fast.ops.linear_masked_loss import kernels

    _, backward = operators(Target("triton"))
    inputs = make_inputs((64, 14, 14, 768, 16, 3), 16, dtype, FP32, device="meta")  # ViT-B
    results = torch.ops.simmim_fast.linear_masked_loss_triton(*operator_arguments(inputs))
    arguments = (*backward_arguments(inputs, *results), True, True, True)
    *_, launch = offline.launches(kernels.backward, *arguments)
    partials = [launch.arguments[name] for name in ("grad_weight_ptr", "grad_bias_ptr")]
    assert [partial.shape for partial in partials] == [(4, 768, 768), (4, 768)]
    allocated = sum(partial.nbytes + (dtype == BF16) * partial[0].nbytes for partial in partials)
    assert bytes_moved(backward, *arguments)[1] == allocated + sum(gradient.nbytes for gradient in backward(*arguments))


COMPILED = [
    pytest.param(dtype, capability, marks=[] if (dtype, capability) == (BF16, 90) else pytest.mark.slow)
    for dtype in (BF16, FP32)
    for capability in offline.CAPABILITIES
]


@pytest.mark.compiles(4)
@pytest.mark.parametrize(("dtype", "capability"), COMPILED, ids=str)
def test_triton_kernels_compile(dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    from simmim_fast.ops.linear_masked_loss import kernels

    inputs = swin_b(dtype=dtype)
    results = torch.ops.simmim_fast.linear_masked_loss_triton(*operator_arguments(inputs))
    launches = offline.launches(kernels.forward, *operator_arguments(inputs))
    launches += offline.launches(kernels.backward, *backward_arguments(inputs, *results), True, True, True)
    assert len(launches) == 4
    for launch in launches:
        compiled = offline.compile_launch(launch, capability, tmp_path)
        offline.assert_frugal(compiled, capability)
        name = launch.kernel.__name__.removeprefix("_linear_masked_loss_").removesuffix("_kernel")
        if name == "sum":
            continue
        offline.assert_products(compiled, dtype, 1)
        constants = launch.arguments  # rows and weights of one step; slopes are narrower
        wide = {"fwd": ("ROWS", "OUTPUTS"), "bwd_features": ("CHANNELS",), "bwd_weight": ("CHANNELS",)}[name]
        elements = constants["DEPTH"] * sum(constants[size] for size in wide) / launch.threads  # of one thread
        assert compiled.wide_bytes("LDG") + compiled.wide_bytes("LDGSTS") >= elements * dtype.itemsize
