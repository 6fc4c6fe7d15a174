"""shifted_window_attention against what else computes it, at the shapes of the released models.

GB/s is the bytes that the op itself must move over the time, the same for every contestant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.measure import ROTATION, devices, time_call
from simmim_fast._backends import refusal
from simmim_fast.ops import shifted_window_attention
from simmim_fast.ops.shifted_window_attention.op import OP, size_refusal
from simmim_fast.testing import OUTPUT_FACTOR, assert_within_budget, random_gradient
from simmim_fast.testing import shifted_window_attention_inputs as make_inputs

BATCH = {"cpu": 8, "cuda": 128}
# Grid, heads, window and shift of a shifted block; the head size is 32.
LAYERS: dict[str, dict[str, Any]] = {
    "swin_base_192_stage1": {"grid": (48, 48), "heads": 4, "window_size": (6, 6), "shift": (3, 3)},
    "swin_base_192_stage2": {"grid": (24, 24), "heads": 8, "window_size": (6, 6), "shift": (3, 3)},
    "swin_base_192_stage3": {"grid": (12, 12), "heads": 16, "window_size": (6, 6), "shift": (3, 3)},
    "swin_base_192_stage4": {"grid": (6, 6), "heads": 32, "window_size": (6, 6), "shift": (0, 0)},
    "swin_base_224_stage3": {"grid": (14, 14), "heads": 16, "window_size": (7, 7), "shift": (3, 3)},
    "swinv2_base_192_stage1": {"grid": (48, 48), "heads": 4, "window_size": (12, 12), "shift": (6, 6), "cosine": True},
}
DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.float32)}
CONTESTANTS = ("eager", "compiled", "native", "triton")
REFERENCE = partial(shifted_window_attention, backend="reference")
TENSORS = ("qkv", "bias_table", "logit_scale")


def layer_inputs(layer: str, dtype: str, device: str, seed: int) -> dict[str, Any]:
    """Arguments of one layer, without a padding value: every window divides its grid."""
    case = dict(LAYERS[layer])
    shape = (BATCH[device], *case.pop("grid"), case.pop("heads"), 32)
    types = dict(zip(("dtype", "parameter_dtype"), DTYPES[dtype], strict=True))
    return make_inputs(shape, **case, **types, pad_value=False, device=device, seed=seed)


def contestant(name: str, layer: str, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function to time; compiled anew for every case, since one compiled function serves other shapes badly."""
    if name == "eager":
        return REFERENCE
    if name == "compiled":
        torch._dynamo.reset()
        return torch.compile(REFERENCE, fullgraph=True, dynamic=False)
    window_h, window_w = LAYERS[layer]["window_size"]
    reason = refusal(OP, name, torch.device(device), dtype) or size_refusal(name, device, window_h * window_w, 32)
    if reason is not None:
        pytest.skip(f"{name} is off on {device}: {reason}")
    return partial(shifted_window_attention, backend=name)


def check(function: Callable[..., Tensor], inputs: dict[str, Any], name: str) -> None:
    """A contestant that is wrong is not timed."""
    exact = {key: value.double() if key in TENSORS and value is not None else value for key, value in inputs.items()}
    assert_within_budget(function(**inputs), REFERENCE(**inputs), REFERENCE(**exact), OUTPUT_FACTOR, name)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_forward(benchmark: BenchmarkFixture, name: str, layer: str, dtype: str, device: str) -> None:
    benchmark.group = f"shifted_window_attention forward {layer} {dtype} {device}"
    function = contestant(name, layer, device, DTYPES[dtype][0])
    sets = [layer_inputs(layer, dtype, device, seed) for seed in range(ROTATION)]
    check(function, sets[0], name)
    nbytes = 4 * sets[0]["qkv"].nbytes // 3
    time_call(benchmark, [partial(function, **inputs) for inputs in sets], device, nbytes)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_backward(benchmark: BenchmarkFixture, name: str, layer: str, dtype: str, device: str) -> None:
    benchmark.group = f"shifted_window_attention backward {layer} {dtype} {device}"
    function = contestant(name, layer, device, DTYPES[dtype][0])
    calls = []
    for seed in range(ROTATION):
        inputs = layer_inputs(layer, dtype, device, seed)
        leaves = [inputs[key].requires_grad_() for key in TENSORS if inputs[key] is not None]
        grad_out = random_gradient(REFERENCE, inputs)
        calls.append(partial(torch.autograd.grad, function(**inputs), leaves, grad_out, retain_graph=True))
    nbytes = 7 * inputs["qkv"].nbytes // 3
    time_call(benchmark, calls, device, nbytes)
