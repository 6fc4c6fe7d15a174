"""Vision Transformer as BEiT and the official SimMIM build it, and its form for SimMIM.

Module and parameter names are those of the official code (models/vision_transformer.py), so checkpoints pass both ways.

Shapes: B batch, H and W the token grid, N = 1 + H W tokens with the class token first, C channels, h heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim_fast._arguments import size_pair
from simmim_fast.models.layers import (
    DropPath,
    Mlp,
    NormLayer,
    PatchEmbed,
    Stream,
    block_weights,
    check_encoder_arguments,
    check_image_size,
    join_biases,
    project,
    select_tokens,
    stochastic_depth_rates,
)
from simmim_fast.models.recompute import Affine
from simmim_fast.ops import biased_attention
from simmim_fast.ops.biased_attention import reference
from simmim_fast.ops.shifted_window_attention.reference import relative_position_index

CLASS_TOKEN_OFFSETS = 3  # class token to patch, patch to class token, class token to itself


class RelativePositionBias(nn.Module):
    """A learnt bias for each offset between two patches, and three for the class token (BEiT, arXiv 2106.08254).

    Args:
        window_size: Height and width of the patch grid.
        num_heads: Heads.
    """

    def __init__(self, window_size: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1) + CLASS_TOKEN_OFFSETS
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        self.register_buffer("relative_position_index", position_index_with_class_token(window_size))

    def forward(self) -> Tensor:
        """The bias of all pairs of tokens: (h, N, N)."""
        return gather_bias(self.relative_position_bias_table, self.relative_position_index)


def position_index_with_class_token(window_size: tuple[int, int]) -> Tensor:
    """Row of the bias table for each pair of tokens, the class token first: (N, N) int64."""
    between_patches = relative_position_index(window_size)
    from_class, to_class, class_to_class = (
        (2 * window_size[0] - 1) * (2 * window_size[1] - 1) + i for i in range(CLASS_TOKEN_OFFSETS)
    )
    index = F.pad(between_patches, (1, 0, 1, 0))
    index[0, :] = from_class
    index[:, 0] = to_class
    index[0, 0] = class_to_class
    return index


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Table (offsets, h) at the index (N, N): (h, N, N)."""
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1)


class Attention(nn.Module):
    """Self-attention over all tokens with a bias on the logits.

    Args:
        dim: Channels.
        num_heads: Heads.
        qkv_bias: Whether q and v carry a bias; k never does.
        qk_scale: Factor of the logits; head size ** -0.5 by default.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of the output.
        window_size: Height and width of the patch grid, where this block has a position bias of its own.
        backend: Of the attention. No kernel drops attention weights: with dropout, training takes the reference.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.scale = qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.relative_position_bias_table = None
        if window_size is not None:
            bias = RelativePositionBias(window_size, num_heads)
            self.relative_position_bias_table = bias.relative_position_bias_table
            self.register_buffer("relative_position_index", bias.relative_position_index)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def qkv_biases(self) -> tuple[Tensor, ...]:
        return () if self.q_bias is None else (self.q_bias, self.v_bias)

    def forward(
        self, x: Tensor, shared_bias: Tensor | None, queries: Tensor | None = None, proj: Affine | None = None
    ) -> Tensor:
        """x (B, N, C) to (B, N, C), or (B, K, C) with queries (B, K); shared_bias (h, N, N) or None.

        With the parameters of `proj`, x is the product of `qkv` (B, N, 3C).
        """
        bias = shared_bias
        if self.relative_position_bias_table is not None:
            own = gather_bias(self.relative_position_bias_table, self.relative_position_index)
            bias = own if bias is None else own + bias
        qkv = project(x, self.qkv, join_biases(self.qkv_biases())) if proj is None else x
        x = self._attend(qkv, bias, queries)
        return self.proj_drop(self.proj(x) if proj is None else proj.product(x))

    def _attend(self, qkv: Tensor, bias: Tensor | None, queries: Tensor | None) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        options = {"scale": self.scale, "queries": queries}
        if self.backend != "reference" and dropout == 0.0:
            return biased_attention(qkv, bias, self.num_heads, **options, backend=self.backend)
        return reference.biased_attention(qkv, bias, self.num_heads, **options, dropout=dropout)


class Block(nn.Module):
    """x + g1 attention(LN(x)), then x + g2 MLP(LN(x)); g1 and g2 are per-channel factors (layer scale), where used.

    Args:
        dim: Channels.
        num_heads: Heads.
        mlp_ratio: Hidden channels of the MLP over `dim`.
        drop: Dropout rate of the projection and the MLP.
        drop_path: Stochastic-depth rate.
        init_values: Start of the layer scale; None for none.
        norm_layer: Builds a norm from its channels.
        recompute: What the backward computes again: see `VisionTransformer`.
        **attention: What `Attention` takes besides: qkv_bias, qk_scale, attn_drop, window_size, backend.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        norm_layer: NormLayer = nn.LayerNorm,
        recompute: str = "pointwise",
        **attention: object,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, proj_drop=drop, **attention)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        mlp = {"drop_hidden": False, "backend": self.attn.backend, "recompute": recompute}
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, **mlp)
        self.gamma_1 = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))
        self.gamma_2 = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor | Stream, shared_bias: Tensor | None, tokens: Tensor | None = None) -> Tensor | Stream:
        """x (B, N, C) to (B, N, C), or of the listed tokens (B, K) alone to (B, K, C); a stream to a stream."""
        if isinstance(x, Stream):
            weights, backend = block_weights(self.attn, self.mlp, self.gamma_2), self.attn.backend
            x, qkv = x.normalise_into(self.norm1, weights.qkv, backend, self.recompute)
            branch = self.attn(qkv, shared_bias, tokens, weights.proj)
            added = (branch, self.gamma_1, self.drop_path.keep(branch), weights.proj_bias)
            stream = Stream(select_tokens(x, tokens), *added)
            x, branch = stream.through_mlp(self.norm2, self.mlp, weights, backend, store_sum=tokens is not None)
            return Stream(x, branch, weights.gamma, self.drop_path.keep(branch), weights.fc2_bias)
        branch = self.attn(self.norm1(x), shared_bias, tokens)
        x = select_tokens(x, tokens) + self.drop_path(_scale(branch, self.gamma_1))
        return x + self.drop_path(_scale(self.mlp(self.norm2(x)), self.gamma_2))


