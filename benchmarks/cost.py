"""What a case must cost: the operators that it calls, the bytes that they move, their floating-point operations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.cases import Case
from simmim_fast import ops
from simmim_fast.ops import OPS, bytes_moved, flops

if TYPE_CHECKING:
    from simmim_fast.testing.offline import Launch

Call = tuple[OpOverloadPacket, tuple]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "simmim_fast":
            self.calls.append((func.overloadpacket, args))
        return func(*args, **(kwargs or {}))


def operator_calls(case: Case, batch: int, dtype: torch.dtype) -> tuple[Call, Call]:
    """The operator of the forward and of the backward, with fake arguments: nothing is computed."""
    with FakeTensorMode() as mode:
        real = case.inputs(batch, dtype, "meta")
        inputs = {name: _fake(value, mode) for name, value in real.items()}
        with _Recorder() as recorder:
            out = getattr(ops, case.op)(**inputs, backend="native")
            torch.autograd.grad(out, case.leaves(inputs), tree_map(torch.empty_like, out))
    forward, backward = recorder.calls
    return forward, backward


def cost(case: Case, batch: int, dtype: torch.dtype) -> tuple[tuple[int, int], tuple[int, int]]:
    """(bytes, FLOPs) that a case's results take, forward and backward, as the op registers them for CUDA."""
    forward, backward = operator_calls(case.least or case, batch, dtype)
    return tuple((sum(bytes_moved(operator, *args)), flops(operator, *args)) for operator, args in (forward, backward))


def launches(operator: OpOverloadPacket, args: tuple, capability: int | None = None) -> list[Launch]:
    """The kernels that an operator's Triton launcher launches for these arguments, on the meta device; none is run.

    Args:
        operator: One of this library's.
        args: Its arguments, tensors on the meta device.
        capability: Compute capability of the GPU, 90 for 9.0, for launchers that look at it (`kernels.capability_of`);
            without it, what they take where there is no GPU.
    """
    from simmim_fast.testing import offline

    name = operator._qualified_op_name.removeprefix("simmim_fast::")
    op = max((op for op in OPS if name.startswith(op)), key=len)
    kernels = importlib.import_module(f"simmim_fast.ops.{op}.kernels")
    launcher = kernels.backward if name.endswith("_backward") else kernels.forward
    if capability is None or not hasattr(kernels, "capability_of"):
        return offline.launches(launcher, *args)
    with mock.patch.object(kernels, "capability_of", return_value=capability):
        return offline.launches(launcher, *args)


def meta(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of these sizes and strides, without data."""
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, Tensor):
        return value
    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return fake.requires_grad_(value.requires_grad)
