"""masked_l1_loss against what else computes it, at the shapes of the released models.

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
from simmim_fast.masking import MaskGenerator
from simmim_fast.ops import bytes_moved, masked_l1_loss
from simmim_fast.ops.masked_l1_loss.op import OP
from simmim_fast.ops.masked_l1_loss.reference import masked_l1_loss as reference
from simmim_fast.testing import masked_l1_loss_inputs

BATCH = {"cpu": 8, "cuda": 256}
MASKS = {"swin_base_192": MaskGenerator(192, 32, 4, 0.6), "vit_base_224": MaskGenerator(224, 32, 16, 0.6)}
DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.float32)}
CONTESTANTS = ("eager", "compiled", "native", "triton")


def contestant(name: str, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function to time; compiled anew for every case, since one compiled function serves other shapes badly."""
    if name == "eager":
        return reference
    if name == "compiled":
        torch._dynamo.reset()
        return torch.compile(reference, fullgraph=True, dynamic=False)
    reason = refusal(OP, name, torch.device(device), dtype)
    if reason is not None:
        pytest.skip(f"{name} is off on {device}: {reason}")
    return partial(masked_l1_loss, backend=name)


def make_inputs(model: str, dtype: str, device: str, seed: int) -> dict[str, Any]:
    """One batch under a mask of the model's own cells."""
    masks, batch = MASKS[model], BATCH[device]
    shape, patch = (batch, 3, *masks.input_size), masks.model_patch_size
    inputs = masked_l1_loss_inputs(shape, patch, *DTYPES[dtype], device=device, seed=seed)
    inputs["mask"] = masks.batch(batch, generator=torch.Generator().manual_seed(seed), device=device)
    inputs["prediction"].requires_grad_()
    return inputs


def step(function: Callable[..., Tensor], inputs: dict[str, Any]) -> Tensor:
    """Forward and backward."""
    return torch.autograd.grad(function(**inputs), inputs["prediction"])[0]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MASKS)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, model: str, dtype: str, device: str) -> None:
    benchmark.group = f"masked_l1_loss forward and backward {model} {dtype} {device}"
    sets = [make_inputs(model, dtype, device, seed) for seed in range(ROTATION)]
    function = contestant(name, device, DTYPES[dtype][0])
    torch.testing.assert_close(step(function, sets[0]), step(reference, sets[0]))
    operators = torch.ops.simmim_fast
    arguments = (*(sets[0][key] for key in ("prediction", "target", "mask", "mean", "std", "patch_size")), True)
    meta = [value.to("meta") if isinstance(value, Tensor) else value for value in arguments]
    loss, sign, scale = operators.masked_l1_loss_native(*meta)
    nbytes = sum(bytes_moved(operators.masked_l1_loss_native, *meta))
    nbytes += sum(bytes_moved(operators.masked_l1_loss_native_backward, loss, sign, scale, DTYPES[dtype][0]))
    time_call(benchmark, [partial(step, function, inputs) for inputs in sets], device, nbytes)
