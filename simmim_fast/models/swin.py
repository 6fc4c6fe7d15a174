"""Swin Transformer (arXiv 2103.14030), and its form for SimMIM: mask tokens in, features of the last stage out.

Module and parameter names are those of the official code (models/swin_transformer.py), so checkpoints pass both ways.

Shapes: B batch, H and W the token grid of a stage, C its channels, N tokens of one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simmim_fast._arguments import check_at_least, size_pair
from simmim_fast.models.layers import (
    Drawn,
    DropPath,
    Mlp,
    NormLayer,
    PatchEmbed,
    Stream,
    block_weights,
    check_encoder_arguments,
    check_image_size,
    init_linear_and_norm,
    join_biases,
    select_tokens,
    stochastic_depth_rates,
)
from simmim_fast.models.recompute import Affine, cast_together, is_plain
from simmim_fast.ops import shifted_window_attention
from simmim_fast.ops.shifted_window_attention import reference
from simmim_fast.ops.shifted_window_attention.reference import relative_position_index, shift_mask


class AttentionInWindows(nn.Module):
    """What the attention of both Swins shares: attending inside (shifted) windows, without the linear layers around it.

    A subclass registers the buffer `relative_position_index`, at the place that it has in official checkpoints, and
    has the layers `qkv` and `proj` and the method `qkv_biases`.

    Args:
        window_size: Height and width of a window in tokens.
        shift: Rows and columns by which the grid is rolled before it is cut into windows.
        num_heads: Heads.
        attn_drop: Dropout rate of the attention weights.
        backend: Of the op. No kernel drops attention weights: with dropout, training takes the reference.
    """

    def __init__(
        self, window_size: tuple[int, int], shift: tuple[int, int], num_heads: int, attn_drop: float, backend: str
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.num_heads = num_heads
        self.backend = backend
        self.attn_drop = nn.Dropout(attn_drop)

    def pad_value(self, grid: Sequence[int]) -> Tensor | None:
        """What padded tokens carry, (3C), where a grid needs them."""
        padded = any(size % window for size, window in zip(grid, self.window_size, strict=True))
        return join_biases(self.qkv_biases()) if padded else None

    def attend(self, qkv: Tensor, bias_table: Tensor, attn_mask: Tensor | None, **form: Any) -> Tensor:
        """qkv (B, H, W, 3C) to (B, H, W, C), or (B, K, C) with `queries` (B, K) in a grid of one window.

        attn_mask (windows, N, N) is what shifted windows add to their logits.
        """
        arguments = (qkv, bias_table, self.window_size, self.shift, self.num_heads)
        dropout = self.attn_drop.p if self.training else 0.0
        if self.backend != "reference" and dropout == 0.0:
            return shifted_window_attention(*arguments, **form, backend=self.backend)
        kept = {"position_index": self.relative_position_index, "attn_mask": attn_mask}
        return reference.shifted_window_attention(*arguments, **form, **kept, dropout=dropout)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift={self.shift}, num_heads={self.num_heads}"


class WindowAttention(AttentionInWindows):
    """Self-attention inside (shifted) windows with a learnt relative-position bias (section 3.2).

    Args:
        dim: Channels.
        window_size: Height and width of a window in tokens.
        shift: Rows and columns by which the grid is rolled before it is cut into windows.
        num_heads: Heads.
        qkv_bias: Whether q, k and v carry a bias.
        qk_scale: Factor of the logits; head size ** -0.5 by default.
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
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(window_size, shift, num_heads, attn_drop, backend)
        self.scale = qk_scale
        offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def qkv_biases(self) -> tuple[Tensor, ...]:
        return () if self.qkv.bias is None else (self.qkv.bias,)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None, queries: Tensor | None = None, proj: Affine | None = None
    ) -> Tensor:
        """x (B, H, W, C) to (B, H, W, C), or (B, K, C) with queries; arguments as in `attend`.

        With the parameters of `proj`, x is the product of `qkv` (B, H, W, 3C).
        """
        form = {"scale": self.scale, "pad_value": self.pad_value(x.shape[1:3]), "queries": queries}
        qkv = self.qkv(x) if proj is None else x
        x = self.attend(qkv, self.relative_position_bias_table, attn_mask, **form)
        return self.proj_drop(self.proj(x) if proj is None else proj.product(x))


