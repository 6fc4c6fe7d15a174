"""Calls of this library's operators as they are made, and the memory that each one takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, UntypedStorage
from torch._ops import OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simmim_fast.testing import backend_keys


@dataclass(frozen=True)
class OperatorCall:
    """One call of an operator of this library.

    Attributes:
        operator: Which one.
        args: Its arguments.
        given: Bytes of the tensors among them.
        born: Bytes of the memory that came into being during the call.
        scratch: How much of it is not returned.
        read_by_pytorch: Bytes of the tensors that PyTorch's own operators read during the call.
    """

    operator: OpOverloadPacket
    args: tuple
    given: int
    born: int
    scratch: int
    read_by_pytorch: int


class OperatorCalls(TorchDispatchMode):
    """Notes every call of an operator of this library, and the memory that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OperatorCall] = []
        # By address, inside an operator: held, or an address would be given out again and counted once.
        self._memory: dict[int, UntypedStorage] | None = None
        self._read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "simmim_fast":
            return self._operator(func, args)
        result = func(*args, **(kwargs or {}))
        if self._memory is not None:
            known = memory(args)
            new = {at: storage for at, storage in memory(result).items() if at not in known}
            self._memory.update(new)
            self._read += _read(func, args) if new else 0
        return result

    def _operator(self, func: Any, args: tuple) -> Any:
        self._memory, self._read = {}, 0
        with self:
            result = func.redispatch(backend_keys(args), *args)
        born, kept, given = (nbytes(held) for held in (self._memory, memory(result), memory(args)))
        self._memory = None
        self.calls.append(OperatorCall(func.overloadpacket, args, given, born, born - kept, self._read))
        return result


def memory(values: Any) -> dict[int, UntypedStorage]:
    """The storage behind every tensor, by address."""
    storages = (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
    return {storage.data_ptr(): storage for storage in storages}


def nbytes(storages: dict[int, UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def _read(func: Any, args: Any) -> int:
    """Bytes of the arguments of an operator that makes a tensor, where it takes more of them than shape and dtype."""
    name = func.overloadpacket.__name__
    looks_alone = name.startswith("new_") or name.endswith("_like")
    return 0 if looks_alone else sum(value.nbytes for value in tree_leaves(args) if isinstance(value, Tensor))
