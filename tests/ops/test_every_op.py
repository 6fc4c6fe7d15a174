"""What every op owes PyTorch, whatever it computes: transforms, compilation, export, checkpoints, CUDA graphs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from simmim_fast import ops
from simmim_fast._backends import TRITON_INTERPRETED
from simmim_fast.testing import (
    assert_equal,
    assert_right,
    differentiable,
    offline,
    random_gradient,
    random_tensor,
    run,
    small_inputs,
)
from tests.ops.every_op import (
    CASES,
    TILED,
    every_case,
    every_case_and_tiled,
    every_op,
    forward_and_backward,
    mixed_precision,
    on,
    on_gpu,
    on_operators,
    skip_refused,
)
from tests.ops.operator_calls import OperatorCalls
from tests.ops.targets import TARGETS, Target


class Call(nn.Module):
    """An op as a module of its tensors, which is what torch.export takes."""

    def __init__(self, function: Callable[..., Tensor], inputs: dict[str, Any]) -> None:
        super().__init__()
        self.names = list(tensors_of(inputs))
        self.function = partial(function, **{name: inputs[name] for name in inputs if name not in self.names})

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(**dict(zip(self.names, tensors, strict=True)))


def tensors_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


@pytest.mark.smoke
@every_op
@on_gpu
def test_is_right_as_it_is_timed(target: Target, op: str) -> None:
    inputs = small_inputs(op, 2, **mixed_precision(op), device=target.device)
    reference = partial(getattr(ops, op), backend="reference")
    grad_out = random_gradient(reference, inputs)
    actual = run(on(op, target), inputs, grad_out, differentiable(inputs))
    assert_right(actual, reference, inputs, grad_out, wanted=differentiable(inputs))


@every_op
@on_operators
def test_refuses_transforms(target: Target, op: str) -> None:
    function = on(op, target)
    with pytest.raises(RuntimeError, match=r"no torch\.func transform, no forward mode"):
        differentiate_forwards(function, small_inputs(op, 2, device=target.device))


@every_op
def test_auto_takes_the_reference_inside_a_transform(op: str) -> None:
    inputs = small_inputs(op, 2)
    function, reference = getattr(ops, op), partial(getattr(ops, op), backend="reference")
    _, expected = differentiate_forwards(reference, inputs)
    assert all(bool(tangent.any()) for tangent in tree_leaves(expected))
    assert_equal(differentiate_forwards(function, inputs)[1], expected, "tangent")


def differentiate_forwards(function: Callable[..., Tensor], inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and tangent along the first argument that is differentiable."""
    name = differentiable(inputs)[0]
    value = inputs[name]
    tangent = random_tensor(value.shape, value.dtype, torch.Generator().manual_seed(2)).to(value.device)
    return torch.func.jvp(lambda one: function(**inputs | {name: one}), (value,), (tangent,))


@every_op
@on_operators
def test_vmap_of_an_operator_is_refused(target: Target, op: str) -> None:
    function = on(op, target)
    with OperatorCalls() as made:
        function(**small_inputs(op, 2, device=target.device))
    (call,) = made.calls
    first, *others = call.args
    with pytest.raises(RuntimeError, match="cannot be vmapped: put the axis into the batch"):
        torch.func.vmap(lambda one: call.operator(one, *others))(torch.stack([first, first]))


@every_op
@on_operators
def test_exports_with_a_dynamic_batch(target: Target, op: str) -> None:
    function = on(op, target)
    inputs, others = small_inputs(op, 5, device=target.device), small_inputs(op, 11, device=target.device, seed=1)
    batch = torch.export.Dim("batch")
    tensors = tuple(tensors_of(inputs).values())
    shapes = tuple({0: batch} if tensor.shape[0] == 5 else None for tensor in tensors)
    program = torch.export.export(Call(function, inputs), tensors, dynamic_shapes={"tensors": shapes})
    assert f"simmim_fast.{op}_{target.backend}" in str(program.graph)
    assert_equal(program.module()(*tensors_of(others).values()), function(**others), "out")


