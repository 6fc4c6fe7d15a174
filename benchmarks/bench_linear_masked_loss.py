"""linear_masked_loss against what else computes it, at the shapes of the released models.

"listed" is given the masked tokens; everyone else finds what to do in the mask, or predicts all pixels.
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
from simmim_fast.masking import MaskGenerator, token_index
from simmim_fast.ops import linear_masked_loss
from simmim_fast.ops.linear_masked_loss.op import OP
from simmim_fast.ops.linear_masked_loss.reference import linear_masked_loss as reference
from simmim_fast.testing import linear_masked_loss_inputs

BATCH = {"cpu": 8, "cuda": 256}
# Masks, and channels of a token.
MODELS = {
    "swin_base_192": (MaskGenerator(192, 32, 4, 0.6), 1024),
    "vit_base_224": (MaskGenerator(224, 32, 16, 0.6), 768),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTESTANTS = ("eager", "compiled", "native", "native listed", "triton", "triton listed")


def contestant(name: str, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function to time; compiled anew for every case, since one compiled function serves other shapes badly."""
    if name == "eager":
        return reference
    if name == "compiled":
        torch._dynamo.reset()
        return torch.compile(reference, fullgraph=True, dynamic=False)
    reason = refusal(OP, name, torch.device(device), dtype)
    if name == "native" and device == "cuda":
        reason = "there is no CUDA C++ for this op"
    if reason is not None:
        pytest.skip(f"{name} is off on {device}: {reason}")
    return partial(linear_masked_loss, backend=name)


def make_inputs(model: str, dtype: str, device: str, listed: bool, seed: int) -> dict[str, Any]:
    """One batch under a mask of the model's own cells."""
    (masks, depth), batch = MODELS[model], BATCH[device]
    stride, patch = masks.encoder_stride, masks.model_patch_size
    grid = [side // stride for side in masks.input_size]
    inputs = linear_masked_loss_inputs(
        (batch, *grid, depth, stride, 3), patch, DTYPES[dtype], torch.float32, device=device, seed=seed
    )
    mask = masks.batch(batch, generator=torch.Generator().manual_seed(seed), device=device)
    tokens = token_index(mask[:, :: stride // patch, :: stride // patch], masks.counts[1]) if listed else None
    leaves = {name: inputs[name].requires_grad_() for name in ("features", "weight", "bias")}
    return inputs | leaves | {"mask": mask, "tokens": tokens}


def step(function: Callable[..., Tensor], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(function(**inputs), [inputs[name] for name in ("features", "weight", "bias")])


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, model: str, dtype: str, device: str) -> None:
    benchmark.group = f"linear_masked_loss forward and backward {model} {dtype} {device}"
    backend, _, listed = name.partition(" ")
    sets = [make_inputs(model, dtype, device, bool(listed), seed) for seed in range(ROTATION)]
    function = contestant(backend, device, DTYPES[dtype])
    torch.testing.assert_close(function(**sets[0]), reference(**sets[0]), rtol=1e-3, atol=0)
    time_call(benchmark, [partial(step, function, inputs) for inputs in sets], device)
