"""Buffers between guard bytes, filled with NaN: a kernel that writes outside its buffers, or not all of them, shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD_BYTES = 256  # on either side of a guarded buffer; keeps its alignment
GUARD_BYTE = 0xFF  # NaN in every floating dtype, so that what is read there shows


class Guards(TorchDispatchMode):
    """Puts guard bytes around buffers: those that `place` copies, and those that this library's operators allocate.

    Allocations start out as all ones, which is NaN in every floating dtype, so that what is not written shows. They are
    seen as far as they go through PyTorch's dispatcher, from Python and from C++.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []
        self._operators: dict[str, int] = {}  # operator -> allocations seen

    def place(self, value: Any) -> Any:
        """A copy of a tensor between guards; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        dense = value if 0 not in value.stride() else value.contiguous()  # or elements would share their memory
        return self._allocate(dense.shape, dense.stride(), dense.dtype, dense.device).copy_(value)

    def check(self) -> None:
        """No guard has changed, and every operator's allocations were seen."""
        for operator, allocations in self._operators.items():
            assert allocations > 0, f"{operator} allocates where guards cannot see it"
        for buffer in self._buffers:
            for side, guard in (("before", buffer[:GUARD_BYTES]), ("behind", buffer[-GUARD_BYTES:])):
                assert bool((guard == GUARD_BYTE).all()), f"written {side} a buffer of {buffer.numel()} bytes"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "simmim_fast":
            before = len(self._buffers)
            with self:  # again, for what the kernel calls
                result = func.redispatch(backend_keys(args), *args)
            self._operators[str(func)] = len(self._buffers) - before
            return result
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS:
            return self._allocate(result.shape, result.stride(), result.dtype, result.device)
        return result

    def _allocate(self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
        buffer = torch.full(
            (elements * dtype.itemsize + 2 * GUARD_BYTES,), GUARD_BYTE, dtype=torch.uint8, device=device
        )
        self._buffers.append(buffer)
        return buffer[GUARD_BYTES:-GUARD_BYTES].fill_(0xFF).view(dtype).as_strided(shape, stride)


_ALLOCATIONS = (
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
)


def backend_keys(args: tuple) -> torch._C.DispatchKeySet:
    """Where a kernel is looked for, from the device of the first tensor: a redispatch there skips autograd."""
    device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
