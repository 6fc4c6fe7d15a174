"""Whether a form computes what a module computes. Attributes only suggest it, so both are run, and compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from simmim_fast.interop.acceleration.form import Form
from simmim_fast.interop.acceleration.fused import fused_class

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TOLERANCE = 1e-6  # Hugging Face takes the softmax in float32
_SEED = 0


def difference(module: nn.Module, form: Form) -> str | None:
    """Why `form` must not replace the module's method; None where both agree.

    A copy of the module in float64 on the CPU, with random parameters (zeros would hide much), runs both on random
    arguments: in evaluation, and in training with the same random draws where no dropout forbids it.
    """
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return "its weights are on the meta device, where nothing can be compared"
    try:
        return _difference(module, form)
    except Exception as error:
        return f"its own {form.method} could not be run for comparison: {type(error).__name__}: {error}"


def _difference(module: nn.Module, form: Form) -> str | None:
    generator = torch.Generator().manual_seed(_SEED)
    twin = _random_copy(module, form, generator)
    arguments = form.probe(twin, generator)
    own, reference = type(module), fused_class(type(module), type(form)("reference"))
    for training in (False, True):
        twin.train(training)
        if form.drops(twin):
            continue
        results = [_run(twin, kind, form.method, arguments) for kind in (own, reference)]
        forms = [_outer_form(result) for result in results]
        if forms[0] != forms[1]:
            return f"its {form.method} returns {forms[0]}, where {forms[1]} would be"
        wanted, got = (result[0] if isinstance(result, tuple) else result for result in results)
        if wanted.shape != got.shape or not torch.linalg.norm(wanted - got) <= _TOLERANCE * torch.linalg.norm(wanted):
            return f"its {form.method} computes something else"
    return None


def _outer_form(result: Any) -> str:
    """What a caller takes apart. Results after the first may differ: attention weights are there or None."""
    return f"{len(result)} results" if isinstance(result, tuple) else f"a {type(result).__name__}"


def _random_copy(module: nn.Module, form: Form, generator: torch.Generator) -> nn.Module:
    left_out = {id(child): substitute for child, substitute in form.stand_ins(module).items()}
    without_hooks = {id(getattr(part, hooks)): {} for part in module.modules() for hooks in _HOOKS}
    twin = copy.deepcopy(module, left_out | without_hooks).to("cpu", torch.float64)
    for parameter in twin.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim == 2 else 1
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan_in**0.5
        parameter.requires_grad_(False).copy_(values)
    return twin


def _run(twin: nn.Module, kind: type[nn.Module], method: str, arguments: tuple[Any, ...]) -> Any:
    """What the method of a kind of twin returns."""
    twin.__class__ = kind
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEED)
        return getattr(twin, method)(*arguments)
