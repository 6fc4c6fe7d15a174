"""The shifted windows of mmpretrain and mmdetection: `ShiftWindowMSA`, around a `WindowMSA` or `WindowMSAV2`.

It takes tokens (B, L, C) and their grid (H, W), L = H W; it pads the grid at the bottom and right and then rolls it, as
the op does. The window attention is the official one under other names.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim_fast.interop.acceleration.form import (
    Form,
    has,
    joint_bias,
    largest_rate,
    position_bias_table,
    random,
)
from simmim_fast.ops import shifted_window_attention

_WINDOWS = ("w_msa", "window_size", "shift_size", "drop")
_ATTENTION = ("window_size", "num_heads", "qkv", "proj", "attn_drop", "proj_drop", "softmax", "relative_position_index")


class ShiftedWindows(Form):
    """What both share."""

    def takes(self, windows: nn.Module, query: Tensor, hw_shape: tuple[int, int]) -> bool:
        """Not a shifted grid of one window, which mmdetection shifts and mmpretrain does not."""
        least = min(hw_shape) - windows.window_size
        return least > 0 or (least == 0 and windows.shift_size == 0)

    def bypassed(self, windows: nn.Module) -> Sequence[nn.Module]:
        return windows.w_msa, windows.w_msa.attn_drop, windows.w_msa.softmax

    def read(self, windows: nn.Module) -> Sequence[nn.Module]:
        return (windows.w_msa.qkv,)

    def dropout(self, windows: nn.Module) -> float:
        return largest_rate(windows.w_msa.attn_drop, windows.w_msa.proj_drop)

    def note(self, windows: nn.Module) -> str | None:
        own = "on a grid with a side that is no longer than the window it runs its own forward"
        return super().note(windows) or (own if windows.shift_size > 0 else None)

    def probe(self, windows: nn.Module, generator: torch.Generator) -> tuple[Tensor, tuple[int, int]]:
        grid = (2 * windows.window_size, 3 * windows.window_size - 1)
        return random(generator, 2, grid[0] * grid[1], windows.w_msa.proj.in_features), grid

    def compute(self, windows: nn.Module, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        attention = windows.w_msa
        bias, table, logits = self.parameters(attention)
        qkv = F.linear(query, attention.qkv.weight, bias).unflatten(1, tuple(hw_shape))
        geometry = (windows.window_size, windows.shift_size, attention.num_heads)
        x = shifted_window_attention(qkv, table, *geometry, **logits, pad_value=bias, backend=self.backend)
        return windows.drop(attention.proj_drop(attention.proj(x.flatten(1, 2))))

    @abstractmethod
    def parameters(self, attention: nn.Module) -> tuple[Tensor | None, Tensor, dict[str, Any]]:
        """Bias of q, k and v (3C), table of position biases, and what the op asks about the logits."""


class ShiftedWindowsV1(ShiftedWindows):
    """Around a `WindowMSA`."""

    def fits(self, windows: nn.Module) -> bool:
        return has(windows, *_WINDOWS) and has(windows.w_msa, *_ATTENTION, "relative_position_bias_table", "scale")

    def parameters(self, attention: nn.Module) -> tuple[Tensor | None, Tensor, dict[str, Any]]:
        return attention.qkv.bias, attention.relative_position_bias_table, {"scale": attention.scale}


class ShiftedWindowsV2(ShiftedWindows):
    """Around a `WindowMSAV2`."""

    def fits(self, windows: nn.Module) -> bool:
        cosine = ("logit_scale", "cpb_mlp", "relative_coords_table", "q_bias", "v_bias")
        return has(windows, *_WINDOWS) and has(windows.w_msa, *_ATTENTION, *cosine)

    def parameters(self, attention: nn.Module) -> tuple[Tensor | None, Tensor, dict[str, Any]]:
        table = position_bias_table(attention.cpb_mlp, attention.relative_coords_table, attention.num_heads)
        return joint_bias(attention), table, {"logit_scale": attention.logit_scale.flatten()}


FORMS: tuple[type[Form], ...] = (ShiftedWindowsV1, ShiftedWindowsV2)
