"""What every op does with memory: any alignment, any gradient, no more bytes than it registers, the same every time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from simmim_fast import ops
from simmim_fast.ops import bytes_moved
from simmim_fast.testing import (
    assert_equal,
    assert_repeats,
    assert_right,
    differentiable,
    random_gradient,
    run,
    small_inputs,
)
from tests.ops.every_op import (
    CASES,
    TILED,
    Case,
    every_case,
    every_case_and_tiled,
    every_op,
    forward_and_backward,
    on,
    on_gpu,
    on_operators,
    skip_refused,
    small,
    windows,
)
from tests.ops.operator_calls import OperatorCalls
from tests.ops.targets import OPERATORS, TARGETS, Target

BF16, FP32 = torch.bfloat16, torch.float32

on_gpu_code = pytest.mark.parametrize("target", [one for one in OPERATORS if one.id != "native"], indirect=True)


@every_op
@on_operators
def test_takes_tensors_that_are_not_aligned(target: Target, op: str) -> None:
    inputs = small_inputs(op, 2, device=target.device)
    grad_out = random_gradient(on(op, target), inputs)
    expected = run(on(op, target), inputs, grad_out, differentiable(inputs))
    shifted = {name: misaligned(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for name, result in run(on(op, target), shifted, tree_map(misaligned, grad_out), differentiable(inputs)).items():
        assert_equal(result, expected[name], name)


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, one element off the alignment that an allocation has."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


@every_case
@on_operators
def test_takes_an_expanded_gradient(target: Target, case: str) -> None:
    op, draw = CASES[case]
    inputs = draw(2, device=target.device)
    whole = random_gradient(partial(getattr(ops, op), backend="reference"), inputs)
    one = tree_map(lambda grad: grad.new_ones(()).expand(grad.shape), whole)
    expected = run(on(op, target), inputs, tree_map(Tensor.contiguous, one), differentiable(inputs))
    for name, result in run(on(op, target), inputs, one, differentiable(inputs)).items():
        assert_equal(result, expected[name], name)


@every_case
@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_gives_one_gradient_alone(target: Target, case: str) -> None:
    op, draw = CASES[case]
    inputs = draw(2, device=target.device)
    reference = partial(getattr(ops, op), backend="reference")
    grad_out = random_gradient(reference, inputs)
    for name in differentiable(inputs):
        actual = run(on(op, target), inputs, grad_out, [name])
        assert_right(actual, reference, inputs, grad_out, wanted=[name])


# Adds up in memory, so it writes some of it more than once. Its own tests count every load and store.
ADDS_UP_IN_MEMORY = {"biased_attention"}


@every_op
@on_gpu_code
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_registers_the_bytes_that_it_moves(target: Target, op: str, dtype: torch.dtype) -> None:
    """At least the inputs and workspaces are read; written is what is allocated, no more and no less."""
    inputs = small_inputs(op, 20, dtype=dtype, device=target.device)  # more than one chunk of images
    grad_out = random_gradient(on(op, target), inputs)
    with OperatorCalls() as made:
        run(on(op, target), inputs, grad_out, differentiable(inputs))
    assert len(made.calls) == 2, "forward and backward"
    for call in made.calls:
        read, written = bytes_moved(call.operator, *call.args)
        right = written >= call.born if op in ADDS_UP_IN_MEMORY else written == call.born
        assert right, f"{call.operator} registers {written} bytes written, {call.born} came into being"
        assert read >= call.given + call.scratch, f"{call.operator} reads less than its inputs and workspaces"


# Every kernel and every path through it: windows of two, three and four warps, and of several tiles; lists; bytes.
SANITIZED: dict[str, Case] = {
    **CASES,
    **TILED,
    "window of 32": windows((5, 9), (4, 8), (2, 4)),
    "window of 36, cosine, padded": windows((13, 11), (6, 6), (3, 3), cosine=True),
    "window of 49, padded": windows((13, 11), (7, 7), (3, 3)),
    "window of 36 with queries": windows((6, 6), (6, 6), queries=22),
    "embedding of bytes": small("masked_patch_embed", image_dtype=torch.uint8),
    "embedding without a norm": small("masked_patch_embed", norm=False),
    "loss of bytes": small("masked_l1_loss", target_dtype=torch.uint8),
    "head of bytes": small("linear_masked_loss", target_dtype=torch.uint8),
    "l2": small("linear_masked_loss", loss="l2"),
    "smooth_l1": small("linear_masked_loss", loss="smooth_l1"),
}


@pytest.mark.sanitize
@on_gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SANITIZED)
def test_small_case(target: Target, case: str, dtype: torch.dtype) -> None:
    """For compute-sanitizer, `make sanitize`: memory is neither poisoned nor guarded, which would initialise it."""
    op, draw = SANITIZED[case]
    function, inputs = on(op, target), draw(2, dtype=dtype, device=target.device)
    reference = partial(getattr(ops, op), backend="reference")
    grad_out = random_gradient(reference, inputs)
    skip_refused(target, op, inputs)
    actual = run(function, inputs, grad_out, differentiable(inputs))
    assert_right(actual, reference, inputs, grad_out, wanted=differentiable(inputs))


@every_case_and_tiled
@on_gpu
def test_repeats_250_times(target: Target, case: str) -> None:
    op, draw = (CASES | TILED)[case]
    inputs = draw(3, dtype=BF16, device=target.device)
    skip_refused(target, op, inputs)
    assert_repeats(partial(forward_and_backward, on(op, target), op, inputs), times=250)
