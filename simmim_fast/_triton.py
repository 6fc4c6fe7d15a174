"""What Triton kernels share. Imports triton: only kernels import this, and only when they are first called.

The interpreter (TRITON_INTERPRET=1) has no bfloat16 arithmetic and truncates where a GPU rounds, so kernels compute in
`compute_type(...)` and store through `store_rounded`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

OPERAND_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
MIN_DOT_SIZE = 16  # of each side of a product
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which a kernel computes what it stores in `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """An optional argument as a kernel reads it."""
    return None if tensor is None else tensor.contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Launch on the tensor's device, not on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def store_rounded(pointer, value, mask):
    """Store float32 or float64 values in the pointer's type, rounded to nearest even."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        value = _round_to_bfloat16(value.to(tl.float32))
    tl.store(pointer, value, mask=mask)


@triton.jit
def mask_if(mask, condition):
    """mask, a block, where the scalar condition holds; nothing of it elsewhere.

    In the interpreter a scalar comparison counts as an integer, which makes the conjunction one too; triton 3.9 takes
    no such mask.
    """
    both = mask & condition
    return both != 0 if INTERPRETED else both


@triton.jit
def dot(a, b, OPERAND: tl.constexpr):
    """a (M, K) @ b (K, N), both rounded to OPERAND, in float32, or in float64 for float64. M, N and K are 16 or more.

    bfloat16 and float16 operands stay so on a GPU, whose tensor cores they feed; the interpreter multiplies in float32.
    """
    return tl.dot(as_operand(a, OPERAND), as_operand(b, OPERAND), input_precision="ieee")


@triton.jit
def as_operand(value, OPERAND: tl.constexpr):
    """The values rounded to OPERAND, for several uses in `dot`; in the interpreter in a type that it multiplies in."""
    if INTERPRETED and OPERAND == tl.bfloat16:
        return _round_to_bfloat16(value.to(tl.float32))
    if INTERPRETED and OPERAND == tl.float16:
        return value.to(OPERAND).to(tl.float32)
    return value.to(OPERAND)


@triton.jit
def _round_to_bfloat16(value):
    """float32 values that bfloat16 holds exactly, for a store that cuts off the lower half."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
