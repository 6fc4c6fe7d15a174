"""Hugging Face's Swin, Swin V2 and ViT layers, and the copies of them in its other models (MaskFormer, Donut, CLAP...).

A window layer takes tokens (B, L, C) and their grid (H, W), L = H W; it pads the grid at the bottom and right and then
rolls it, as the op does. q, k and v are three linear layers, here one product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simmim_fast.interop.acceleration.form import (
    Form,
    has,
    joint_projection,
    largest_rate,
    position_bias_table,
    random,
)
from simmim_fast.ops import biased_attention, shifted_window_attention
from simmim_fast.ops.shifted_window_attention.reference import BETWEEN_REGIONS, MAX_LOGIT_SCALE

_LAYER = ("attention", "layernorm_before", "layernorm_after", "window_size", "shift_size", "drop_path", "maybe_pad")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", "attention_dropout", "scaling", "config")
_HEADS = ("query", "key", "value", "num_attention_heads", "window_size", "relative_position_index", "dropout")
_REPLACED = ("eager", "sdpa", None)
_BIAS_RANGE = 16


class WindowLayer(Form):
    """What the layers of all Swins share."""

    def takes(
        self, layer: nn.Module, hidden_states: Tensor, input_dimensions: tuple[int, int], *others: Any, **named: Any
    ) -> bool:
        named = _by_name(layer, others, named)
        if _asks_for_weights(named):
            return False
        clamps = hasattr(layer, "set_shift_and_window_size") and not named.get("always_partition")
        return not clamps or min(input_dimensions) >= layer.window_size

    def setting(self, layer: nn.Module) -> str | None:
        return None if layer.window_size == self.table_window(layer) else "its bias table is for another window"

    def probe(self, layer: nn.Module, generator: torch.Generator) -> tuple[Tensor, tuple[int, int]]:
        grid = (2 * layer.window_size, 3 * layer.window_size - 1)
        return random(generator, 2, grid[0] * grid[1], layer.layernorm_before.normalized_shape[0]), grid

    def table_window(self, layer: nn.Module) -> int:
        """Side of the window that the bias table is for."""
        return layer.attention.self.window_size[0]

    def clamp(self, layer: nn.Module, input_dimensions: tuple[int, int], *others: Any, **named: Any) -> None:
        """The layer's own adaptation to a grid of one window, which it remembers."""
        always_partition = _by_name(layer, others, named).get("always_partition")
        if hasattr(layer, "set_shift_and_window_size") and not always_partition:
            layer.set_shift_and_window_size(input_dimensions)

    def attend(self, layer: nn.Module, x: Tensor, grid: tuple[int, int], bias_table: Tensor, **logits: Any) -> Tensor:
        """x (B, L, C) to the heads' outputs (B, L, C)."""
        qkv, bias = joint_projection(x, *self.read(layer))
        geometry = (layer.window_size, layer.shift_size, bias_table.shape[1])
        form = {"pad_value": bias, "backend": self.backend, **logits}
        return shifted_window_attention(qkv.unflatten(1, tuple(grid)), bias_table, *geometry, **form).flatten(1, 2)


class SwinLayer(WindowLayer):
    """`SwinLayer`: Swin itself, and the backbone of Mask2Former and OneFormer."""

    def fits(self, layer: nn.Module) -> bool:
        if not has(layer, *_LAYER, "mlp", "dropout") or not has(layer.attention, *_PROJECTIONS):
            return False
        return has(getattr(layer.attention, "relative_position_bias", None), "relative_position_bias_table")

    def takes(self, layer: nn.Module, *arguments: Any, **named: Any) -> bool:
        return not layer.attention.config.output_attentions and super().takes(layer, *arguments, **named)

    def bypassed(self, layer: nn.Module) -> Sequence[nn.Module]:
        return layer.attention, layer.attention.relative_position_bias

    def read(self, layer: nn.Module) -> Sequence[nn.Module]:
        return layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj

    def dropout(self, layer: nn.Module) -> float:
        return largest_rate(layer.attention.attention_dropout, layer.dropout)

    def setting(self, layer: nn.Module) -> str | None:
        return _chosen_attention(layer.attention) or super().setting(layer)

    def table_window(self, layer: nn.Module) -> int:
        return layer.attention.relative_position_bias.window_size[0]

    def compute(
        self, layer: nn.Module, hidden_states: Tensor, input_dimensions: tuple[int, int], *others: Any, **named: Any
    ) -> tuple[Tensor, None]:
        self.clamp(layer, input_dimensions, *others, **named)
        attention = layer.attention
        table = attention.relative_position_bias.relative_position_bias_table
        branch = self.attend(layer, layer.layernorm_before(hidden_states), input_dimensions, table)
        hidden_states = hidden_states + layer.drop_path(layer.dropout(attention.o_proj(branch)))
        return hidden_states + layer.dropout(layer.mlp(layer.layernorm_after(hidden_states))), None


class LayerOfParts(WindowLayer):
    """What layers share whose attention has its heads in `self` and its last layer in `output`."""

    def bypassed(self, layer: nn.Module) -> Sequence[nn.Module]:
        return layer.attention, layer.attention.self, layer.attention.self.dropout, layer.attention.output

    def read(self, layer: nn.Module) -> Sequence[nn.Module]:
        return layer.attention.self.query, layer.attention.self.key, layer.attention.self.value

    def dropout(self, layer: nn.Module) -> float:
        return largest_rate(layer.attention.self.dropout, layer.attention.output.dropout)


