"""Swin Transformer V2 (arXiv 2111.09883) as the official code builds it, and its form for SimMIM.

Against V1: cosine attention with a learnt temperature, the position bias from a small MLP over log-spaced offsets, and
norms after the branch instead of before it. Names are those of the official models/swin_transformer_v2.py.

Shapes: B batch, H and W the token grid of a stage, C its channels, N tokens of one window, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simmim_fast._arguments import check_at_least, check_types
from simmim_fast.models.layers import Drawn, NormLayer, apply_mlp, block_weights, join_biases, project, select_tokens
from simmim_fast.models.recompute import Affine, is_plain_norm
from simmim_fast.models.swin import (
    AttentionInWindows,
    MaskedSwin,
    SwinTransformer,
    SwinTransformerBlock,
    gather_neighbours,
)
from simmim_fast.ops import residual_layer_norm
from simmim_fast.ops.shifted_window_attention.reference import relative_position_index

POSITION_MLP_DIM = 512


class WindowAttention(AttentionInWindows):
    """Cosine self-attention inside (shifted) windows with a continuous position bias (sections 3.3 and 3.4).

    Args:
        dim: Channels.
        window_size: Height and width of a window in tokens.
        shift: Rows and columns by which the grid is rolled before it is cut into windows.
        num_heads: Heads.
        qkv_bias: Whether q and v carry a bias; k never does.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        backend: Of the attention.
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        shift: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(window_size, shift, num_heads, attn_drop, backend)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, POSITION_MLP_DIM), nn.ReLU(), nn.Linear(POSITION_MLP_DIM, num_heads, bias=False)
        )
        self.register_buffer("relative_coords_table", relative_coords_table(window_size))
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def bias_table(self) -> Tensor:
        """Position bias of each offset between two tokens: ((2 wh - 1)(2 ww - 1), h)."""
        return 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads))

    def qkv_biases(self) -> tuple[Tensor, ...]:
        return () if self.q_bias is None else (self.q_bias, self.v_bias)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None, queries: Tensor | None = None, proj: Affine | None = None
    ) -> Tensor:
        """x (B, H, W, C) to (B, H, W, C), or (B, K, C) with queries; arguments as in `attend`.

        With the parameters of `proj`, x is the product of `qkv` (B, H, W, 3C).
        """
        pad_value = self.pad_value(x.shape[1:3])
        form = {"logit_scale": self.logit_scale.flatten(), "pad_value": pad_value, "queries": queries}
        qkv = project(x, self.qkv, join_biases(self.qkv_biases())) if proj is None else x
        x = self.attend(qkv, self.bias_table(), attn_mask, **form)
        return self.proj_drop(self.proj(x) if proj is None else proj.product(x))


def relative_coords_table(window_size: tuple[int, int], trained_size: tuple[int, int] | None = None) -> Tensor:
    """Log-spaced offsets between two tokens, the input of the position MLP: (1, 2 wh - 1, 2 ww - 1, 2) float32.

    An offset d becomes sign(d) log2(1 + |8 d / (w - 1)|) / log2(8), where w is the side of the window that the MLP was
    trained on: `trained_size`, by default this window (section 3.4, equation 4).
    """
    axes = [torch.arange(1 - size, size, dtype=torch.float32) for size in window_size]
    table = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    for axis, size in enumerate(trained_size or window_size):
        table[..., axis] *= 8 / max(size - 1, 1)
    return (table.sign() * torch.log2(table.abs() + 1) / 3).unsqueeze(0)


class SwinTransformerV2Block(SwinTransformerBlock):
    """One block with its norms after the branches: x + LN(attention(x)), then x + LN(MLP(x)) (section 3.2)."""

    attention_layer = WindowAttention

    takes_streams = False  # the norm is of the branch, so it adds it, too

    def forward(self, x: Tensor, tokens: Tensor | None = None, drawn: Drawn = (None, None)) -> Tensor:
        weights = block_weights(self.attn, self.mlp)
        branch = self._attend(x if weights.qkv is None else weights.qkv.product(x), tokens, weights.proj)
        x = self._add(select_tokens(x, tokens), branch, weights.proj_bias, self.norm1, drawn[0])
        return self._add(x, apply_mlp(x, self.mlp, weights), weights.fc2_bias, self.norm2, drawn[1])

    def _add(self, x: Tensor, branch: Tensor, bias: Tensor | None, norm: nn.Module, drawn: Tensor | None) -> Tensor:
        """x + LN(branch + bias), bias (C), the others (B, ..., C), with stochastic depth, drawn (B) or None."""
        if self.attn.backend == "reference" or not is_plain_norm(norm):
            return x + self.drop_path(norm(branch if bias is None else branch + bias.to(branch.dtype)), drawn)
        keep = self.drop_path.keep(branch, drawn)
        form = {"keep": keep, "delta_bias": bias, "norm": "delta", "backend": self.attn.backend}
        return residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, **form)


class PatchMergingV2(nn.Module):
    """Halve the grid, double the channels: 2 x 2 neighbours side by side, a linear layer, then the norm.

    Args:
        dim: Channels in.
        norm_layer: Builds a norm from its channels.
        **options: What the merging of `SwinTransformer` takes besides; the norm behind the layer has no use for it.
    """

    def __init__(self, dim: int, norm_layer: NormLayer = nn.LayerNorm, **options: str) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(gather_neighbours(x)))


class SwinTransformerV2(SwinTransformer):
    """Swin Transformer V2 with a classification head.

    Takes the arguments of `SwinTransformer` but `qk_scale`, and:

    Args:
        pretrained_window_sizes: Side of the window of each stage in pre-training, 0 for this model's; None for all 0.
            Entries beyond the last stage are not read, as officially.
    """

    block_layer = SwinTransformerV2Block
    merging_layer = PatchMergingV2

    def __init__(self, *args: object, pretrained_window_sizes: Sequence[int] | None = None, **kwargs: object) -> None:
        check_types(SwinTransformerV2.__init__, {"pretrained_window_sizes": pretrained_window_sizes})
        if kwargs.pop("qk_scale", None) is not None:
            raise ValueError("qk_scale must be None in Swin V2: its cosine attention has a learnt temperature")
        super().__init__(*args, **kwargs)
        trained_sizes = [0] * len(self.layers) if pretrained_window_sizes is None else pretrained_window_sizes
        if len(trained_sizes) < len(self.layers):
            raise ValueError(
                f"pretrained_window_sizes must have one entry a stage, so {len(self.layers)}, got {trained_sizes}"
            )
        for stage, trained_size in zip(self.layers, trained_sizes, strict=False):
            check_at_least("pretrained_window_sizes", trained_size, 0)
            for block in stage.blocks:
                nn.init.zeros_(block.norm1.weight)
                nn.init.zeros_(block.norm2.weight)
                if trained_size:
                    table = relative_coords_table(block.attn.window_size, (trained_size, trained_size))
                    block.attn.relative_coords_table.copy_(table)

    def no_weight_decay_keywords(self) -> set[str]:
        return {"cpb_mlp", "logit_scale", "relative_position_bias_table"}


class SwinTransformerV2ForSimMIM(MaskedSwin, SwinTransformerV2):
    """Swin V2 encoder for SimMIM. Takes the arguments of `SwinTransformerV2`; has no classification head."""
