"""How many blocks of a kernel one multiprocessor holds at a time, from what the kernel takes."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has.

    Attributes:
        warps: Warps at a time.
        blocks: Blocks at a time.
        registers: 32-bit registers.
        shared: Bytes of shared memory.
    """

    warps: int
    blocks: int
    registers: int
    shared: int


# NVIDIA, CUDA C++ Programming Guide, technical specifications per compute capability.
LIMITS = {
    80: Limits(warps=64, blocks=32, registers=64 * KIB, shared=164 * KIB),
    90: Limits(warps=64, blocks=32, registers=64 * KIB, shared=228 * KIB),
    100: Limits(warps=64, blocks=32, registers=64 * KIB, shared=228 * KIB),
}
# NVIDIA's cuda_occupancy.h, the same for all three.
WARP_THREADS = 32
REGISTER_UNIT = 256  # registers are given to a warp in such units,
PARTITIONS = 4  # out of one of so many equal parts
SHARED_UNIT = 128  # bytes; shared memory is given to a block in such units, what the system reserves of it included
SHARED_RESERVED = 1 * KIB


@dataclass(frozen=True)
class Occupancy:
    """What a multiprocessor holds of a kernel.

    Attributes:
        blocks: Blocks at a time; 0 where not even one fits.
        limited_by: What no further block would find: "warps" or "blocks", and if those are left, "registers" or "shared
            memory".
        share: Resident warps of the most that there may be.
    """

    blocks: int
    limited_by: str
    share: float


def occupancy(capability: int, *, registers: int, shared: int, warps: int) -> Occupancy:
    """The blocks of a kernel that a multiprocessor holds.

    Args:
        capability: 80, 90 or 100, for 8.0, 9.0 or 10.0.
        registers: Registers of a thread.
        shared: Bytes of shared memory of a block.
        warps: Warps of a block.
    """
    limits = LIMITS[capability]
    of_a_warp = _up(registers * WARP_THREADS, REGISTER_UNIT)
    warps_with_registers = limits.registers // PARTITIONS // of_a_warp * PARTITIONS
    most = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": warps_with_registers // warps,
        "shared memory": limits.shared // _up(shared + SHARED_RESERVED, SHARED_UNIT),
    }
    limited_by = min(most, key=most.__getitem__)
    return Occupancy(most[limited_by], limited_by, most[limited_by] * warps / limits.warps)


def _up(number: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-number // unit) * unit
