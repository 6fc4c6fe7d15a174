"""What is measured: the ops' arguments at the shapes of the released models, under masks of SimMIM's 32-pixel cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simmim_fast import testing
from simmim_fast.masking import MaskGenerator, token_index

BATCH = {"cpu": 8, "cuda": 256}
# Of activations, and of the parameters beside them; products need their operands in one dtype.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARAMETERS = torch.float32

SWIN = MaskGenerator(192, 32, 4, 0.6)
VIT = MaskGenerator(224, 32, 16, 0.6)

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Arguments of an op in a model.

    Attributes:
        op: The op's name.
        name: Which model, and where in it.
        draw: (batch, dtype, device, seed) -> arguments of the op by name.
        wanted: Arguments that get a gradient, where they are not None.
        least: A case of the same results that takes less work, by which the limit of this one is reckoned.
    """

    op: str
    name: str
    draw: Callable[[int, torch.dtype, str, int], Inputs]
    wanted: tuple[str, ...]
    least: Case | None = None

    def inputs(self, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        """Arguments by name, random; those that get a gradient ask for it."""
        inputs = self.draw(batch, dtype, device, seed)
        for tensor in self.leaves(inputs):
            tensor.requires_grad_()
        return inputs

    def leaves(self, inputs: Inputs) -> list[Tensor]:
        """The arguments that get a gradient."""
        return [inputs[name] for name in self.wanted if inputs[name] is not None]


def _masks(masks: MaskGenerator, batch: int, device: str, seed: int) -> Tensor:
    return masks.batch(batch, generator=torch.Generator().manual_seed(seed)).to(device)


def _substitute_mask_tokens(masks: MaskGenerator, channels: int) -> Case:
    def draw(batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        mask = _masks(masks, batch, device, seed)
        shape = (*mask.shape, channels)
        inputs = testing.substitute_mask_tokens_inputs(
            shape, dtype, PARAMETERS, pos_embed=False, device=device, seed=seed
        )
        return inputs | {"mask": mask}

    return Case("substitute_mask_tokens", _model(masks), draw, ("x", "mask_token"))


def _masked_patch_embed(masks: MaskGenerator, channels: int, norm: bool, listed: bool = False) -> Case:
    def draw(batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        mask, patch = _masks(masks, batch, device, seed), masks.model_patch_size
        shape = (*mask.shape, 3, patch, channels)
        inputs = testing.masked_patch_embed_inputs(
            shape, dtype, norm=norm, pos_embed=not norm, device=device, seed=seed
        )
        visible = token_index(~mask, masks.counts[0]) if listed else None
        return inputs | {"mask": mask, "visible": visible}

    wanted = ("weight", "bias", "norm_weight", "norm_bias", "mask_token", "pos_embed")
    least = None if listed else _masked_patch_embed(masks, channels, norm, listed=True)
    return Case("masked_patch_embed", _model(masks), draw, wanted, least)


def _bias_gelu(model: str, tokens: tuple[int, ...], channels: int) -> Case:
    def draw(batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        return testing.bias_gelu_inputs((batch, *tokens, channels), dtype, PARAMETERS, device=device, seed=seed)

    return Case("bias_gelu", model, draw, ("x", "bias"))


def _biased_attention(model: str, tokens: int) -> Case:
    def draw(batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        return testing.biased_attention_inputs((batch, tokens, 12, 64), dtype, PARAMETERS, device=device, seed=seed)

    return Case("biased_attention", model, draw, ("qkv", "bias"))


def _residual_layer_norm(model: str, tokens: tuple[int, ...], channels: int, norm: str = "output") -> Case:
    def draw(batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        return testing.residual_layer_norm_inputs(
            (batch, *tokens, channels),
            PARAMETERS,
            dtype,
            PARAMETERS,
            gamma=False,
            norm=norm,
            device=device,
            seed=seed,
        )

    return Case("residual_layer_norm", model, draw, ("x", "delta", "weight", "bias"))


def _masked_l1_loss(masks: MaskGenerator) -> Case:
    def draw(batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        shape, patch = (batch, 3, *masks.input_size), masks.model_patch_size
        inputs = testing.masked_l1_loss_inputs(shape, patch, dtype, torch.float32, device=device, seed=seed)
        return inputs | {"mask": _masks(masks, batch, device, seed)}

    return Case("masked_l1_loss", _model(masks), draw, ("prediction",))


def _linear_masked_loss(masks: MaskGenerator, depth: int, listed: bool) -> Case:
    def draw(batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        stride, patch = masks.encoder_stride, masks.model_patch_size
        shape = (batch, *(side // stride for side in masks.input_size), depth, stride, 3)
        inputs = testing.linear_masked_loss_inputs(shape, patch, dtype, torch.float32, device=device, seed=seed)
        mask = _masks(masks, batch, device, seed)
        tokens = token_index(mask[:, :: stride // patch, :: stride // patch], masks.counts[1]) if listed else None
        return inputs | {"mask": mask, "tokens": tokens}

    name = _model(masks) + (" listed" if listed else "")
    least = None if listed else _linear_masked_loss(masks, depth, listed=True)
    return Case("linear_masked_loss", name, draw, ("features", "weight", "bias"), least)


def _shifted_window_attention(model: str, grid: int, heads: int, window: int, shift: int, cosine: bool = False) -> Case:
    def draw(batch: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        return testing.shifted_window_attention_inputs(
            (batch, grid, grid, heads, 32),
            (window, window),
            (shift, shift),
            dtype,
            PARAMETERS,
            cosine=cosine,
            pad_value=False,
            device=device,
            seed=seed,
        )

    return Case("shifted_window_attention", model, draw, ("qkv", "bias_table", "logit_scale"))


def _model(masks: MaskGenerator) -> str:
    return {SWIN: "swin_base_192", VIT: "vit_base_224"}[masks]


_ALL = (
    _substitute_mask_tokens(SWIN, 128),
    _substitute_mask_tokens(VIT, 768),
    _masked_patch_embed(SWIN, 128, norm=True),
    _masked_patch_embed(VIT, 768, norm=False),
    _bias_gelu("swin_base_192 stage 1", (48, 48), 512),
    _bias_gelu("swin_base_192 stage 3", (12, 12), 2048),
    _bias_gelu("vit_base_224", (197,), 3072),
    _biased_attention("vit_base_224", 197),
    _biased_attention("vit_base_384", 577),
    _shifted_window_attention("swin_base_192 stage 1", 48, 4, 6, 0),
    _shifted_window_attention("swin_base_192 stage 1 shifted", 48, 4, 6, 3),
    _shifted_window_attention("swin_base_192 stage 2 shifted", 24, 8, 6, 3),
    _shifted_window_attention("swin_base_192 stage 3 shifted", 12, 16, 6, 3),
    _shifted_window_attention("swin_base_192 stage 4", 6, 32, 6, 0),
    _shifted_window_attention("swin_base_224 stage 3 shifted", 14, 16, 7, 3),
    _shifted_window_attention("swinv2_base_192 stage 1 shifted", 48, 4, 12, 6, cosine=True),
    _residual_layer_norm("swin_base_192 stage 1", (48, 48), 128),
    _residual_layer_norm("swin_base_192 stage 3", (12, 12), 512),
    _residual_layer_norm("swinv2_base_192 stage 1", (48, 48), 128, "delta"),
    _residual_layer_norm("vit_base_224", (197,), 768),
    _masked_l1_loss(SWIN),
    _masked_l1_loss(VIT),
    *(_linear_masked_loss(SWIN, 1024, listed) for listed in (False, True)),
    *(_linear_masked_loss(VIT, 768, listed) for listed in (False, True)),
)
CASES = {op: {case.name: case for case in _ALL if case.op == op} for op in dict.fromkeys(case.op for case in _ALL)}
