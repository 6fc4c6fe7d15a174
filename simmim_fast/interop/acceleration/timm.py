"""timm's Swin and Swin V2 (`swin_*`, `swinv2_*`). A block takes x (B, H, W, C) and calls `_attn`, which is replaced.

timm rolls the grid and then pads it to whole windows; the op pads and then rolls. A shifted grid that is padded goes
to the op as the padded grid that the op's roll turns into timm's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

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

_ATTENTION = ("window_size", "num_heads", "qkv", "proj", "attn_drop", "proj_drop", "softmax", "relative_position_index")
_BLOCK = ("_attn", "dim", "window_size", "shift_size", "input_resolution", "attn_mask", "attn", "drop_path1")


class WindowBlock(Form):
    """What the blocks of both Swins share."""

    method = "_attn"

    def takes(self, block: nn.Module, x: Tensor) -> bool:
        """Not a grid that the mask kept by the block does not fit."""
        if block.attn_mask is None:
            return True
        sides = zip(x.shape[1:3], block.input_resolution, block.window_size, strict=True)
        return all(-(-size // window) == -(-kept // window) for size, kept, window in sides)

    def bypassed(self, block: nn.Module) -> Sequence[nn.Module]:
        return block.attn, block.attn.attn_drop, block.attn.softmax

    def dropout(self, block: nn.Module) -> float:
        return largest_rate(block.attn.attn_drop, block.attn.proj_drop)

    def probe(self, block: nn.Module, generator: torch.Generator) -> tuple[Tensor]:
        return (random(generator, 2, *block.input_resolution, block.dim),)

    def compute(self, block: nn.Module, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        bottom, right = (-size % window for size, window in zip((height, width), block.window_size, strict=True))
        padded = bottom > 0 or right > 0
        if padded:
            x = _roll(block, F.pad(_roll(block, x, -1), (0, 0, 0, right, 0, bottom)), 1)
        x = self.attend(block, x)
        if padded:
            x = _roll(block, _roll(block, x, -1)[:, :height, :width], 1)
        return block.attn.proj_drop(block.attn.proj(x))

    @abstractmethod
    def attend(self, block: nn.Module, x: Tensor) -> Tensor:
        """x (B, H, W, C) to the heads' outputs (B, H, W, C), the grid being whole windows."""


class SwinBlock(WindowBlock):
    """`SwinTransformerBlock` of timm/models/swin_transformer.py."""

    def fits(self, block: nn.Module) -> bool:
        return has(block, *_BLOCK) and has(block.attn, *_ATTENTION, "relative_position_bias_table", "scale")

    def attend(self, block: nn.Module, x: Tensor) -> Tensor:
        attn = block.attn
        geometry = (block.window_size, block.shift_size, attn.num_heads)
        logits = {"scale": attn.scale, "backend": self.backend}
        return shifted_window_attention(attn.qkv(x), attn.relative_position_bias_table, *geometry, **logits)


class SwinV2Block(WindowBlock):
    """`SwinTransformerV2Block` of timm/models/swin_transformer_v2.py."""

    def fits(self, block: nn.Module) -> bool:
        cosine = ("logit_scale", "cpb_mlp", "relative_coords_table", "q_bias", "v_bias")
        return has(block, *_BLOCK) and has(block.attn, *_ATTENTION, *cosine)

    def read(self, block: nn.Module) -> Sequence[nn.Module]:
        return (block.attn.qkv,)

    def attend(self, block: nn.Module, x: Tensor) -> Tensor:
        attn = block.attn
        geometry = (block.window_size, block.shift_size, attn.num_heads)
        table = position_bias_table(attn.cpb_mlp, attn.relative_coords_table, attn.num_heads)
        logits = {"logit_scale": attn.logit_scale.flatten(), "backend": self.backend}
        return shifted_window_attention(F.linear(x, attn.qkv.weight, joint_bias(attn)), table, *geometry, **logits)


def _roll(block: nn.Module, x: Tensor, direction: int) -> Tensor:
    """The grid rolled by the block's shift: down and right, or up and left where `direction` is -1."""
    if not any(block.shift_size):
        return x
    return torch.roll(x, shifts=tuple(direction * shift for shift in block.shift_size), dims=(1, 2))


FORMS: tuple[type[Form], ...] = (SwinBlock, SwinV2Block)
