"""residual_layer_norm: what its backends take, what they cost, and what the compiler makes of its Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from simmim_fast.ops import bytes_moved, register_flop_formulas, residual_layer_norm
from simmim_fast.ops.residual_layer_norm.op import MAX_CHANNELS, chunk_rows, size_refusal
from simmim_fast.testing import offline
from simmim_fast.testing import residual_layer_norm_inputs as make_inputs
from tests.ops.residual_layer_norm_operators import operator_arguments, operators
from tests.ops.targets import Target

BF16, FP32 = torch.bfloat16, torch.float32
FORMS = {
    "scaled": {},
    "biased": {"delta_bias": True},
    "plain": {"gamma": False, "keep": False},
    "unscaled": {"gamma": False, "keep": False, "delta_bias": True},
    "first": {"delta": False},
    "delta": {"norm": "delta"},
    "delta-biased": {"norm": "delta", "delta_bias": True},
}


def test_says_which_sizes_it_takes() -> None:
    assert "at most 4096 channels; got 4097" in size_refusal("triton", channels=MAX_CHANNELS + 1)
    assert size_refusal("triton", channels=MAX_CHANNELS) is None
    assert size_refusal("native", channels=MAX_CHANNELS + 1) is None


def test_native_takes_more_channels() -> None:
    inputs = make_inputs((2, 40001))
    actual, expected = (residual_layer_norm(**inputs, backend=backend) for backend in ("native", "reference"))
    for result, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, plain)


@pytest.mark.parametrize("channels", [1, 3, 128, 255, 256, 257, 512, 1024, 1536, MAX_CHANNELS, 40000])
def test_chunks_are_whole_tiles(channels: int) -> None:
    from simmim_fast.ops.residual_layer_norm.kernels import tile

    assert chunk_rows(channels) % tile(channels, 2).rows == 0


@pytest.mark.parametrize("again", [{}, {"recompute": True}, {"recompute": True, "adds_delta": True}], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_cost_formulas(form: dict, again: dict) -> None:
    from simmim_fast.ops.residual_layer_norm import kernels

    forward, backward = operators(Target("triton"))
    inputs = make_inputs((20, 30, 32), FP32, BF16, BF16, **form, device="meta")
    if again and (inputs["norm"] == "delta" or inputs["delta"] is None):
        return
    arguments, backward_arguments = operator_arguments(inputs, forward, **again)
    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        results, gradients = forward(*arguments), backward(*backward_arguments)
    assert counter.get_total_flops() == 0
    given = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    assert bytes_moved(forward, *arguments) == (given, sum(result.nbytes for result in results))

    # What the launcher allocates, beside what it returns, is written once and read once; and so are the float32 sums
    # of the bf16 parameters' gradients.
    (launch,) = offline.launches(kernels.backward, *backward_arguments)
    pointers = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    partials = [value for name, value in pointers.items() if "partial" in name]
    assert len(partials) == 2 + sum(inputs[name] is not None for name in ("gamma", "delta_bias"))
    workspace = sum(value.nbytes + 4 * 32 for value in partials)
    kept = sum(value.nbytes for value in backward_arguments if isinstance(value, Tensor))
    read, written = bytes_moved(backward, *backward_arguments)
    assert read == kept + workspace
    assert written == workspace + sum(gradient.nbytes for gradient in gradients)


README_CASES = [
    ("Swin-B 192, stage 1", (64, 48, 48, 128), FP32, "output"),
    ("Swin-B 192, stage 3", (64, 12, 12, 512), BF16, "output"),
    ("ViT-B 224", (64, 197, 768), FP32, "output"),
    ("Swin V2-B 192, stage 1", (64, 48, 48, 128), FP32, "delta"),
]


@pytest.mark.parametrize(("model", "shape", "dtype", "norm"), README_CASES, ids=[case[0] for case in README_CASES])
def test_readme_states_the_bytes(model: str, shape: tuple, dtype: torch.dtype, norm: str) -> None:
    forward, backward = operators(Target("native"))
    inputs = make_inputs(shape, dtype, BF16, FP32, gamma=False, norm=norm, device="meta")
    arguments, backward_arguments = operator_arguments(inputs, forward)
    x, delta = inputs["x"].nbytes, inputs["delta"].nbytes
    both = norm == "output"  # results that are as large as activations: the sum, and the norm
    minimum = {"forward": 2 * x + (2 if both else 1) * delta, "backward": x + 2 * delta + (2 * x if both else 0)}
    counted = {
        "forward": sum(bytes_moved(forward, *arguments)),
        "backward": sum(bytes_moved(backward, *backward_arguments)),
    }
    if both:
        _, again = operator_arguments(inputs, forward, recompute=True)
        minimum["backward, norm again"] = minimum["backward"] + delta
        counted["backward, norm again"] = sum(bytes_moved(backward, *again))
    from simmim_fast.ops.residual_layer_norm import kernels

    readme = Path(kernels.__file__).with_name("README.md").read_text()
    for direction, count in counted.items():
        row = f"| {model}, {shape} | {norm} | {direction} | {count / 1e6:.1f} | {minimum[direction] / 1e6:.1f} |"
        assert row in readme


COMPILED = {
    "swin-b": ((8, 48, 48, 128), FORMS["unscaled"], {"recompute": True}),
    "vit-b": ((8, 197, 768), FORMS["biased"], {"recompute": True, "adds_delta": True}),
    "swin-v2": ((8, 48, 48, 128), FORMS["delta-biased"], {}),
    "first": ((8, 48, 48, 128), FORMS["first"], {"recompute": True}),
    "swin-l-stage-4": ((8, 6, 6, 1536), FORMS["biased"], {"recompute": True}),
    "widest": ((8, 16, MAX_CHANNELS), FORMS["biased"], {"recompute": True}),
}
IN_MAKE_TEST = [("swin-b", BF16, 90), ("vit-b", BF16, 90)]


def compiled_cases() -> Iterator[Any]:
    """All in bf16 for every architecture, and the first two in fp32; of the others fp32 for 9.0 alone."""
    for name, dtype, capability in product(COMPILED, (BF16, FP32), offline.CAPABILITIES):
        if dtype == BF16 or capability == 90 or name in ("swin-b", "vit-b"):
            marks = [] if (name, dtype, capability) in IN_MAKE_TEST else [pytest.mark.slow]
            yield pytest.param(
                *COMPILED[name],
                dtype,
                capability,
                id=f"{name}-{str(dtype).removeprefix('torch.')}-{capability}",
                marks=marks,
            )


@pytest.mark.compiles(2)
@pytest.mark.parametrize(("shape", "form", "again", "dtype", "capability"), list(compiled_cases()))
def test_triton_kernels_compile(
    shape: tuple, form: dict, again: dict, dtype: torch.dtype, capability: int, tmp_path: Path
) -> None:
    from simmim_fast.ops.residual_layer_norm import kernels

    inputs = make_inputs(shape, FP32, dtype, FP32, **form, device="meta")
    arguments, backward_arguments = operator_arguments(inputs, operators(Target("triton"))[0], **again)
    launches = offline.launches(kernels.forward, *arguments) + offline.launches(kernels.backward, *backward_arguments)
    assert len(launches) == 2
    for launch in launches:
        compiled = offline.compile_launch(launch, capability, tmp_path)
        offline.assert_frugal(compiled, capability)
        elements = launch.arguments["TILE_R"] * launch.arguments["TILE_C"] / launch.threads  # of one thread
        assert compiled.wide_bytes("LDG") >= elements * FP32.itemsize
        assert compiled.wide_bytes("STG") >= elements * dtype.itemsize