def _scale(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class VisionTransformer(nn.Module):
    """Vision Transformer with a classification head.

    Args:
        img_size: Side of the image in pixels, or (height, width); multiples of the patch.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        embed_dim: Channels of a token.
        depth: Blocks.
        num_heads: Heads of each block.
        mlp_ratio: Hidden channels of the MLP over `embed_dim`.
        qkv_bias: Whether q and v carry a bias.
        qk_scale: Factor of the attention logits; head size ** -0.5 by default.
        drop_rate: Dropout rate of tokens, projections and MLPs.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Stochastic-depth rate of the last block; earlier blocks have less, linearly.
        norm_layer: Builds a norm from its channels.
        init_values: Start of the layer scale; None for none.
        use_abs_pos_emb: Whether a learnt position embedding is added to the tokens.
        use_rel_pos_bias: Whether each block has a relative-position bias of its own.
        use_shared_rel_pos_bias: Whether the blocks share one relative-position bias.
        use_mean_pooling: Whether the head reads the normed mean of the patches instead of the class token.
        init_scale: Factor of the head's initial weights.
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back.
        recompute: What the backward computes again instead of storing it: "pointwise", the outputs of LayerNorm and
            GELU; "mlp", the first layer of the MLP, too; or "none". The reference stores all.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of range, an image that the patch does not divide, channels that the heads do not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        init_values: float | None = None,
        use_abs_pos_emb: bool = True,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        use_mean_pooling: bool = True,
        init_scale: float = 0.001,
        backend: str = "auto",
        recompute: str = "pointwise",
    ) -> None:
        check_encoder_arguments(VisionTransformer.__init__, locals(), ("depth", "num_heads"))
        super().__init__()
        self.img_size = size_pair("img_size", img_size)
        self.patch_size = self.stride = patch_size
        self.in_chans, self.num_classes, self.backend = in_chans, num_classes, backend
        self.num_features = self.embed_dim = embed_dim
        check_image_size(self.img_size, patch_size)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim)
        grid, positions = self.patch_embed.grid, torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(positions) if use_abs_pos_emb else None
        self.pos_drop = nn.Dropout(drop_rate)
        self.rel_pos_bias = RelativePositionBias(grid, num_heads) if use_shared_rel_pos_bias else None
        block = {"mlp_ratio": mlp_ratio, "drop": drop_rate, "init_values": init_values, "norm_layer": norm_layer}
        block |= {"qkv_bias": qkv_bias, "qk_scale": qk_scale, "attn_drop": attn_drop_rate}
        block |= {"backend": backend, "recompute": recompute, "window_size": grid if use_rel_pos_bias else None}
        rates = stochastic_depth_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, drop_path=rate, **block) for rate in rates)
        self.norm = nn.Identity() if use_mean_pooling else norm_layer(embed_dim)
        self.hands_on_streams = backend != "reference"
        self.fc_norm = norm_layer(embed_dim) if use_mean_pooling else None
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.reset_parameters(init_scale)

    def _trunc_normal_(self, tensor: Tensor) -> None:
        nn.init.trunc_normal_(tensor, std=0.02)

    def reset_parameters(self, init_scale: float) -> None:
        """Official initialisation; the last layer of each branch is scaled by 1 / sqrt(2 x its block's number)."""
        if self.pos_embed is not None:
            self._trunc_normal_(self.pos_embed)
        self._trunc_normal_(self.cls_token)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                self._trunc_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                block.attn.proj.weight.div_(math.sqrt(2.0 * number))
                block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))
            if self.num_classes > 0:
                self.head.weight.mul_(init_scale)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the official optimizer does not decay."""
        return {"pos_embed", "cls_token"}

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names of parameters that the official optimizer does not decay: none."""
        return set()

    def _position_embedding(self) -> Tensor | None:
        """That of the patches, (H, W, C), or None without a position embedding."""
        return None if self.pos_embed is None else self.pos_embed[0, 1:].view(*self.patch_embed.grid, -1)

    def forward_blocks(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Embedded patches (B, H, W, C), the class token put before them, through all blocks: (B, N, C).

        With a list of tokens (B, K), the class token being 0, of those alone: (B, K, C).
        """
        cls_token = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        x = self.pos_drop(x)
        shared_bias = self.rel_pos_bias() if self.rel_pos_bias is not None else None
        x = Stream(x) if self.hands_on_streams else x
        for block in self.blocks:
            x = block(x, shared_bias, tokens if block is self.blocks[-1] else None)
        return x.normalise(self.norm, self.backend)[1] if isinstance(x, Stream) else self.norm(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to what the head reads: (B, C)."""
        x = self.patch_embed(images)
        if self.pos_embed is not None:
            x = x + self._position_embedding()
        x = self.forward_blocks(x)
        return x[:, 0] if self.fc_norm is None else self.fc_norm(x[:, 1:].mean(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.head(self.forward_features(images))


class VisionTransformerForSimMIM(VisionTransformer):
    """ViT encoder for SimMIM (official models/simmim.py). Takes the arguments of `VisionTransformer`; has no head.

    Hidden patches are replaced by one learnt mask token after the patch embedding.
    """

    takes_lists = True  # of visible patches and wanted tokens, in `encode`

    def __init__(self, num_classes: int = 0, **kwargs: object) -> None:
        if num_classes != 0:
            raise ValueError(f"num_classes must be 0 in an encoder for SimMIM, got {num_classes}")
        super().__init__(num_classes=0, **kwargs)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
        self._trunc_normal_(self.mask_token)

    def _trunc_normal_(self, tensor: Tensor) -> None:
        nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)

    def encode(
        self, images: Tensor, mask: Tensor, visible: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """As `forward`, channels last: (B, H / patch, W / patch, C).

        Args:
            images: As in `forward`.
            mask: As in `forward`.
            visible: (B, K) flat indices of the patches that are not hidden, where they are known.
            tokens: (B, K) flat indices of the patches whose features are wanted, which are then (B, K, C).
        """
        x = self.patch_embed.forward_masked(
            images, mask, self.mask_token.flatten(), self._position_embedding(), visible, self.backend
        )
        if tokens is not None:
            return self.forward_blocks(x, tokens + 1)
        return self.forward_blocks(x)[:, 1:].unflatten(1, self.patch_embed.grid)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Encode images whose masked patches are hidden.

        Args:
            images: (B, in_chans, H, W).
            mask: (B, H / patch, W / patch), bool or integer: non-zero where hidden.

        Returns:
            (B, C, H / patch, W / patch).
        """
        return self.encode(images, mask).permute(0, 3, 1, 2)
