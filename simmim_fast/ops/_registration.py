"""How an op enters PyTorch's dispatcher: schemas, fakes, autograd and cost formulas, once for all of its backends.

Each backend of an op is an operator of its own, `simmim_fast::<op>_<backend>` with `..._backward` beside it. All share
the op's schemas, fakes and autograd. The compiled library registers the kernels of "native" itself; those of any other
backend are the functions `forward` and `backward` of a module, imported at the first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverloadPacket

from simmim_fast._backends import TRITON_INTERPRETED, Op

LIBRARY = torch.library.Library("simmim_fast", "FRAGMENT")
OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Direction:
    """The forward or the backward of an op, as every backend computes it.

    Attributes:
        schema: Arguments and results in the dispatcher's language, without a name.
        fake: From the arguments, empty results of the right shapes, dtypes and strides.
        flops: From the arguments, floating-point operations as `torch.utils.flop_counter` has them: matrix products.
        bytes_moved: From the arguments, the bytes (read, written) in device memory: every kernel moves each element of
            its tensors once, and what its programs load again comes from a cache. Workspaces and what PyTorch reads and
            writes of them count. No data is read, so pixels, patches and tokens that a mask hides from a kernel count.
        bytes_loaded: The same, but that every load of a program counts as read, except of vectors and masks. None where
            no program loads anything else again.
    """

    schema: str
    fake: Callable[..., Any]
    flops: Callable[..., int]
    bytes_moved: Callable[..., tuple[int, int]]
    bytes_loaded: Callable[..., tuple[int, int]] | None = None


_DIRECTIONS: dict[OpOverloadPacket, Direction] = {}


def define_op(
    name: str,
    *,
    reference: Callable[..., Any],
    forward: Direction,
    backward: Direction,
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
    backends: Mapping[str, str | None],
    native_devices: tuple[str, ...] = ("cpu",),
) -> Op:
    """Register an op's operators, and the op itself in `OPS`.

    Args:
        name: The public function's name.
        reference: The plain PyTorch function, not an operator.
        forward: The forward operators.
        backward: The backward operators. They have no derivative of their own.
        setup_context: (ctx, inputs, output), as `torch.library.register_autograd` has it.
        gradients: (ctx, backward operator, *grad_outputs) -> gradients of the forward's arguments.
        backends: Backend -> module with its `forward` and `backward`, or None where the compiled library has them.
        native_devices: Device types that the compiled library has kernels for.
    """
    implementations = {"reference": reference}
    for backend, module in backends.items():
        operator = _define_operator(f"{name}_{backend}", forward, module, "forward")
        backward_operator = _define_operator(f"{name}_{backend}_backward", backward, module, "backward")
        _register_autograd(operator, backward_operator, setup_context, gradients)
        _refuse_vmap(operator)
        _refuse_vmap(backward_operator)
        implementations[backend] = operator.default
    OPS[name] = Op(name, implementations, native_devices)
    return OPS[name]


def bytes_moved(operator: OpOverloadPacket, *args: Any) -> tuple[int, int]:
    """Bytes (read, written) that a call of a registered operator moves in a GPU's memory, if caches serve its re-reads.

    Each kernel moves every element of its tensors once; workspaces and the second stages of sums are included. Reads no
    data, so meta tensors do.

    Raises:
        KeyError: The operator is not one of this library's.
    """
    return _DIRECTIONS[operator].bytes_moved(*args)


def bytes_loaded(operator: OpOverloadPacket, *args: Any) -> int:
    """Bytes that a call of a registered operator reads if no cache serves anything: every load of a program counts.

    Vectors and masks count once for every kernel.

    Raises:
        KeyError: The operator is not one of this library's.
    """
    direction = _DIRECTIONS[operator]
    return (direction.bytes_loaded or direction.bytes_moved)(*args)[0]


def flops(operator: OpOverloadPacket, *args: Any) -> int:
    """Floating-point operations of a call of a registered operator, as `FlopCounterMode` counts them.

    Raises:
        KeyError: The operator is not one of this library's.
    """
    return _DIRECTIONS[operator].flops(*args)


def unrounded_nbytes(sum_dtype: torch.dtype, *results: torch.Tensor) -> int:
    """Bytes of second-stage sums that are written in their own dtype, then read to be rounded to the results'."""
    return sum(result.numel() * sum_dtype.itemsize for result in results if result.dtype != sum_dtype)


def register_flop_formulas() -> None:
    """Make `torch.utils.flop_counter.FlopCounterMode` count this library's operators. Call before creating a counter.

    Not done on import: flop_counter imports triton, which takes longer than this package.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for operator, direction in _DIRECTIONS.items():
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(_flop_formula(direction))


def _flop_formula(direction: Direction) -> Callable[..., int]:
    return lambda *args, out_val=None, **kwargs: direction.flops(*args, **kwargs)


def _define_operator(name: str, direction: Direction, module: str | None, function: str) -> OpOverloadPacket:
    LIBRARY.define(name + direction.schema)
    operator = getattr(torch.ops.simmim_fast, name)
    torch.library.register_fake(operator.default, direction.fake, lib=LIBRARY)
    if module is not None:
        for key in ("CUDA", "CPU") if TRITON_INTERPRETED else ("CUDA",):
            LIBRARY.impl(operator.default, _imported_when_called(module, function), key)
    _DIRECTIONS[operator] = direction
    return operator


def _imported_when_called(module: str, function: str) -> Callable[..., Any]:
    return lambda *args: getattr(importlib.import_module(module), function)(*args)


def _register_autograd(
    operator: OpOverloadPacket,
    backward_operator: OpOverloadPacket,
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
) -> None:
    def first_derivative(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return gradients(ctx, backward_operator.default, *grad_outputs)

    def no_second_derivative(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        raise RuntimeError(f"{operator} has no second derivative; backend='reference' has one")

    register = torch.library.register_autograd
    register(operator.default, first_derivative, setup_context=setup_context, lib=LIBRARY)
    register(backward_operator.default, no_second_derivative, lib=LIBRARY)


def _refuse_vmap(operator: OpOverloadPacket) -> None:
    """Without this, vmap would call the kernel once for every entry, and say so in a warning at best."""

    def refuse(*args: Any) -> Any:
        raise RuntimeError(f"{operator} cannot be vmapped: put the axis into the batch, or use backend='reference'")

    torch.library.register_vmap(operator.default, refuse, lib=LIBRARY)
