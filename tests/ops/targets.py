"""What every op is tested on: its backends, and where each one runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, reject
from hypothesis.strategies import SearchStrategy
from torch.utils._pytree import tree_leaves

from simmim_fast.testing import BudgetError


@dataclass(frozen=True)
class Target:
    """A backend on a device.

    Attributes:
        backend: Name for the op's `backend` argument.
        device: Where the tensors are.
        cuda_on_host: "native" runs the bodies of the CUDA kernels, compiled for the CPU.
    """

    backend: str
    device: str = "cpu"
    cuda_on_host: bool = False

    @property
    def emulated(self) -> bool:
        """Whether GPU code runs on the CPU, where a block costs a millisecond or more."""
        return self.cuda_on_host or (self.backend == "triton" and self.device == "cpu")

    def takes(self, *dtypes: Any) -> bool:
        """Whether it takes all of these dtypes, each one or a tuple: Triton on a GPU takes no float64."""
        return (self.backend, self.device) != ("triton", "cuda") or torch.float64 not in tree_leaves(dtypes)


GPU_OPERATORS = [
    pytest.param(Target("native", "cuda"), id="native-gpu", marks=pytest.mark.gpu),
    pytest.param(Target("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
]
OPERATORS = [
    pytest.param(Target("native"), id="native"),
    pytest.param(Target("native", cuda_on_host=True), id="cuda-on-host"),
    pytest.param(Target("triton"), id="triton-interpreted", marks=pytest.mark.interpreted),
    *GPU_OPERATORS,
]
TARGETS = [pytest.param(Target("reference"), id="reference"), *OPERATORS]

DRAWS = 3


def fuzzed(**strategies: SearchStrategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let hypothesis choose a test's arguments, `seed` among them; as many as the profile in conftest.py says.

    An error above its budget counts where it is above with three seeds. With one, a sum of few terms that nearly cancel
    is wrong by a few eps, and once in some hundred times the reference, whose error is the measure, happens to be right
    to the last bit. A dtype is drawn again that the target does not take.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def drawn(*args: Any, seed: int, **kwargs: Any) -> None:
            if not kwargs.get("target", TARGETS[0].values[0]).takes(*kwargs.values()):
                reject()
            for draw in range(DRAWS):
                try:
                    return test(*args, seed=seed + 1000 * draw, **kwargs)
                except BudgetError:
                    if draw == DRAWS - 1:
                        raise

        return pytest.mark.fuzz(given(**strategies)(drawn))

    return decorate
