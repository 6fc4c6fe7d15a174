"""What launchers assume of a GPU when they cut work into programs."""

from __future__ import annotations

from collections.abc import Collection

import torch

MULTIPROCESSORS = 132  # of an H100: programs that take a multiprocessor for themselves
ENOUGH_PROGRAMS = 512  # small ones, of which a multiprocessor holds about four
WITHOUT_GPU = 90  # what is counted and interpreted on a CPU is cut as on an H100


def capability_of(device: torch.device, known: Collection[int]) -> int:
    """The nearest compute capability (90 is 9.0) at or below the device's among those that are known.

    12.0, of Blackwell without tensor memory, has the products and the shared memory of 8.9, and so its tiles.
    """
    if device.type != "cuda":
        return WITHOUT_GPU
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:
        major, minor = 8, 9
    return max(capability for capability in known if capability <= 10 * major + minor)
