"""Calls of this library's operators as they are made, and the memory that each one takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
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
    """

    operator: OpOverloadPacket
    args: tuple
    given: int
    born: int
    scratch: int


class OperatorCalls(TorchDispatchMode):
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
