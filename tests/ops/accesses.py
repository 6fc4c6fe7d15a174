"""What interpreted Triton kernels load and store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from torch import Tensor


class Accesses:
    """Bytes that interpreted kernels load and store, where their masks are set.

    Attributes:
        stored: Bytes stored so far.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        self.stored = 0
        self._loads: list[tuple[int, np.ndarray, int]] = []  # kernel, addresses, bytes of each
        self._stores: list[tuple[int, np.ndarray, int]] = []
        self._kernel = 0
        call = GridExecutor.__call__
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_call(*args: Any, **kwargs: Any) -> Any:
            self._kernel += 1
            return call(*args, **kwargs)

        def counted_load(builder: InterpreterBuilder, pointers: Any, mask: Any, *args: Any) -> Any:
            self._loads.append((self._kernel, pointers.data[mask.data.astype(bool)], itemsize(pointers)))
            return load(builder, pointers, mask, *args)

        def counted_store(builder: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
            self.stored += int(mask.data.sum()) * itemsize(pointers)
            self._stores.append((self._kernel, pointers.data[mask.data.astype(bool)], itemsize(pointers)))
            return store(builder, pointers, value, mask, *args)

        monkeypatch.setattr(GridExecutor, "__call__", counted_call)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def loaded(self, once: Iterable[Tensor] = ()) -> int:
        """Bytes loaded so far; of the tensors in `once` each element counts once for every kernel that loads it."""
        ranges = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in once]

        def of_once(addresses: np.ndarray) -> np.ndarray:
            inside = np.zeros(addresses.shape, bool)
            for first, end in ranges:
                inside |= (addresses >= first) & (addresses < end)
            return inside

        repeated = sum(size * int((~of_once(addresses)).sum()) for _, addresses, size in self._loads)
        return repeated + _distinct((kernel, found[of_once(found)], size) for kernel, found, size in self._loads)

    def moved(self) -> int:
        """Bytes loaded so far, of each element once for every kernel that loads it."""
        return _distinct(self._loads)

    def written(self) -> int:
        """Bytes stored so far, of each element once for every kernel that stores it."""
        return _distinct(self._stores)

    def clear(self) -> None:
        """Forget all of them."""
        self.stored = 0
        self._loads.clear()
        self._stores.clear()


def _distinct(accesses: Iterable[tuple[int, np.ndarray, int]]) -> int:
    seen: dict[tuple[int, int], set[int]] = {}
    for kernel, addresses, size in accesses:
        seen.setdefault((kernel, size), set()).update(addresses.tolist())
    return sum(size * len(addresses) for (_, size), addresses in seen.items())


def itemsize(pointers: Any) -> int:
    return pointers.get_element_ty().primitive_bitwidth // 8
