"""What every op is tested on: its backends, and where each one runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest


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

FUZZ = pytest.mark.fuzz  # boundary shapes from hypothesis, as many as the profile in conftest.py says