class SwinTransformerBlock(nn.Module):
    """One block: x + attention(LN(x)), then x + MLP(LN(x)) (section 3.2, equation 3).

    Args:
        dim: Channels.
        input_resolution: Height and width of the token grid.
        num_heads: Heads.
        window_size: Height and width of a window; an axis that is no longer than it holds one window, unshifted.
        shifted: Whether the windows are shifted by half a window.
        mlp_ratio: Hidden channels of the MLP over `dim`.
        drop: Dropout rate of the projection and the MLP.
        drop_path: Stochastic-depth rate.
        norm_layer: Builds a norm from its channels.
        recompute: What the backward computes again: see `SwinTransformer`.
        **attention: What `attention_layer` takes besides: qkv_bias, qk_scale, attn_drop, backend.
    """

    attention_layer: type[nn.Module] = WindowAttention
    takes_streams = True

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: tuple[int, int],
        shifted: bool,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        recompute: str = "pointwise",
        **attention: object,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        window = tuple(min(w, size) for w, size in zip(window_size, input_resolution, strict=True))
        shift = tuple(
            w // 2 if shifted and size > w else 0 for w, size in zip(window_size, input_resolution, strict=True)
        )
        self.norm1 = norm_layer(dim)
        self.attn = self.attention_layer(dim, window, shift, num_heads, proj_drop=drop, **attention)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, backend=self.attn.backend, recompute=recompute)
        self.is_one_window = window[0] >= input_resolution[0] and window[1] >= input_resolution[1]
        padded = tuple(-(-size // w) * w for size, w in zip(input_resolution, window, strict=True))
        self.register_buffer("attn_mask", shift_mask(padded, window, shift) if any(shift) else None)

    def draw(self, x: Tensor | Stream) -> Drawn:
        """What stochastic depth draws, for a forward that is to be computed again: which samples keep each branch."""
        x = x.x if isinstance(x, Stream) else x
        return self.drop_path.draw(x), self.drop_path.draw(x)

    def forward(self, x: Tensor | Stream, tokens: Tensor | None = None, drawn: Drawn = (None, None)) -> Tensor | Stream:
        """x (B, H, W, C) to (B, H, W, C), or of listed tokens (B, K) to (B, K, C); a stream to a stream; see `draw`."""
        if isinstance(x, Stream):
            weights, backend = block_weights(self.attn, self.mlp), self.attn.backend
            x, qkv = x.normalise_into(self.norm1, weights.qkv, backend, self.recompute)
            branch = self._attend(qkv, tokens, weights.proj)
            added = {"keep": self.drop_path.keep(branch, drawn[0]), "bias": weights.proj_bias}
            stream = Stream(select_tokens(x, tokens), branch, **added)
            x, branch = stream.through_mlp(self.norm2, self.mlp, weights, backend, store_sum=tokens is not None)
            return Stream(x, branch, keep=self.drop_path.keep(branch, drawn[1]), bias=weights.fc2_bias)
        x = select_tokens(x, tokens) + self.drop_path(self._attend(self.norm1(x), tokens), drawn[0])
        return x + self.drop_path(self.mlp(self.norm2(x)), drawn[1])

    def _attend(self, x: Tensor, tokens: Tensor | None, proj: Affine | None = None) -> Tensor:
        """Attention on x (B, H, W, C), of the listed tokens alone where there is a list; proj as in the attention."""
        if tokens is None or self.is_one_window:
            return self.attn(x, self.attn_mask, tokens, proj)
        return select_tokens(self.attn(x, self.attn_mask, proj=proj), tokens)


class PatchMerging(nn.Module):
    """Halve the grid, double the channels: 2 x 2 neighbours side by side, a norm, a linear layer (section 3.1).

    Args:
        dim: Channels in.
        norm_layer: Builds a norm from its channels.
        backend: Of the norm.
        recompute: What the backward computes again: see `SwinTransformer`.
    """

    def __init__(
        self, dim: int, norm_layer: NormLayer = nn.LayerNorm, backend: str = "auto", recompute: str = "pointwise"
    ) -> None:
        super().__init__()
        self.backend, self.recompute = backend, recompute
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = gather_neighbours(x)
        if self.backend == "reference":
            return self.reduction(self.norm(x))
        if not is_plain(self.reduction):
            return self.reduction(Stream(x).normalise(self.norm, self.backend)[1])
        (weight,), _ = cast_together([self.reduction.weight])
        reduction = Affine(weight, stored=self.reduction.weight.detach() if self.recompute == "mlp" else None)
        return Stream(x).normalise_into(self.norm, reduction, self.backend, self.recompute)[1]


def gather_neighbours(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B, H/2, W/2, 4C): the four tokens of each 2 x 2 square, column by column, in one copy."""
    squares = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
    return squares.permute(0, 1, 3, 4, 2, 5).flatten(3)


class BasicLayer(nn.Module):
    """One stage: blocks with plain and shifted windows in turn, then the patch merging.

    Args:
        blocks: The blocks, in order.
        downsample: The merging after them, or None in the last stage.
        use_checkpoint: Whether blocks are recomputed in the backward pass instead of stored.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, use_checkpoint: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor | Stream, tokens: Tensor | None = None) -> Tensor | Stream:
        """x (B, H, W, C) through the stage; the last may be asked for the listed tokens (B, K) alone: (B, K, C).

        Blocks get what this gets, a tensor or a stream; a merging gives a tensor.
        """
        restores = self.restores_random_state
        for block in self.blocks:
            wanted = tokens if block is self.blocks[-1] else None
            if self.use_checkpoint and self.training:
                drawn = (None, None) if restores else block.draw(x)
                x = checkpoint(block, x, wanted, drawn, use_reentrant=False, preserve_rng_state=restores)
            else:
                x = block(x, wanted)
        if self.downsample is None:
            return x
        return self.downsample(x.add() if isinstance(x, Stream) else x)

    @property
    def restores_random_state(self) -> bool:
        """Whether a block that is computed again would draw again; a CUDA graph cannot set the state back."""
        return self.use_checkpoint and any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.blocks.modules())


