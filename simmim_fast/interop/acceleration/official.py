"""The official code (microsoft/SimMIM, microsoft/Swin-Transformer) and its forks, known by their attributes.

Shapes: B batch, L = H W tokens of the grid, C channels, h heads, N tokens of a ViT.
"""

from __future__ import annotations

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
from simmim_fast.models.targets import norm_targets
from simmim_fast.ops import biased_attention, linear_masked_loss, shifted_window_attention

_ATTENTION = ("window_size", "num_heads", "qkv", "proj", "attn_drop", "proj_drop", "softmax", "relative_position_index")
_BLOCK = ("window_size", "shift_size", "input_resolution", "attn_mask", "attn", "drop_path", "norm1", "norm2", "mlp")


class WindowBlock(Form):
    """What the blocks of both Swins share."""

    def takes(self, block: nn.Module, x: Tensor, *others: Any, **named: Any) -> bool:
        return not others and not named

    def bypassed(self, block: nn.Module) -> Sequence[nn.Module]:
        return block.attn, block.attn.attn_drop, block.attn.softmax

    def dropout(self, block: nn.Module) -> float:
        return largest_rate(block.attn.attn_drop, block.attn.proj_drop)

    def setting(self, block: nn.Module) -> str | None:
        sides = zip(block.input_resolution, block.attn.window_size, strict=True)
        return "the window does not divide its grid" if any(size % window for size, window in sides) else None

    def probe(self, block: nn.Module, generator: torch.Generator) -> tuple[Tensor]:
        height, width = block.input_resolution
        return (random(generator, 2, height * width, block.attn.proj.in_features),)

    def attend(self, block: nn.Module, qkv: Tensor, bias_table: Tensor, **logits: Any) -> Tensor:
        """qkv (B, L, 3C) to (B, L, C), through the output layer."""
        attn = block.attn
        geometry = (tuple(attn.window_size), block.shift_size, attn.num_heads)
        qkv = qkv.unflatten(1, tuple(block.input_resolution))
        x = shifted_window_attention(qkv, bias_table, *geometry, **logits, backend=self.backend)
        return attn.proj_drop(attn.proj(x.flatten(1, 2)))


class SwinBlock(WindowBlock):
    """`SwinTransformerBlock` of models/swin_transformer.py."""

    def fits(self, block: nn.Module) -> bool:
        return has(block, *_BLOCK) and has(block.attn, *_ATTENTION, "relative_position_bias_table", "scale")

    def compute(self, block: nn.Module, x: Tensor) -> Tensor:
        qkv = block.attn.qkv(block.norm1(x))
        branch = self.attend(block, qkv, block.attn.relative_position_bias_table, scale=block.attn.scale)
        x = x + block.drop_path(branch)
        return x + block.drop_path(block.mlp(block.norm2(x)))


class SwinV2Block(WindowBlock):
    """`SwinTransformerBlock` of models/swin_transformer_v2.py: cosine attention, norms after the branches."""

    def fits(self, block: nn.Module) -> bool:
        cosine = ("logit_scale", "cpb_mlp", "relative_coords_table", "q_bias", "v_bias")
        return has(block, *_BLOCK) and has(block.attn, *_ATTENTION, *cosine)

    def read(self, block: nn.Module) -> Sequence[nn.Module]:
        return (block.attn.qkv,)

    def compute(self, block: nn.Module, x: Tensor) -> Tensor:
        attn = block.attn
        qkv = F.linear(x, attn.qkv.weight, joint_bias(attn))
        table = position_bias_table(attn.cpb_mlp, attn.relative_coords_table, attn.num_heads)
        x = x + block.drop_path(block.norm1(self.attend(block, qkv, table, logit_scale=attn.logit_scale.flatten())))
        return x + block.drop_path(block.norm2(block.mlp(x)))


class ViTAttention(Form):
    """`Attention` of models/vision_transformer.py: all tokens, with a bias of its own and one that layers share."""

    def fits(self, attention: nn.Module) -> bool:
        names = ("num_heads", "scale", "qkv", "q_bias", "v_bias", "proj", "attn_drop", "proj_drop", "window_size")
        is_beit_of_timm = hasattr(attention, "fused_attn")  # whose forward has other arguments
        return has(attention, *names, "relative_position_bias_table", "relative_position_index") and not is_beit_of_timm

    def takes(self, attention: nn.Module, x: Tensor, rel_pos_bias: Tensor | None = None, **named: Any) -> bool:
        return not named

    def bypassed(self, attention: nn.Module) -> Sequence[nn.Module]:
        return (attention.attn_drop,)

    def read(self, attention: nn.Module) -> Sequence[nn.Module]:
        return (attention.qkv,)

    def dropout(self, attention: nn.Module) -> float:
        return largest_rate(attention.attn_drop)

    def probe(self, attention: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        window = attention.window_size
        tokens = 5 if window is None else window[0] * window[1] + 1
        bias = random(generator, attention.num_heads, tokens, tokens)
        return random(generator, 2, tokens, attention.qkv.in_features), bias

    def compute(self, attention: nn.Module, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        bias, table = rel_pos_bias, attention.relative_position_bias_table
        if table is not None:
            own_bias = table[attention.relative_position_index].permute(2, 0, 1)  # (h, N, N)
            bias = own_bias if bias is None else own_bias + bias
        qkv = F.linear(x, attention.qkv.weight, joint_bias(attention))
        x = biased_attention(qkv, bias, attention.num_heads, scale=attention.scale, backend=self.backend)
        return attention.proj_drop(attention.proj(x))


class MaskedLoss(Form):
    """`SimMIM` of models/simmim.py: the linear head and the loss in one, over the masked pixels alone."""

    contains_others = True

    def fits(self, model: nn.Module) -> bool:
        if not has(model, "encoder", "decoder", "in_chans", "patch_size", "encoder_stride"):
            return False
        layers = [type(layer) for layer in model.decoder.children()]
        return layers == [nn.Conv2d, nn.PixelShuffle] and model.decoder[0].kernel_size == (1, 1)

    def takes(self, model: nn.Module, x: Tensor, mask: Tensor, *others: Any, **named: Any) -> bool:
        return not others and not named and not mask.is_floating_point() and not x.requires_grad

    def bypassed(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.decoder, *model.decoder

    def stand_ins(self, model: nn.Module) -> dict[nn.Module, nn.Module]:
        return {model.encoder: _AnyFeatures(model.decoder[0].in_channels)}

    def probe(self, model: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        side = 2 * model.encoder_stride
        cells = side // model.patch_size
        mask = random(generator, 2, cells, cells) < 0
        return random(generator, 2, model.in_chans, side, side), mask.long()

    def compute(self, model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        features = model.encoder(x, mask).permute(0, 2, 3, 1)
        normalised = getattr(getattr(model, "config", None), "NORM_TARGET", None)
        target = norm_targets(x, normalised.PATCH_SIZE) if normalised is not None and normalised.ENABLE else x
        weight, bias = model.decoder[0].weight.flatten(1), model.decoder[0].bias
        return linear_masked_loss(
            features, weight, bias, target, mask, patch_size=model.patch_size, backend=self.backend
        )


class _AnyFeatures(nn.Module):
    """An encoder for comparisons: features (2, C, 2, 2), whatever the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.empty(2, channels, 2, 2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.features


FORMS: tuple[type[Form], ...] = (SwinBlock, SwinV2Block, ViTAttention, MaskedLoss)
