"""biased_attention against what else computes it, at the shapes of ViT-B.

GFLOP/s counts two products in the forward and five more in the backward, the same for every contestant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.measure import ROTATION, devices, time_call
from simmim_fast._backends import refusal
from simmim_fast.ops.biased_attention import biased_attention
from simmim_fast.ops.biased_attention.op import OP, size_refusal
from simmim_fast.ops.biased_attention.reference import biased_attention as reference
from simmim_fast.testing import biased_attention_inputs as make_inputs
from simmim_fast.testing import random_gradient

BATCH = {"cpu": 8, "cuda": 256}
MODELS = {"vit_base_224": (197, 12, 64), "vit_base_384": (577, 12, 64)}  # N, heads, D
DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.float32)}
CONTESTANTS = ("eager", "compiled", "sdpa", "native", "triton")


def sdpa(qkv: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """PyTorch's own fused attention, which takes the bias as a mask of the queries' dtype."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    mask = bias.to(q.dtype).expand(qkv.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def contestant(name: str, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function to time; compiled anew for every case, since one compiled function serves other shapes badly."""
    if name in ("eager", "sdpa"):
        return {"eager": reference, "sdpa": sdpa}[name]
    if name == "compiled":
        torch._dynamo.reset()
        return torch.compile(reference, fullgraph=True, dynamic=False)
    reason = refusal(OP, name, torch.device(device), dtype) or size_refusal(name, device, 64)
    if reason is not None:
        pytest.skip(f"{name} is off on {device}: {reason}")
    return partial(biased_attention, backend=name)


def train(function: Callable[..., Tensor], inputs: dict[str, Any], grad_out: Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(function(**inputs), (inputs["qkv"], inputs["bias"]), grad_out)


def input_sets(model: str, dtype: str, device: str) -> list[dict[str, Any]]:
    shape = (BATCH[device], *MODELS[model])
    return [make_inputs(shape, *DTYPES[dtype], device=device, seed=seed) for seed in range(ROTATION)]


def note_rate(benchmark: BenchmarkFixture, model: str, device: str, products: int) -> None:
    tokens, heads, head_size = MODELS[model]
    flops = products * 2 * BATCH[device] * heads * tokens**2 * head_size
    benchmark.extra_info["gflop_per_s"] = round(flops / benchmark.extra_info["us"] / 1e3, 1)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_forward(benchmark: BenchmarkFixture, name: str, model: str, dtype: str, device: str) -> None:
    benchmark.group = f"biased_attention forward {model} {dtype} {device}"
    function = contestant(name, device, DTYPES[dtype][0])
    time_call(benchmark, [partial(function, **inputs) for inputs in input_sets(model, dtype, device)], device)
    note_rate(benchmark, model, device, products=2)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, model: str, dtype: str, device: str) -> None:
    benchmark.group = f"biased_attention forward and backward {model} {dtype} {device}"
    function = contestant(name, device, DTYPES[dtype][0])
    calls = []
    for inputs in input_sets(model, dtype, device):
        grad_out = random_gradient(reference, inputs)
        for leaf in ("qkv", "bias"):
            inputs[leaf].requires_grad_()
        calls.append(partial(train, function, inputs, grad_out))
    time_call(benchmark, calls, device)
    note_rate(benchmark, model, device, products=7)
