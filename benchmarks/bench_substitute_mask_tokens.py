"""substitute_mask_tokens against what else computes it, at the shapes of the released models.

GB/s is the bytes that the op itself must move over the time, the same for every contestant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.measure import ROTATION, devices, time_call
from simmim_fast._backends import refusal
from simmim_fast.ops import bytes_moved, substitute_mask_tokens
from simmim_fast.ops.substitute_mask_tokens.op import OP
from simmim_fast.ops.substitute_mask_tokens.reference import substitute_mask_tokens as reference
from simmim_fast.testing import assert_equal, random_gradient
from simmim_fast.testing import substitute_mask_tokens_inputs as make_inputs

BATCH = {"cpu": 8, "cuda": 256}
MODELS = {"swin_base_192": (48, 48, 128), "vit_base_224": (14, 14, 768)}
DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.float32)}
CONTESTANTS = ("blend", "eager", "compiled", "native", "triton")

Inputs = dict[str, Tensor | None]


def blend(x: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None) -> Tensor:
    """The official formula (microsoft/SimMIM, models/simmim.py)."""
    weight = mask[..., None].type_as(mask_token)
    x = x * (1 - weight) + mask_token * weight
    return x if pos_embed is None else x + pos_embed


def contestant(name: str, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function to time; compiled anew for every case, since one compiled function serves other shapes badly."""
    if name == "blend":
        return blend
    if name == "eager":
        return reference
    if name == "compiled":
        torch._dynamo.reset()
        return torch.compile(reference, fullgraph=True, dynamic=False)
    reason = refusal(OP, name, torch.device(device), dtype)
    if reason is not None:
        pytest.skip(f"{name} is off on {device}: {reason}")
    return partial(substitute_mask_tokens, backend=name)


def differentiable(inputs: Inputs) -> Inputs:
    return {
        name: value.requires_grad_() if value is not None and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_forward(benchmark: BenchmarkFixture, name: str, model: str, dtype: str, device: str) -> None:
    benchmark.group = f"substitute_mask_tokens forward {model} {dtype} {device}"
    shape = (BATCH[device], *MODELS[model])
    sets = [make_inputs(shape, *DTYPES[dtype], pos_embed=False, device=device, seed=seed) for seed in range(ROTATION)]
    function = contestant(name, device, DTYPES[dtype][0])
    assert_equal(function(**sets[0]), reference(**sets[0]), name)
    nbytes = sum(bytes_moved(torch.ops.simmim_fast.substitute_mask_tokens_native, *sets[0].values()))
    time_call(benchmark, [partial(function, **inputs) for inputs in sets], device, nbytes)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_backward(benchmark: BenchmarkFixture, name: str, model: str, dtype: str, device: str) -> None:
    benchmark.group = f"substitute_mask_tokens backward {model} {dtype} {device}"
    shape, dtypes = (BATCH[device], *MODELS[model]), DTYPES[dtype]
    sets = [
        differentiable(make_inputs(shape, *dtypes, pos_embed=False, device=device, seed=seed))
        for seed in range(ROTATION)
    ]
    function = contestant(name, device, dtypes[0])
    calls = []
    for inputs in sets:
        leaves = (inputs["x"], inputs["mask_token"])
        grad_out = random_gradient(reference, inputs)
        calls.append(partial(torch.autograd.grad, function(**inputs), leaves, grad_out, retain_graph=True))
    arguments = (grad_out, inputs["mask"], *dtypes, None)
    nbytes = sum(bytes_moved(torch.ops.simmim_fast.substitute_mask_tokens_native_backward, *arguments))
    time_call(benchmark, calls, device, nbytes)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", CONTESTANTS)
def test_host_overhead(benchmark: BenchmarkFixture, name: str, device: str) -> None:
    """One call with autograd on so few elements that only the way to the kernel takes time."""
    benchmark.group = f"substitute_mask_tokens host overhead {device}"
    inputs = differentiable(make_inputs((1, 1, 1, 8), pos_embed=False, device=device))
    time_call(benchmark, [partial(contestant(name, device, torch.float32), **inputs)], device)
