"""masked_patch_embed against what else computes it, at the shapes of the released models.

Masks hide SimMIM's cells of 32 pixels.
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
from simmim_fast.masking import MaskGenerator
from simmim_fast.ops import masked_patch_embed
from simmim_fast.ops.masked_patch_embed.op import OP
from simmim_fast.testing import masked_patch_embed_inputs as make_inputs
from simmim_fast.testing import random_gradient

BATCH = {"cpu": 8, "cuda": 256}
# (H / p, W / p, channels, p, C), the image's side, whether there is a norm.
MODELS = {"swin_base_192": ((48, 48, 3, 4, 128), 192, True), "vit_base_224": ((14, 14, 3, 16, 768), 224, False)}
# Of image and weight, and of the other parameters.
DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16)}
CONTESTANTS = ("eager", "compiled", "native", "triton")
PARAMETERS = ("weight", "bias", "norm_weight", "norm_bias", "mask_token", "pos_embed")


def composed(
    image: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask_token: Tensor,
    pos_embed: Tensor | None,
    **unused: Any,
) -> Tensor:
    """The operators that a model has without this one. All patches are embedded."""
    x = F.conv2d(image, weight, bias, stride=weight.shape[3]).permute(0, 2, 3, 1)
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[3:], norm_weight, norm_bias)
    x = torch.where(mask[..., None], mask_token, x)
    return x if pos_embed is None else x + pos_embed


def contestant(name: str, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function to time; compiled anew for every case, since one compiled function serves other shapes badly."""
    if name == "eager":
        return composed
    if name == "compiled":
        torch._dynamo.reset()
        return torch.compile(composed, fullgraph=True, dynamic=False)
    reason = refusal(OP, name, torch.device(device), dtype)
    if reason is not None:
        pytest.skip(f"{name} is off on {device}: {reason}")
    return partial(masked_patch_embed, backend=name)


def model_inputs(model: str, dtype: str, device: str, seed: int) -> dict[str, Any]:
    """Arguments of the op for a batch, the parameters asking for gradients."""
    sizes, side, norm = MODELS[model]
    shape = (BATCH[device], *sizes)
    inputs = make_inputs(shape, *DTYPES[dtype], norm=norm, pos_embed=not norm, device=device, seed=seed)
    masks = MaskGenerator(side, 32, sizes[3], 0.6)
    inputs["mask"] = masks.batch(shape[0], generator=torch.Generator(device).manual_seed(seed), device=device)
    for name in PARAMETERS:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    return inputs


def step(function: Callable[..., Tensor], inputs: dict[str, Any], grad_out: Tensor) -> None:
    """Forward and backward."""
    leaves = [inputs[name] for name in PARAMETERS if inputs[name] is not None]
    torch.autograd.grad(function(**inputs), leaves, grad_out)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, model: str, dtype: str, device: str) -> None:
    benchmark.group = f"masked_patch_embed forward and backward {model} {dtype} {device}"
    sets = [model_inputs(model, dtype, device, seed) for seed in range(ROTATION)]
    function = contestant(name, device, DTYPES[dtype][0])
    grad_out = random_gradient(composed, sets[0])
    torch.testing.assert_close(function(**sets[0]), composed(**sets[0]), rtol=0.02, atol=0.02)
    time_call(benchmark, [partial(step, function, inputs, grad_out) for inputs in sets], device)