class SwinLayerOfParts(LayerOfParts):
    """`MaskFormerSwinLayer`, `DonutSwinLayer`, `ClapAudioLayer`."""

    def fits(self, layer: nn.Module) -> bool:
        heads = (*_HEADS, "relative_position_bias_table")
        return has(layer, *_LAYER, "intermediate", "output") and _has_parts(layer.attention, heads)

    def compute(
        self, layer: nn.Module, hidden_states: Tensor, input_dimensions: tuple[int, int], *others: Any, **named: Any
    ) -> tuple[Tensor]:
        self.clamp(layer, input_dimensions, *others, **named)
        table = layer.attention.self.relative_position_bias_table
        branch = self.attend(layer, layer.layernorm_before(hidden_states), input_dimensions, table)
        output = layer.attention.output
        hidden_states = hidden_states + layer.drop_path(output.dropout(output.dense(branch)))
        return (hidden_states + layer.output(layer.intermediate(layer.layernorm_after(hidden_states))),)


class SwinV2Layer(LayerOfParts):
    """`Swinv2Layer`, `Swin2SRLayer`. Between regions of a shifted window they add -100 twice, the op once."""

    def fits(self, layer: nn.Module) -> bool:
        heads = (*_HEADS, "logit_scale", "continuous_position_bias_mlp", "relative_coords_table")
        return has(layer, *_LAYER, "intermediate", "output") and _has_parts(layer.attention, heads)

    def values(self, layer: nn.Module) -> str | None:
        factor = layer.attention.self.logit_scale.detach().clamp(max=MAX_LOGIT_SCALE).exp().max().item()
        most = self.largest_factor(layer)
        if layer.shift_size == 0 or factor <= most:
            return None
        return f"its mask is -200 where the op's is -100: a logit factor of {factor:.1f}, above {most:.1f}, may show it"

    def note(self, layer: nn.Module) -> str | None:
        if layer.shift_size == 0:
            return super().note(layer)
        return (
            "its mask is -200 where the op's is -100: the same to the last digit"
            f" until training raises a logit factor above {self.largest_factor(layer):.1f}"
        )

    def largest_factor(self, layer: nn.Module) -> float:
        """The factor of the cosine below which no weight between regions reaches a digit of the result.

        Two logits of a token differ by at most twice the factor and the range of the bias; N weights may add up.
        """
        heads = layer.attention.self
        digits = -math.log(torch.finfo(heads.logit_scale.dtype).eps)
        return (-BETWEEN_REGIONS - _BIAS_RANGE - digits - math.log(layer.window_size**2)) / 2

    def compute(
        self, layer: nn.Module, hidden_states: Tensor, input_dimensions: tuple[int, int], *others: Any, **named: Any
    ) -> tuple[Tensor]:
        heads, output = layer.attention.self, layer.attention.output
        table = position_bias_table(
            heads.continuous_position_bias_mlp, heads.relative_coords_table, heads.num_attention_heads
        )
        branch = self.attend(layer, hidden_states, input_dimensions, table, logit_scale=heads.logit_scale.flatten())
        branch = layer.layernorm_before(output.dropout(output.dense(branch)))
        hidden_states = hidden_states + layer.drop_path(branch)
        branch = layer.layernorm_after(layer.output(layer.intermediate(hidden_states)))
        return (hidden_states + layer.drop_path(branch),)


class ViTAttention(Form):
    """`ViTAttention`."""

    def fits(self, attention: nn.Module) -> bool:
        return type(attention).__name__ == "ViTAttention" and has(attention, *_PROJECTIONS)

    def takes(
        self, attention: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **named: Any
    ) -> bool:
        return attention_mask is None and not attention.config.output_attentions and not _asks_for_weights(named)

    def read(self, attention: nn.Module) -> Sequence[nn.Module]:
        return attention.q_proj, attention.k_proj, attention.v_proj

    def dropout(self, attention: nn.Module) -> float:
        return largest_rate(attention.attention_dropout)

    def setting(self, attention: nn.Module) -> str | None:
        return _chosen_attention(attention)

    def probe(self, attention: nn.Module, generator: torch.Generator) -> tuple[Tensor]:
        return (random(generator, 2, 5, attention.q_proj.in_features),)

    def compute(
        self, attention: nn.Module, hidden_states: Tensor, attention_mask: None = None, **named: Any
    ) -> tuple[Tensor, None]:
        qkv, _ = joint_projection(hidden_states, *self.read(attention))
        form = {"scale": attention.scaling, "backend": self.backend}
        return attention.o_proj(biased_attention(qkv, None, attention.num_attention_heads, **form)), None


def _by_name(layer: nn.Module, positional: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by their names, after the tokens and their grid."""
    return dict(zip(layer._fusion.arguments[2:], positional, strict=False)) | dict(named)


def _asks_for_weights(named: Mapping[str, Any]) -> bool:
    """Whether a call wants what no fused op has: attention weights, or heads left out."""
    return bool(named.get("output_attentions")) or named.get("head_mask") is not None


def _chosen_attention(attention: nn.Module) -> str | None:
    """Why the attention that the model was told to use stays."""
    name = attention.config._attn_implementation
    return None if name in _REPLACED else f"it was told to use the attention {name!r}"


def _has_parts(attention: nn.Module, heads: Sequence[str]) -> bool:
    return has(getattr(attention, "self", None), *heads) and has(getattr(attention, "output", None), "dense", "dropout")


FORMS: tuple[type[Form], ...] = (SwinLayer, SwinLayerOfParts, SwinV2Layer, ViTAttention)
