"""The benchmark of one op, the same for all: every contestant on every case, checked, then timed.

A row's GB/s and GFLOP/s are what the op itself must move and compute, over the time, whoever computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.cases import BATCH, CASES, DTYPES, Case
from benchmarks.contestants import Function, contestant, eager, names
from benchmarks.cost import cost
from benchmarks.measure import ROTATION, Absent, devices, time_call
from simmim_fast._backends import BackendError
from simmim_fast.testing import (
    assert_within_budget,
    differentiable,
    random_gradient,
    relative_error,
    run,
    small_inputs,
)
from simmim_fast.testing.rules import GRADIENT_FACTOR

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

# Largest relative L2 distance of a contestant's output from the eager one's, and of its gradients from float64, unless
# the budget of a kernel allows more.
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Disagreement(Exception):
    """A contestant computes something else than the eager one."""


class Oracle:
    """What a case's output and gradients are to be: by the eager one, and by the eager one in float64.

    Args:
        case: The case.
        inputs: Of it.
        grad_out: Gradient of the output.
        dtype: "fp32" or "bf16", of the activations.
    """

    def __init__(self, case: Case, inputs: Mapping[str, Any], grad_out: Any, dtype: str) -> None:
        self.case, self.inputs, self.grad_out, self.dtype = case, inputs, grad_out, dtype
        self._wanted = [name for name in case.wanted if inputs[name] is not None]
        self._plain = run(eager(case.op), inputs, grad_out, self._wanted)
        wide = {name: _widened(value) for name, value in inputs.items()}
        exact = run(eager(case.op), wide, tree_map(_widened, grad_out), self._wanted)
        self._exact = {name: exact[name] for name in exact if name.startswith("grad_")}
        self._scale = sum(grad.double().norm().item() for grad in tree_leaves(grad_out))

    def check(self, name: str, function: Function) -> None:
        """That a contestant's output is near the eager one's, and its gradients near those in float64.

        Raises:
            Disagreement: One is not.
        """
        actual, bound = run(function, self.inputs, self.grad_out, self._wanted), AGREEMENT[DTYPES[self.dtype]]
        try:
            for what, plain in self._plain.items():
                if what in self._exact:
                    exact = self._exact[what]
                    if not relative_error(actual[what], exact, self._scale) <= bound:
                        assert_within_budget(actual[what], plain, exact, GRADIENT_FACTOR, what, self._scale)
                elif not (distance := relative_error(actual[what], plain)) <= bound:
                    raise AssertionError(f"{what}: relative L2 distance {distance:.2g}, at most {bound:g} is allowed")
        except AssertionError as error:
            what = f"{self.case.op}, {self.case.name}, {self.dtype}"
            raise Disagreement(f"{what}: {name} is wrong and is not timed: {error}") from error


def _widened(value: Any) -> Any:
    return value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def contestants(op: str) -> Callable[[Callable], Callable]:
    """Parametrise a benchmark by contestant and device."""

    def decorate(test: Callable) -> Callable:
        return pytest.mark.parametrize("device", devices())(pytest.mark.parametrize("name", names(op))(test))

    return decorate


def contest(op: str) -> Callable[[Callable], Callable]:
    """Parametrise a benchmark by contestant, case, dtype and device."""

    def decorate(test: Callable) -> Callable:
        cases = pytest.mark.parametrize("case", CASES[op].values(), ids=CASES[op])
        return contestants(op)(cases(pytest.mark.parametrize("dtype", DTYPES)(test)))

    return decorate


def time_forward(benchmark: BenchmarkFixture, name: str, case: Case, dtype: str, device: str) -> None:
    """One forward without autograd's graph."""
    benchmark.group = f"{case.op} forward {case.name} {dtype} {device}"
    function, sets = _prepared(name, case, dtype, device)
    forward, _ = cost(case, BATCH[device], DTYPES[dtype])
    with torch.no_grad():
        time_call(benchmark, [partial(function, **inputs) for inputs in sets], device, *forward)


def time_training(benchmark: BenchmarkFixture, name: str, case: Case, dtype: str, device: str) -> None:
    """One forward and its backward; the gradient of the output is made outside the clock."""
    benchmark.group = f"{case.op} forward and backward {case.name} {dtype} {device}"
    function, sets = _prepared(name, case, dtype, device)
    calls = []
    for inputs in sets:
        grad_out = random_gradient(eager(case.op), inputs)
        calls.append(partial(_train, function, inputs, case.leaves(inputs), grad_out))
    work = [sum(both) for both in zip(*cost(case, BATCH[device], DTYPES[dtype]), strict=True)]
    time_call(benchmark, calls, device, *work)


def time_host(benchmark: BenchmarkFixture, op: str, name: str, device: str) -> None:
    """One call with autograd on so few elements that only the way to the kernel takes time."""
    benchmark.group = f"{op} host overhead {device}"
    inputs = small_inputs(op, 1, device=device)
    for leaf in differentiable(inputs):
        inputs[leaf].requires_grad_()
    time_call(benchmark, [partial(_contestant(op, name, device, torch.float32), **inputs)], device)


def _contestant(op: str, name: str, device: str, dtype: torch.dtype) -> Function:
    try:
        return contestant(op, name, device, dtype)
    except Absent as absent:
        pytest.skip(f"{name} is off on {device}: {absent}")


def _prepared(name: str, case: Case, dtype: str, device: str) -> tuple[Function, list[dict[str, Any]]]:
    """The contestant, which agrees with eager, and sets of inputs that take turns."""
    sets = [case.inputs(BATCH[device], DTYPES[dtype], device, seed) for seed in range(ROTATION)]
    function = _contestant(case.op, name, device, DTYPES[dtype])
    try:
        Oracle(case, sets[0], random_gradient(eager(case.op), sets[0]), dtype).check(name, function)
    except (Absent, BackendError) as error:  # of this size
        pytest.skip(f"{name} is off on {device}: {error}")
    return function, sets


def _train(function: Function, inputs: dict[str, Any], leaves: list[torch.Tensor], grad_out: Any) -> None:
    torch.autograd.grad(function(**inputs), leaves, grad_out)
