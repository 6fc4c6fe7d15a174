"""The bytes that every op registers as read are those that its Triton kernels load: every time, or once a kernel."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from simmim_fast import ops
from simmim_fast.ops import bytes_loaded, bytes_moved
from simmim_fast.ops.masked_patch_embed import kernels as embedding
from simmim_fast.ops.shifted_window_attention import op as window_attention
from simmim_fast.testing import (
    bias_gelu_inputs,
    differentiable,
    linear_masked_loss_inputs,
    masked_l1_loss_inputs,
    masked_patch_embed_inputs,
    random_gradient,
    residual_layer_norm_inputs,
    substitute_mask_tokens_inputs,
)
from tests.ops.accesses import Accesses
from tests.ops.operator_calls import OperatorCall, OperatorCalls
from tests.ops.shifted_window_operators import operator_arguments, operators
from tests.ops.targets import Target

BF16, FP32 = torch.bfloat16, torch.float32

# Several tiles in every direction. Pixels that a mask hides from a kernel count as read, so none are here.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bias_gelu": ("bias_gelu", bias_gelu_inputs((3, 60, 300), BF16, FP32)),
    "residual_layer_norm": ("residual_layer_norm", residual_layer_norm_inputs((3, 50, 40), BF16, delta_bias=True)),
    "substitute_mask_tokens": ("substitute_mask_tokens", substitute_mask_tokens_inputs((3, 4, 5, 300), BF16, FP32)),
    "masked_l1_loss": ("masked_l1_loss", masked_l1_loss_inputs((2, 3, 8, 12), 4, hidden=1.0)),
    "head": ("linear_masked_loss", linear_masked_loss_inputs((3, 5, 6, 140, 8, 3), 8, BF16, FP32, hidden=1.0)),
    "head of a list": ("linear_masked_loss", linear_masked_loss_inputs((4, 5, 6, 40, 8, 3), 4, tokens=True)),
    "embedding": ("masked_patch_embed", masked_patch_embed_inputs((2, 5, 6, 3, 4, 136), BF16, FP32, hidden=0.0)),
    "embedding of a list": (
        "masked_patch_embed",
        masked_patch_embed_inputs((20, 2, 3, 3, 6, 24), image_dtype=torch.uint8, pos_embed=False, visible=True),
    ),
    "embedding without norm": (
        "masked_patch_embed",
        masked_patch_embed_inputs((2, 3, 3, 3, 6, 136), norm=False, pos_embed=False, visible=True),
    ),
}
CASES["substitute_mask_tokens"][1]["mask"].zero_()


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES)
def test_registers_what_kernels_load(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, inputs = CASES[case]
    inputs = {key: value.contiguous() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    grad_out = random_gradient(partial(getattr(ops, name), backend="reference"), inputs)
    leaves = {key: inputs[key].detach().requires_grad_() for key in differentiable(inputs)}
    accesses = Accesses(monkeypatch)
    monkeypatch.setattr(embedding, "check_listed", lambda mask, visible: None)  # which reads on a CPU alone
    with OperatorCalls() as made:
        out = getattr(ops, name)(**inputs | leaves, backend="triton")
        assert_registers_loads(made.calls[0], accesses)
        accesses.clear()
        torch.autograd.backward(tree_leaves(out), tree_leaves(grad_out))
        assert_registers_loads(made.calls[1], accesses)


def assert_registers_loads(call: OperatorCall, accesses: Accesses) -> None:
    assert bytes_moved(call.operator, *call.args)[0] == accesses.moved() + call.read_by_pytorch, call.operator
    loaded = accesses.loaded(vectors_and_masks(call.args))
    assert bytes_loaded(call.operator, *call.args) == loaded + call.read_by_pytorch, call.operator


def vectors_and_masks(args: tuple) -> list[Tensor]:
    """What counts once for every kernel in both."""
    return [arg for arg in args if isinstance(arg, Tensor) and (arg.ndim < 2 or arg.dtype == torch.bool)]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "case",
    [
        {"shape": (3, 6, 6, 2, 8), "window_size": (3, 3), "shift": (1, 1), "cosine": True},
        {"shape": (3, 5, 7, 2, 8), "window_size": (4, 5), "dtype": BF16},
        {"shape": (3, 3, 4, 2, 8), "window_size": (3, 4), "queries": 12, "cosine": True},
        {"shape": (2, 12, 6, 1, 8), "window_size": (12, 6), "shift": (6, 3), "cosine": True},
        {"shape": (1, 9, 8, 2, 8), "window_size": (9, 8), "queries": 72, "dtype": BF16},
        {"shape": (2, 4, 4, 2, 40), "window_size": (4, 4), "dtype": BF16},
    ],
    ids=["shifted", "padded", "queries", "blocks", "blocks-queries", "wide-head"],
)
def test_registers_what_kernels_of_windows_load(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reads partial sums, and their sums where no kernel does; what clamps and joins them is left out."""
    arguments, backward_arguments = operator_arguments(**{"parameter_dtype": case.get("dtype", FP32)} | case)
    forward, backward = operators(Target("triton"))
    _, table, *parameters, queries = arguments[:5]
    work, vectors = (
        window_attention.sizes(arguments[0], queries, *arguments[5:7], arguments[9]),
        parameters_in(parameters),
    )
    transposed = 0 if work.whole else table.nbytes
    accesses = Accesses(monkeypatch)
    forward(*arguments)
    assert bytes_moved(forward, *arguments)[0] == accesses.moved() + transposed
    assert bytes_loaded(forward, *arguments) == accesses.loaded(vectors) + transposed

    accesses.clear()
    backward(*backward_arguments)
    of_table, *of_parameters = window_attention.partial_shapes(work, arguments[9]).values()
    summed = math.prod(of_table)
    for parameter, shape in zip(parameters, of_parameters, strict=True):
        summed += math.prod(shape) + math.prod(shape[1:]) if parameter is not None and shape[0] > 0 else 0
    by_pytorch = 4 * summed + transposed + (0 if queries is None else queries.nbytes)
    assert bytes_moved(backward, *backward_arguments)[0] == accesses.moved() + by_pytorch
    assert bytes_loaded(backward, *backward_arguments) == accesses.loaded(vectors) + by_pytorch


def parameters_in(parameters: list[Tensor | None]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter is not None]
