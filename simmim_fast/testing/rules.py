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
from torch.utils._pytree import tree_leaves, tree_map

from simmim_fast.testing.guards import Guards
from simmim_fast.testing.inputs import differentiable, random_tensor

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOAT64_BUDGET = 1e-12
NOTHING = 1e-12  # of the output's gradient

Output = Tensor | tuple[Tensor, ...]


class BudgetError(AssertionError):
    """A result errs more than its budget."""


def run(
    function: Callable[..., Output],
    inputs: Mapping[str, Any],
    grad_out: Output | None = None,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Call a function and, with the gradient of its output, differentiate it.

    Args:
        function: Takes the inputs by name and returns one tensor or several.
        inputs: Arguments by name.
        grad_out: Gradient of the output, or one for each, or None for the output alone.
        wanted: Inputs that get a gradient; by default all that may.

    Returns:
        "out", or "out_0" and so on of several, and "grad_<name>" for each wanted input.
    """
    if wanted is None:
        wanted = differentiable(inputs)
    if grad_out is None:
        return _named(function(**inputs))
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    out = function(**{**inputs, **leaves})
    reached = [
        (one, grad) for one, grad in zip(tree_leaves(out), tree_leaves(grad_out), strict=True) if one.requires_grad
    ]
    outputs, grads = zip(*reached, strict=True)
    gradients = torch.autograd.grad(outputs, tuple(leaves.values()), grads)
    return _named(out) | {f"grad_{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def _named(out: Output) -> dict[str, Tensor]:
    if isinstance(out, Tensor):
        return {"out": out.detach()}
    return {f"out_{index}": one.detach() for index, one in enumerate(out)}


def random_gradient(reference: Callable[..., Output], inputs: Mapping[str, Any], seed: int = 1) -> Output:
    """A random gradient for the output that the reference has for these inputs, with its dtype and strides."""
    generator = torch.Generator().manual_seed(seed)
    return tree_map(
        lambda out: torch.empty_like(out).copy_(random_tensor(out.shape, out.dtype, generator)), reference(**inputs)
    )


def assert_matches(
    function: Callable[..., Output],
    reference: Callable[..., Output],
    inputs: Mapping[str, Any],
    *,
    copies: Collection[str] = (),
    wanted: Collection[str] | None = None,
) -> None:
    """Output and gradients of a function are right, and it stays inside its buffers and writes all of them.

    Args:
        function: What is tested; takes the inputs by name and returns one tensor or several.
        reference: The oracle, with the same arguments.
        inputs: Arguments by name.
        copies: Results, as `run` names them, that must equal the reference's bit for bit.
        wanted: Inputs that get a gradient; by default all that may.
    """
    grad_out = random_gradient(reference, inputs)
    with Guards() as guards:
        guarded_inputs = {name: guards.place(value) for name, value in inputs.items()}
        actual = run(function, guarded_inputs, tree_map(guards.place, grad_out), wanted)
    guards.check()
    assert_right(actual, reference, inputs, grad_out, copies=copies, wanted=wanted)


def assert_right(
    actual: Mapping[str, Tensor],
    reference: Callable[..., Output],
    inputs: Mapping[str, Any],
    grad_out: Output,
    *,
    copies: Collection[str] = (),
    wanted: Collection[str] | None = None,
) -> None:
    """What `run` gave for these inputs and gradient is right by the two rules; arguments as in `assert_matches`."""
    plain = run(reference, inputs, grad_out, wanted)
    exact_inputs = {name: _to_float64(value) for name, value in inputs.items()}
    exact = run(reference, exact_inputs, tree_map(_to_float64, grad_out), wanted)
    scale = sum(grad.double().norm().item() for grad in tree_leaves(grad_out))
    for name in plain:
        if name in copies:
            assert_equal(actual[name], plain[name], name)
        elif name.startswith("grad_"):
            assert_within_budget(actual[name], plain[name], exact[name], GRADIENT_FACTOR, name, scale)
        else:
            assert_within_budget(actual[name], plain[name], exact[name], OUTPUT_FACTOR, name)


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
    if not error <= budget:
        raise BudgetError(f"{name}: relative L2 error {error:.3g}, budget {budget:.3g}")


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
