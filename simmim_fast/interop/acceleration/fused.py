"""How a live module gets a fused method: its class is swapped for a subclass, and nothing else changes.

Parameters, buffers, children, hooks on the module and all that is stored on it stay where they are: state dicts,
optimizers and `copy.deepcopy` do not notice. There is one subclass for each class and form; pickles name these two.
"""

from __future__ import annotations

import inspect
import types
from functools import cache
from typing import Any, ClassVar, NamedTuple

from torch import nn

from simmim_fast.interop.acceleration.form import Form


class Fusion(NamedTuple):
    """What an accelerated class was made of.

    Attributes:
        original: The module's own class.
        form: What replaces one of its methods.
        arguments: Names of that method's arguments, without self.
    """

    original: type[nn.Module]
    form: Form
    arguments: tuple[str, ...]


class Fused(nn.Module):
    """Comes before a module's own class among the bases of an accelerated class."""

    _fusion: ClassVar[Fusion]

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "accelerated")))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty, (self._fusion.original, self._fusion.form), *state


def _empty(original: type[nn.Module], form: Form) -> nn.Module:
    """A module that pickle and copy fill."""
    fused = fused_class(original, form)
    return fused.__new__(fused)


@cache
def fused_class(original: type[nn.Module], form: Form) -> type[nn.Module]:
    """The subclass of `original` with the method of `form`. It keeps the name, by which libraries know their layers."""
    own = getattr(original, form.method)

    def method(module: nn.Module, *arguments: Any, **named: Any) -> Any:
        if form.drops(module) or form.obstacle(module) is not None or not form.takes(module, *arguments, **named):
            return own(module, *arguments, **named)
        return form.compute(module, *arguments, **named)

    body = {
        "_fusion": Fusion(original, form, tuple(inspect.signature(own).parameters)[1:]),
        form.method: method,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return types.new_class(original.__name__, (Fused, original), exec_body=lambda namespace: namespace.update(body))


def is_fused(module: nn.Module) -> bool:
    """Whether the module's class is one of `fused_class`, and not a subclass that someone else made of it."""
    return "_fusion" in vars(type(module))
