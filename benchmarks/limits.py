"""What arithmetic and memory allow a training step on this machine, by rates that it reaches in the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from benchmarks.cases import DTYPES
from benchmarks.measure import copy_rate, matrix_rate
from benchmarks.models import build
from benchmarks.traffic import count_model
from simmim_fast import _native


@dataclass(frozen=True)
class Limits:
    """What bounds images/s.

    Attributes:
        flops_per_image: Of the matrix products of forward and backward of the plain model.
        bytes_per_image: That forward and backward of our fused model move at this batch; None where its compiled
            library, which counts them, is off.
        matrix_flops_per_second: Measured, in the dtype of the products.
        bytes_per_second: Measured, of a copy.
    """

    flops_per_image: float
    bytes_per_image: float | None
    matrix_flops_per_second: float
    bytes_per_second: float

    @property
    def arithmetic(self) -> float:
        """Images/s at most, by the matrix products; images/s over it are the model FLOP utilisation (MFU)."""
        return self.matrix_flops_per_second / self.flops_per_image

    @property
    def memory(self) -> float | None:
        """Images/s at most, by the memory."""
        return None if self.bytes_per_image is None else self.bytes_per_second / self.bytes_per_image

    def as_json(self) -> dict[str, float | None]:
        """The attributes by name."""
        return asdict(self)


def limits(name: str, dtype: str, batch: int, device: str) -> Limits:
    """Counts a model's step on shapes alone, as `benchmarks.traffic` does, and measures the machine.

    Args:
        name: Key of `benchmarks.models.MODELS`.
        dtype: "bf16" or "fp32".
        batch: Images in a step.
        device: "cpu" or "cuda".
    """
    with torch.device("meta"):
        plain, fused = (build(name, backend=backend) for backend in ("reference", "native"))
    (work,) = count_model(plain, [batch], dtype)
    moved = None
    if _native.why_not("cpu") is None:
        (traffic,) = count_model(fused, [batch], dtype)
        moved = traffic.nbytes / batch
    return Limits(work.flops / batch, moved, matrix_rate(DTYPES[dtype], device), copy_rate(device))
