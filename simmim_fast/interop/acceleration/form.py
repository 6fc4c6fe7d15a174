"""What a family of modules is accelerated by: a form knows its shape, its obstacles, and the fused computation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TABLES = ("relative_position_bias_table", "relative_coords_table")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_PROJECTIONS = (
    *[(name,) for name in ("qkv", "to_qkv", "qkv_proj", "query_key_value", "in_proj", "in_proj_weight", "c_attn")],
    *[("q", "kv"), ("to_q", "to_kv"), ("q", "k", "v"), ("to_q", "to_k", "to_v"), ("wq", "wk", "wv")],
    *[("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin")],
)


@dataclass(frozen=True)
class Form(ABC):
    """Base of the forms. All methods take the module, of its own class or accelerated already.

    Attributes:
        backend: Of the ops.
        method: What the form replaces.
        contains_others: Whether modules inside such a module are accelerated too.
    """

    backend: str = "auto"
    method: ClassVar[str] = "forward"
    contains_others: ClassVar[bool] = False

    @abstractmethod
    def fits(self, module: nn.Module) -> bool:
        """Whether the module has the attributes of this form. What it computes is compared, not assumed."""

    @abstractmethod
    def compute(self, module: nn.Module, *arguments: Any, **named: Any) -> Any:
        """What `method` returns, by the fused ops."""

    def takes(self, module: nn.Module, *arguments: Any, **named: Any) -> bool:
        """Whether `compute` answers such a call; the module's own method answers the others."""
        return True

    def bypassed(self, module: nn.Module) -> Sequence[nn.Module]:
        """Children that `compute` does not call, but those of `read`."""
        return ()

    def read(self, module: nn.Module) -> Sequence[nn.Module]:
        """Linear layers whose weights `compute` reads without calling them."""
        return ()

    def dropout(self, module: nn.Module) -> float:
        """The largest rate of dropouts whose draws in training `compute` would not repeat."""
        return 0.0

    def setting(self, module: nn.Module) -> str | None:
        """Why a setting keeps the module's own method; None where none does."""
        return None

    def values(self, module: nn.Module) -> str | None:
        """Why the present values of the parameters keep the module's own method. Asked once; it reads data."""
        return None

    def note(self, module: nn.Module) -> str | None:
        """When the accelerated module runs its own method all the same, or may come to differ from it."""
        rate = self.dropout(module)
        return f"in training it runs its own forward: its attention has dropout of {rate:g}" if rate > 0 else None

    @abstractmethod
    def probe(self, module: nn.Module, generator: torch.Generator) -> tuple[Any, ...]:
        """Small arguments by which the two methods are compared: float64, on the CPU."""

    def stand_ins(self, module: nn.Module) -> dict[nn.Module, nn.Module]:
        """Children that a comparison does without, and what takes their place there."""
        return {}

    def obstacle(self, module: nn.Module) -> str | None:
        """Why the module's own method has to run, whatever the call; None where nothing stands in the way."""
        for linear in self.read(module):
            if type(linear) is not nn.Linear:
                return f"it holds a {type(linear).__name__} where a plain linear layer is expected"
        for child in (*self.bypassed(module), *self.read(module)):
            if has_hooks(child):
                return f"its {type(child).__name__} carries a hook, which would not be called"
        return self.setting(module)

    def drops(self, module: nn.Module) -> bool:
        """Whether dropouts draw now, so that the module's own method has to run."""
        return module.training and self.dropout(module) > 0


def has(module: object, *names: str) -> bool:
    """Whether the module has all of these attributes."""
    return all(hasattr(module, name) for name in names)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_attention(module: nn.Module) -> bool:
    """Whether a module is built like attention, whatever its name: projections, and heads or a table of positions."""
    is_biased = any(isinstance(getattr(module, name, None), Tensor) for name in _TABLES)
    if is_biased and any(isinstance(child, nn.Linear) for child in module.children()):
        return True
    has_projections = any(all(_projects(module, name) for name in names) for names in _PROJECTIONS)
    return has_projections and any(isinstance(getattr(module, name, None), int) for name in _HEADS)


def _projects(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module | Tensor)


def largest_rate(*dropouts: nn.Module | float) -> float:
    """The largest rate of dropout layers, or of rates; other layers have none."""
    return max(d if isinstance(d, float | int) else getattr(d, "p", 0.0) for d in dropouts)


def joint_projection(x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Three linear layers in one product: x (..., C) to q, k and v side by side (..., 3C), and their bias (3C)."""
    bias = None
    if any(linear.bias is not None for linear in (q, k, v)):
        parts = [
            x.new_zeros(1).expand(linear.out_features) if linear.bias is None else linear.bias for linear in (q, k, v)
        ]
        bias = torch.cat(parts)
    return F.linear(x, torch.cat([q.weight, k.weight, v.weight]), bias), bias


def joint_bias(attention: nn.Module) -> Tensor | None:
    """Bias (3C) of the one layer of q, k and v where only q and v have one: `q_bias`, `v_bias`; None without them."""
    if attention.q_bias is None:
        return None
    return torch.cat([attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias])


def position_bias_table(mlp: nn.Module, coordinates: Tensor, num_heads: int) -> Tensor:
    """Swin V2's bias for each offset of two tokens, ((2 wh - 1)(2 ww - 1), heads)."""
    return 16 * torch.sigmoid(mlp(coordinates).view(-1, num_heads))


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal, float64, on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