@every_case
@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@on_operators
def test_compiles_with_a_dynamic_batch(target: Target, engine: str, case: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(engine)
    op, draw = CASES[case]
    compiled = torch.compile(on(op, target), fullgraph=True, backend=counter)
    reference = partial(getattr(ops, op), backend="reference")
    for batch in (2, 3, 5):
        inputs = draw(batch, **mixed_precision(op), device=target.device)
        grad_out = random_gradient(reference, inputs)
        actual = run(compiled, inputs, grad_out, differentiable(inputs))
        assert_right(actual, reference, inputs, grad_out, wanted=differentiable(inputs))
    assert counter.frame_count <= 2, "recompiled for the third batch size"


@every_case
@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_reads_no_data(target: Target, case: str) -> None:
    """Fake tensors have none: reading a value, as to wait for a device, raises."""
    op, draw = CASES[case]
    inputs = draw(2, **mixed_precision(op), device=target.device)
    expected = forward_and_backward(on(op, target), op, inputs)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, inputs)
        results = forward_and_backward(on(op, target), op, fakes)
    for name, result in results.items():
        assert (result.shape, result.dtype, result.stride()) == (
            expected[name].shape,
            expected[name].dtype,
            expected[name].stride(),
        )


@pytest.mark.skipif(TRITON_INTERPRETED, reason="the interpreter's kernels cannot be kept from running")
@every_case
def test_launchers_read_no_data(case: str) -> None:
    """The launchers of the Triton kernels, on the meta device: a value, or a size that depends on one, raises there."""
    op, draw = CASES[case]
    kernels = importlib.import_module(f"simmim_fast.ops.{op}.kernels")
    with OperatorCalls() as made:
        forward_and_backward(on(op, Target("native")), op, draw(2, **mixed_precision(op)))
    for call, launcher in zip(made.calls, (kernels.forward, kernels.backward), strict=True):
        args = tree_map_only(Tensor, partial(torch.empty_like, device="meta"), call.args)
        with offline.recorded() as launched:
            results = launcher(*args)
        assert launched
        for result, expected in zip(tree_leaves(results), tree_leaves(call.operator(*args)), strict=True):
            assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())


@every_case
@on_operators
def test_repeats_under_activation_checkpointing(target: Target, case: str) -> None:
    op, draw = CASES[case]
    inputs = draw(2, device=target.device)
    expected = forward_and_backward(on(op, target), op, inputs)
    checkpointed = partial(checkpoint, on(op, target), use_reentrant=False)
    for name, result in forward_and_backward(checkpointed, op, inputs).items():
        assert_equal(result, expected[name], name)


@every_case
@on_operators
def test_refuses_a_second_derivative(target: Target, case: str) -> None:
    op, draw = CASES[case]
    inputs = draw(2, device=target.device)
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable(inputs)}
    loss = sum(out.square().sum() for out in tree_leaves(on(op, target)(**inputs | leaves)))
    gradients = torch.autograd.grad(loss, tuple(leaves.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        sum(gradient.sum() for gradient in gradients).backward()


@every_case_and_tiled
@on_gpu
def test_a_cuda_graph_replays_both_directions(target: Target, case: str) -> None:
    op, draw = (CASES | TILED)[case]
    inputs, others = (draw(2, device=target.device, seed=seed) for seed in (0, 1))
    skip_refused(target, op, inputs)
    grad_out = random_gradient(partial(getattr(ops, op), backend="reference"), inputs)
    replayed = partial(run, on(op, target), inputs, grad_out, differentiable(inputs))
    replayed()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = replayed()
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value.copy_(others[name])
    graph.replay()
    for name, expected in run(on(op, target), others, grad_out, differentiable(others)).items():
        assert_equal(results[name], expected, name)
