"""What every op owes whoever calls it, whatever it computes: the same few tests for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from simmim_fast import ops
from simmim_fast._backends import BackendError
from simmim_fast.ops import OPS, bytes_moved
from simmim_fast.testing import (
    assert_equal,
    assert_repeats,
    assert_right,
    backend_keys,
    biased_attention_inputs,
    differentiable,
    random_gradient,
    random_tensor,
    run,
    shifted_window_attention_inputs,
    small_inputs,
)
from tests.ops.targets import GPU_OPERATORS, OPERATORS, Target

BF16, FP32 = torch.bfloat16, torch.float32

every_op = pytest.mark.parametrize("op", OPS)
on_operators = pytest.mark.parametrize("target", OPERATORS, indirect=True)
on_gpu = pytest.mark.parametrize("target", GPU_OPERATORS, indirect=True)
on_gpu_code = pytest.mark.parametrize("target", [one for one in OPERATORS if one.id != "native"], indirect=True)


def on(op: str, target: Target) -> Callable[..., Tensor]:
    """The public function, bound to a backend; skipped where the op has no such kernel."""
    device = "cuda" if target.cuda_on_host else target.device
    if target.backend == "native" and device not in OPS[op].native_devices:
        pytest.skip(f"there is no CUDA C++ for {op}")
    return partial(getattr(ops, op), backend=target.backend)


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
    with Traffic() as traffic:
        function(**small_inputs(op, 2, device=target.device))
    (call,) = traffic.calls
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


@dataclass(frozen=True)
class OperatorCall:
    """One call of an operator of this library.

    Attributes:
        operator: Which one.
        args: Its arguments.
        given: Bytes of the tensors among them.
        born: Bytes of the memory that came into being during the call.
        scratch: How much of it is not returned.
    """

    operator: OpOverloadPacket
    args: tuple
    given: int
    born: int
    scratch: int


class Traffic(TorchDispatchMode):
    """Notes every call of an operator of this library, and the memory that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OperatorCall] = []
        self._memory: dict[int, int] | None = None  # address -> bytes, inside an operator

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "simmim_fast":
            return self._operator(func, args)
        result = func(*args, **(kwargs or {}))
        if self._memory is not None:
            known = memory(args)
            self._memory.update({at: size for at, size in memory(result).items() if at not in known})
        return result

    def _operator(self, func: Any, args: tuple) -> Any:
        self._memory = {}
        with self:
            result = func.redispatch(backend_keys(args), *args)
        born, kept = sum(self._memory.values()), sum(memory(result).values())
        self._memory = None
        self.calls.append(OperatorCall(func.overloadpacket, args, sum(memory(args).values()), born, born - kept))
        return result


def memory(values: Any) -> dict[int, int]:
    """Address and bytes of the storage behind every tensor."""
    storages = (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@every_op
@on_gpu_code
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_registers_the_bytes_that_it_moves(target: Target, op: str, dtype: torch.dtype) -> None:
    """At least the inputs and workspaces are read; written is what is allocated, no more and no less."""
    inputs = small_inputs(op, 20, dtype=dtype, device=target.device)  # more than one chunk of images
    grad_out = random_gradient(on(op, target), inputs)
    with Traffic() as traffic:
        run(on(op, target), inputs, grad_out, differentiable(inputs))
    assert len(traffic.calls) == 2, "forward and backward"
    for call in traffic.calls:
        read, written = bytes_moved(call.operator, *call.args)
        assert written == call.born, f"{call.operator} registers {written} bytes written, {call.born} came into being"
        assert read >= call.given + call.scratch, f"{call.operator} reads less than its inputs and workspaces"


def windows(*args: Any, **options: Any) -> tuple[str, Callable[..., dict[str, Any]]]:
    return "shifted_window_attention", partial(shifted_window_attention_inputs, *args, **options)


# Every kernel and every path through it: windows of three and four warps, and of several tiles; lists; bytes.
SANITIZED = {
    **{op: (op, partial(small_inputs, op, 3)) for op in OPS},
    "window of 36, cosine, padded": windows((1, 13, 11, 2, 32), (6, 6), (3, 3), cosine=True),
    "window of 49, padded": windows((1, 13, 11, 2, 32), (7, 7), (3, 3)),
    "window of 144, cosine, padded": windows((1, 20, 23, 1, 32), (12, 12), (6, 6), cosine=True),
    "window with queries": windows((2, 6, 6, 2, 32), (6, 6), queries=22),
    "attention with queries": ("biased_attention", partial(biased_attention_inputs, (2, 70, 2, 32), queries=9)),
    "embedding of a list": ("masked_patch_embed", partial(small_inputs, "masked_patch_embed", 3, visible=True)),
    "head of a list": ("linear_masked_loss", partial(small_inputs, "linear_masked_loss", 3, tokens=True)),
}


@pytest.mark.sanitize
@on_gpu
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("case", SANITIZED)
def test_small_case(target: Target, case: str, dtype: torch.dtype) -> None:
    """For compute-sanitizer, `make sanitize`: memory is neither poisoned nor guarded, which would initialise it."""
    op, draw = SANITIZED[case]
    function, inputs = on(op, target), draw(dtype=dtype, device=target.device)
    grad_out = random_gradient(partial(getattr(ops, op), backend="reference"), inputs)
    try:
        actual = run(function, inputs, grad_out, differentiable(inputs))
    except BackendError as error:
        pytest.skip(str(error))
    reference = partial(getattr(ops, op), backend="reference")
    assert_right(actual, reference, inputs, grad_out, wanted=differentiable(inputs))


@every_op
@on_gpu
def test_repeats_250_times(target: Target, op: str) -> None:
    inputs = small_inputs(op, 3, dtype=BF16, device=target.device)
    grad_out = random_gradient(on(op, target), inputs)
    assert_repeats(partial(run, on(op, target), inputs, grad_out, differentiable(inputs)), times=250)
