"""Every op on small inputs, and every path through it: what the tests that all ops share run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from simmim_fast import ops
from simmim_fast._backends import BackendError
from simmim_fast.ops import OPS
from simmim_fast.testing import (
    biased_attention_inputs,
    differentiable,
    random_gradient,
    run,
    shifted_window_attention_inputs,
    small_inputs,
)
from tests.ops.targets import GPU_OPERATORS, OPERATORS, Target

Case = tuple[str, Callable[..., dict[str, Any]]]  # an op, and what draws its inputs for a number of images

every_op = pytest.mark.parametrize("op", OPS)
on_operators = pytest.mark.parametrize("target", OPERATORS, indirect=True)
on_gpu = pytest.mark.parametrize("target", GPU_OPERATORS, indirect=True)


def on(op: str, target: Target) -> Callable[..., Tensor]:
    """The public function, bound to a backend; skipped where the op has no such kernel."""
    device = "cuda" if target.cuda_on_host else target.device
    if target.backend == "native" and device not in OPS[op].native_devices:
        pytest.skip(f"there is no CUDA C++ for {op}")
    return partial(getattr(ops, op), backend=target.backend)


def skip_refused(target: Target, op: str, inputs: dict[str, Any]) -> None:
    """Skips a case of sizes that the CUDA C++ does not take. Triton takes every case: there a refusal fails."""
    try:
        on(op, target)(**inputs)
    except BackendError as error:
        if target.backend != "native":
            raise
        pytest.skip(str(error))


def forward_and_backward(function: Callable[..., Tensor], op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Output and every gradient, by name."""
    grad_out = random_gradient(partial(getattr(ops, op), backend="reference"), inputs)
    return run(function, inputs, grad_out, differentiable(inputs))


def mixed_precision(op: str) -> dict[str, torch.dtype]:
    """Options for bfloat16 activations beside float32 parameters, where the op takes such."""
    return {"dtype": torch.bfloat16} | ({} if op.endswith("loss") else {"parameter_dtype": torch.float32})


def small(op: str, **options: Any) -> Case:
    return op, partial(small_inputs, op, **options)


def windows(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int] = (0, 0), **fixed: Any) -> Case:
    """Window attention of two heads of 32 channels, which every backend takes."""

    def draw(batch: int, **options: Any) -> dict[str, Any]:
        return shifted_window_attention_inputs((batch, *grid, 2, 32), window, shift, **fixed, **options)

    return "shifted_window_attention", draw


def attention(tokens: int, head_size: int, queries: int) -> Case:
    def draw(batch: int, **options: Any) -> dict[str, Any]:
        return biased_attention_inputs((batch, tokens, 2, head_size), queries=queries, **options)

    return "biased_attention", draw


# Of every op its usual path and those that its optional arguments open.
CASES: dict[str, Case] = {
    **{op: small(op) for op in OPS},
    "cosine windows, padded": windows((3, 5), (2, 3), (1, 1), cosine=True),
    "windows with queries": windows((3, 3), (3, 4), (1, 2), queries=4),
    "attention with queries": attention(7, 16, queries=3),
    "embedding of a list": small("masked_patch_embed", visible=True),
    "head of a list": small("linear_masked_loss", tokens=True),
    "norm of the branch": small("residual_layer_norm", norm="delta", delta_bias=True),
}

# Paths of more than one tile, too large for the interpreter in every test.
TILED: dict[str, Case] = {
    "windows in blocks, cosine, padded": windows((20, 23), (12, 12), (6, 6), cosine=True),
    "attention in blocks": attention(70, 32, queries=70),
    "attention of two images at a time": attention(197, 64, queries=197),
}
every_case = pytest.mark.parametrize("case", CASES)
every_case_and_tiled = pytest.mark.parametrize("case", CASES | TILED)