class SwinTransformer(nn.Module):
    """Swin Transformer with a classification head.

    Args:
        img_size: Side of the image in pixels, or (height, width); multiples of `stride`.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        embed_dim: Channels of the first stage; each further stage doubles them.
        depths: Blocks of each stage.
        num_heads: Heads of each stage.
        window_size: Side of a window in tokens, or (height, width). A stage whose grid is smaller is one window.
        mlp_ratio: Hidden channels of the MLP over its input's.
        qkv_bias: Whether q, k and v carry a bias.
        qk_scale: Factor of the attention logits; head size ** -0.5 by default.
        drop_rate: Dropout rate of tokens, projections and MLPs.
        attn_drop_rate: Dropout rate of attention weights.
        drop_path_rate: Stochastic-depth rate of the last block; earlier blocks have less, linearly.
        norm_layer: Builds a norm from its channels.
        ape: Whether an absolute position embedding is added to the patch embedding.
        patch_norm: Whether the patch embedding ends in a norm.
        use_checkpoint: Whether blocks are recomputed in the backward pass instead of stored.
        backend: "auto", "reference", "native" or "triton"; an explicit name never falls back.
        recompute: What the backward computes again instead of storing it: "pointwise", the outputs of LayerNorm and
            GELU; "mlp", the first layer of the MLP, too; or "none". The reference stores all.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of range, sizes that do not divide, lists of different lengths, a window that no stage can
            fill.
    """

    block_layer: type[nn.Module] = SwinTransformerBlock
    merging_layer: type[nn.Module] = PatchMerging

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: NormLayer = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        backend: str = "auto",
        recompute: str = "pointwise",
    ) -> None:
        check_encoder_arguments(SwinTransformer.__init__, locals(), ())
        super().__init__()
        _check_stages(embed_dim, depths, num_heads)
        self.img_size = size_pair("img_size", img_size)
        self.patch_size = patch_size
        self.in_chans, self.num_classes = in_chans, num_classes
        self.embed_dim, self.backend = embed_dim, backend
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.stride = patch_size * 2 ** (len(depths) - 1)
        window = size_pair("window_size", window_size)
        check_image_size(self.img_size, self.stride)
        norm = norm_layer if patch_norm else None
        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim, norm)
        _check_window(window, self.patch_embed.grid)
        self.absolute_pos_embed = self._new_position_embedding() if ape else None
        self.pos_drop = nn.Dropout(drop_rate)

        block = {"window_size": window, "mlp_ratio": mlp_ratio, "drop": drop_rate, "norm_layer": norm_layer}
        block |= {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "backend": backend, "recompute": recompute}
        if qk_scale is not None:
            block["qk_scale"] = qk_scale
        self.layers = self._build_stages(depths, num_heads, drop_path_rate, use_checkpoint, block)
        self.norm = norm_layer(self.num_features)
        self.hands_on_streams = self.block_layer.takes_streams and backend != "reference"
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(init_linear_and_norm)

    def _new_position_embedding(self) -> nn.Parameter:
        embedding = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, self.embed_dim))
        return nn.init.trunc_normal_(embedding, std=0.02)

    def _build_stages(
        self,
        depths: Sequence[int],
        num_heads: Sequence[int],
        drop_path_rate: float,
        use_checkpoint: bool,
        block: dict[str, object],
    ) -> nn.ModuleList:
        rates = iter(stochastic_depth_rates(drop_path_rate, sum(depths)))
        stages = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = self.embed_dim * 2**stage
            grid = tuple(size // 2**stage for size in self.patch_embed.grid)
            blocks = [
                self.block_layer(dim, grid, heads, shifted=i % 2 == 1, drop_path=next(rates), **block)
                for i in range(depth)
            ]
            last = stage == len(depths) - 1
            options = {name: block[name] for name in ("norm_layer", "backend", "recompute")}
            merging = None if last else self.merging_layer(dim, **options)
            stages.append(BasicLayer(blocks, merging, use_checkpoint))
        return stages

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the official optimizer does not decay."""
        return {"absolute_pos_embed"}

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names of parameters that the official optimizer does not decay."""
        return {"relative_position_bias_table"}

    def _position_embedding(self) -> Tensor | None:
        """(H, W, C), or None without an absolute position embedding."""
        return None if self.absolute_pos_embed is None else self.absolute_pos_embed.view(*self.patch_embed.grid, -1)

    def forward_stages(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Embedded tokens (B, H, W, C) through dropout, all stages and the last norm: (B, h, w, num_features).

        With a list of tokens of the last stage (B, K), of those alone: (B, K, num_features).
        """
        x = self.pos_drop(x)
        for stage in self.layers:
            x = stage(Stream(x) if self.hands_on_streams else x, tokens if stage is self.layers[-1] else None)
        return x.normalise(self.norm, self.backend)[1] if isinstance(x, Stream) else self.norm(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the mean of the last stage's tokens: (B, num_features)."""
        x = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            x = x + self._position_embedding()
        return self.forward_stages(x).mean(dim=(1, 2))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.head(self.forward_features(images))


class MaskedSwin:
    """What turns a Swin Transformer into an encoder for SimMIM (official models/simmim.py): put before it as a base.

    Hidden patches are replaced by one learnt mask token after the patch embedding.
    """

    takes_lists = True  # of visible patches and wanted tokens, in `encode`

    def __init__(self, num_classes: int = 0, **kwargs: object) -> None:
        if num_classes != 0:
            raise ValueError(f"num_classes must be 0 in an encoder for SimMIM, got {num_classes}")
        super().__init__(num_classes=0, **kwargs)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def encode(
        self, images: Tensor, mask: Tensor, visible: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """As `forward`, channels last: (B, H / stride, W / stride, num_features).

        Args:
            images: As in `forward`.
            mask: As in `forward`.
            visible: (B, K) flat indices of the patches that are not hidden, where they are known.
            tokens: (B, K) flat indices of the features that are wanted, which are then (B, K, num_features).
        """
        x = self.patch_embed.forward_masked(
            images, mask, self.mask_token.flatten(), self._position_embedding(), visible, self.backend
        )
        return self.forward_stages(x, tokens)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Encode images whose masked patches are hidden.

        Args:
            images: (B, in_chans, H, W).
            mask: (B, H / patch, W / patch), bool or integer: non-zero where hidden.

        Returns:
            (B, num_features, H / stride, W / stride).
        """
        return self.encode(images, mask).permute(0, 3, 1, 2)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"mask_token"}


class SwinTransformerForSimMIM(MaskedSwin, SwinTransformer):
    """Swin encoder for SimMIM. Takes the arguments of `SwinTransformer`; has no classification head."""


def _check_stages(embed_dim: int, depths: Sequence[int], num_heads: Sequence[int]) -> None:
    if not depths:
        raise ValueError(f"depths must have at least one stage, got {depths}")
    if len(depths) != len(num_heads):
        raise ValueError(f"num_heads must have one entry a stage: depths has {len(depths)}, got {len(num_heads)}")
    for stage, heads in enumerate(num_heads):
        check_at_least("depths", depths[stage], 1)
        check_at_least("num_heads", heads, 1)
        if embed_dim * 2**stage % heads:
            raise ValueError(
                f"num_heads must divide the channels of its stage: {embed_dim * 2**stage} in stage {stage}, got {heads}"
            )


def _check_window(window: tuple[int, int], grid: tuple[int, int]) -> None:
    if window[0] > grid[0] and window[1] > grid[1]:
        raise ValueError(
            f"window_size must fit the grid of patches {grid[0]} x {grid[1]}, got {window[0]} x {window[1]}"
        )
