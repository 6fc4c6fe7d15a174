"""What every accelerated family owes: the same results and state, by the fused ops."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simmim_fast import accelerate
from simmim_fast.interop.acceleration import Report

EPS = torch.finfo(torch.float32).eps


class OpCalls(TorchDispatchMode):
    """Counts the calls of this library's operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "simmim_fast":
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def forward_calls(call: Callable[[], Any]) -> int:
    """How often fused operators run forward in a call."""
    with OpCalls() as calls:
        call()
    return sum(count for name, count in calls.counts.items() if not name.endswith("_backward"))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, with random parameters: zeros of an initialisation would hide differences."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.double().parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def results(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Output and all gradients; stochastic depth draws the same each time."""
    model.zero_grad()
    torch.manual_seed(0)
    out = call(model)
    out.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **gradients}


def assert_unchanged(
    model: nn.Module, call: Callable[[nn.Module, torch.dtype], Tensor], modules: int, ops: int
) -> Report:
    """Accelerate, compare in float64 and float32, put back.

    Args:
        model: Of random parameters, in float64.
        call: From the model and a dtype of its arguments to the output.
        modules: How many are to be accelerated.
        ops: How many fused operators a forward is to run.
    """
    plain, state, keys = copy.deepcopy(model), copy.deepcopy(model.state_dict()), list(model.state_dict())
    exact = results(plain, lambda module: call(module, torch.float64))
    report = accelerate(model, backend="native")
    assert len(report.accelerated) == modules, str(report)
    assert forward_calls(lambda: call(model, torch.float64)) == ops
    assert_same(results(model, lambda module: call(module, torch.float64)), exact)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    single = results(copy.deepcopy(model).float(), lambda module: call(module, torch.float32))
    own_single = results(copy.deepcopy(plain).float(), lambda module: call(module, torch.float32))
    assert_as_near(single, own_single, exact)
    undone = accelerate(model, undo=True)
    assert undone.restored == report.accelerated
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert forward_calls(lambda: call(model, torch.float64)) == 0
    return report


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To 1e-10 of each tensor, or of the largest where one is zero but for rounding, as the bias of k is."""
    assert got.keys() == wanted.keys()
    least = 1e-12 * max(tensor.norm().item() for tensor in wanted.values())
    for name, tensor in wanted.items():
        error = (got[name] - tensor).norm().item()
        assert error <= 1e-10 * tensor.norm().item() + least, f"{name}: {error:.3g} of {tensor.norm().item():.3g}"


def assert_as_near(got: dict[str, Tensor], own: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Three times the error of the model's own float32 and a few eps, over all tensors and for each but zeros."""
    assert got.keys() == own.keys() == exact.keys()
    least = 8 * EPS * max(tensor.norm().item() for tensor in exact.values())
    for name, tensor in exact.items():
        assert got[name].dtype == own[name].dtype == torch.float32
        error, allowed = ((results[name].double() - tensor).norm().item() for results in (got, own))
        assert error <= 3 * allowed + least, f"{name}: {error:.3g}, its own float32 {allowed:.3g}"
