"""What a training step asks of a GPU: its calls, kernel launches, floating-point operations and bytes.

A dispatch mode watches the operators that reach PyTorch's backends, below autograd and autocast. An operator's bytes
are those of its inputs and outputs; for this library's operators, what they registered for CUDA. Views and allocations
move nothing and are no calls. No data is read: on fake tensors (`hollow`) nothing is computed, and the counts are the
same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from benchmarks.cost import launches, meta
from simmim_fast.ops import bytes_moved, flops

_ATEN = torch.ops.aten
# A view in all but its schema, and allocations without a value.
_FREE = (
    _ATEN._unsafe_view,
    _ATEN.empty,
    _ATEN.empty_like,
    _ATEN.empty_strided,
    _ATEN.new_empty,
    _ATEN.new_empty_strided,
)
# They read the shape of their first argument alone: some make a new tensor, some write over the one they get.
_READ_NO_SELF = (
    *(_ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like, _ATEN.rand_like, _ATEN.randn_like),
    *(_ATEN.new_zeros, _ATEN.new_ones, _ATEN.new_full),
    *(_ATEN.zero_, _ATEN.fill_, _ATEN.copy_, _ATEN.bernoulli_, _ATEN.uniform_, _ATEN.normal_),
)
# PyTorch counts the products of its CUDA attention kernels only; these are what a CPU calls in their place.
_FLOP_FORMULAS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value: sdpa_flop(
        query.shape, key.shape, value.shape
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value: sdpa_backward_flop(
        grad.shape, query.shape, key.shape, value.shape
    ),
}


@dataclass(frozen=True)
class Call:
    """One operator's call.

    Attributes:
        op: The operator's name.
        launches: Kernels that it launches on a GPU: one, at least, for an operator of PyTorch; what the Triton launcher
            launches for one of this library.
        flops: Floating-point operations of matrix products, as `torch.utils.flop_counter` has them.
        nbytes: Bytes read and written.
    """

    op: str
    launches: int
    flops: int
    nbytes: int

    def seconds(self, peak: float, bandwidth: float) -> float:
        """The least time on a GPU of so many FLOP/s and bytes/s."""
        return max(self.flops / peak, self.nbytes / bandwidth)


@dataclass(frozen=True)
class Traffic:
    """What a step does.

    Attributes:
        calls: Its calls, in order.
        saved: Bytes of the storages that autograd holds for backward, each counted once.
    """

    calls: tuple[Call, ...]
    saved: int

    @property
    def launches(self) -> int:
        """Kernel launches, at least."""
        return sum(call.launches for call in self.calls)

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(call.flops for call in self.calls)

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return sum(call.nbytes for call in self.calls)

    def seconds(self, peak: float, bandwidth: float) -> float:
        """A lower bound of the time on a GPU of so many FLOP/s and bytes/s: every call at its limit, no time between.

        It holds where no call finds in the cache what another left there, as in large batches.
        """
        return sum(call.seconds(peak, bandwidth) for call in self.calls)

    def of(self, op: str) -> Traffic:
        """The calls of one operator alone, which save nothing."""
        return Traffic(tuple(call for call in self.calls if call.op == op), 0)


def count(step: Callable[[], Any], *, kept: Iterable[Tensor] = ()) -> Traffic:
    """Run a step and count what it does.

    Args:
        step: Any function: the forward and backward of a model, ours or a peer's. Its tensors may be fake.
        kept: Tensors that are there anyway, such as the parameters: not counted as saved for backward.
    """
    saved = _Saved(kept)
    with _Counter() as counter, saved_tensors_hooks(saved.pack, saved.unpack):
        step()
    return Traffic(
        tuple(entry if isinstance(entry, Call) else _own_call(*entry) for entry in counter.entries), saved.nbytes
    )


@contextmanager
def no_data() -> Iterator[None]:
    """Inside, tensors have shapes and no values: what is made is fake, and nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def hollow(module: nn.Module) -> nn.Module:
    """The module itself, its tensors replaced by fake ones of the CPU: to call and use inside `no_data`.

    It is built outside: constructors read values.
    """
    return module.to_empty(device="cpu")


class _Counter(TorchDispatchMode):
    """Collects calls; of this library's operators, the operator and its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Call | tuple[OpOverloadPacket, tuple]] = []

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "simmim_fast":
            self.entries.append((func.overloadpacket, tuple(map(_Shape.of, args))))
        elif _works(func, (args, kwargs, out)):
            self.entries.append(_call(func, args, kwargs, out))
        return out


@dataclass(frozen=True)
class _Shape:
    """A tensor without its data, in no mode's hands."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(value: Any) -> Any:
        return _Shape(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


class _Saved:
    """Hooks that add up the storages saved in the forward."""

    def __init__(self, kept: Iterable[Tensor]) -> None:
        self._storages = {_key(tensor): tensor.untyped_storage() for tensor in kept}  # held, or an address comes twice
        self.nbytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        in_backward = torch._C._current_graph_task_id() != -1  # where activation checkpointing saves again
        if not in_backward and _key(tensor) not in self._storages:
            self._storages[_key(tensor)] = tensor.untyped_storage()
            self.nbytes += tensor.untyped_storage().nbytes()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _works(func: OpOverload, values: Any) -> bool:
    """Whether a call handles tensors, and returns neither a view of its argument nor memory that nobody wrote."""
    is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
    handles = any(isinstance(leaf, Tensor) for leaf in tree_leaves(values))
    return handles and not is_view and func.overloadpacket not in _FREE and func.namespace != "prim"


def _call(func: OpOverload, args: tuple, kwargs: dict[str, Any], out: Any) -> Call:
    read = args[1:] if func.overloadpacket in _READ_NO_SELF else args
    nbytes = sum(_nbytes(leaf) for leaf in tree_leaves((read, kwargs, out)))
    return Call(str(func.overloadpacket), 1, _flops(func.overloadpacket, args, kwargs, out), nbytes)


def _own_call(operator: OpOverloadPacket, shapes: tuple) -> Call:
    args = tuple(
        meta(shape.size, shape.stride, shape.dtype) if isinstance(shape, _Shape) else shape for shape in shapes
    )
    return Call(str(operator), len(launches(operator, args)), flops(operator, *args), sum(bytes_moved(operator, *args)))


def _nbytes(leaf: Any) -> int:
    """Bytes of the elements of a tensor, of which those that an expanded axis repeats are moved once."""
    if not isinstance(leaf, Tensor):
        return 0
    sizes = zip(leaf.shape, leaf.stride(), strict=True)
    return leaf.element_size() * math.prod(1 if stride == 0 and size > 0 else size for size, stride in sizes)


def _flops(operator: OpOverloadPacket, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    if operator in _FLOP_FORMULAS:
        formula = _FLOP_FORMULAS[operator]
        return formula(*args[: formula.__code__.co_argcount])
    return flop_registry[operator](*args, **kwargs, out_val=out) if operator in flop_registry else 0
