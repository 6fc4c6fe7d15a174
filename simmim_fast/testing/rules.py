"""When a result is right.

Two rules decide it. Copies and selections must equal the reference bit for bit (`assert_equal`). Everything else is
compared with float64, in relative L2 over the tensor: it may err at most twice (outputs) or three times (gradients)
what the reference errs in the same dtype, plus 4 eps; in float64, 1e-12 (`assert_within_budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from simmim_fast.testing.guards import Guards
from simmim_fast.testing.inputs import random_tensor

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOAT64_BUDGET = 1e-12
NOTHING = 1e-12  # of the output's gradient


def run(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    grad_out: Tensor | None = None,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Call a function and, with the gradient of its output, differentiate it.

    Args:
        function: Takes the inputs by name and returns one tensor.
        inputs: Arguments by name.
        grad_out: Gradient of the output, or None for the output alone.
        wanted: Inputs that get a gradient; by default every floating tensor.

    Returns:
        "out", and "grad_<name>" for each wanted input.
    """
    if wanted is None:
        wanted = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if grad_out is None:
        return {"out": function(**inputs).detach()}
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    out = function(**{**inputs, **leaves})
    gradients = torch.autograd.grad(out, tuple(leaves.values()), grad_out)
    return {"out": out.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def random_gradient(reference: Callable[..., Tensor], inputs: Mapping[str, Any], seed: int = 1) -> Tensor:
    """A random gradient for the output that the reference has for these inputs, with its dtype and strides."""
    out = reference(**inputs)
    return torch.empty_like(out).copy_(random_tensor(out.shape, out.dtype, torch.Generator().manual_seed(seed)))


def assert_matches(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    *,
    copies: Collection[str] = (),
    wanted: Collection[str] | None = None,
) -> None:
    """Output and gradients of a function are right, and it stays inside its buffers and writes all of them.

    Args:
        function: What is tested; takes the inputs by name and returns one tensor.
        reference: The oracle, with the same arguments.
        inputs: Arguments by name.
        copies: Results ("out", "grad_<name>") that must equal the reference's bit for bit.
        wanted: Inputs that get a gradient; by default every floating tensor.
    """
    grad_out = random_gradient(reference, inputs)
    with Guards() as guards:
        guarded_inputs = {name: guards.place(value) for name, value in inputs.items()}
        actual = run(function, guarded_inputs, guards.place(grad_out), wanted)
    guards.check()
    assert_right(actual, reference, inputs, grad_out, copies=copies, wanted=wanted)


def assert_right(
    actual: Mapping[str, Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    grad_out: Tensor,
    *,
    copies: Collection[str] = (),
    wanted: Collection[str] | None = None,
) -> None:
    """What `run` gave for these inputs and gradient is right by the two rules; arguments as in `assert_matches`."""
    plain = run(reference, inputs, grad_out, wanted)
    exact = run(reference, {name: _to_float64(value) for name, value in inputs.items()}, grad_out.double(), wanted)
    for name in plain:
        if name in copies:
            assert_equal(actual[name], plain[name], name)
        elif name == "out":
            assert_within_budget(actual[name], plain[name], exact[name], OUTPUT_FACTOR, name)
        else:
            scale = grad_out.double().norm().item()
            assert_within_budget(actual[name], plain[name], exact[name], GRADIENT_FACTOR, name, scale)


def assert_equal(actual: Tensor, expected: Tensor, name: str) -> None:
    """Same dtype, shape and values, NaN being equal to NaN."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=False, msg=lambda message: f"{name}: {message}"
    )


def assert_within_budget(
    actual: Tensor, reference: Tensor, exact: Tensor, factor: float, name: str, scale: float = 0.0
) -> None:
    """Against float64, `actual` errs at most `factor` times what the same-dtype reference errs, plus 4 eps.

    A gradient that is nothing beside `scale`, the norm of the output's, is rounding in float64 too: its terms cancel.
    It errs relative to `scale`.
    """
    assert (actual.dtype, actual.shape) == (reference.dtype, reference.shape), (
        f"{name}: {actual.dtype} {tuple(actual.shape)}; the reference has {reference.dtype} {tuple(reference.shape)}"
    )
    if actual.dtype == torch.float64:
        budget = FLOAT64_BUDGET
    else:
        budget = factor * relative_error(reference, exact, scale) + 4 * torch.finfo(actual.dtype).eps
    error = relative_error(actual, exact, scale)
    assert error <= budget, f"{name}: relative L2 error {error:.3g}, budget {budget:.3g}"


def relative_error(actual: Tensor, exact: Tensor, scale: float = 0.0) -> float:
    """L2 error over the whole tensor, relative to `exact`, to `scale` where that is nothing beside it, or absolute."""
    norm = exact.double().norm().item()
    if norm <= NOTHING * scale:
        norm = scale
    error = (actual.double() - exact.double()).norm().item()
    return error / norm if norm > 0 else error


def assert_repeats(call: Callable[[], Mapping[str, Tensor]], times: int) -> None:
    """The results of a call are the same, bit for bit, each time."""
    first = call()
    for _ in range(times - 1):
        for name, result in call().items():
            assert_equal(result, first[name], name)


def assert_ignores_threads(call: Callable[[], Mapping[str, Tensor]]) -> None:
    """The results of a call are the same, bit for bit, on one thread and on two."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = call()
        torch.set_num_threads(2)
        for name, result in call().items():
            assert_equal(result, single[name], name)
    finally:
        torch.set_num_threads(before)


def _to_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
