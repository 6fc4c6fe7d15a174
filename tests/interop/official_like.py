"""Plain modules of the official code's shape: its attributes, its mathematics, none of its text.

Shapes: B batch, H and W the grid, L = H W, C channels, h heads, N tokens of a window.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID, WINDOW, CHANNELS, HEADS = (8, 12), 4, 6, 2


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, dtype=x.dtype) >= self.rate
        return x * keep / (1 - self.rate)


class Attention(nn.Module):
    """Windows (B, N, C), with `mask` (windows, N, N) added to their logits."""

    def __init__(self, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.window_size = (WINDOW, WINDOW)
        self.num_heads = HEADS
        rows, columns = torch.arange(WINDOW).repeat_interleave(WINDOW), torch.arange(WINDOW).repeat(WINDOW)
        dy, dx = (axis[:, None] - axis[None, :] + WINDOW - 1 for axis in (rows, columns))
        self.register_buffer("relative_position_index", dy * (2 * WINDOW - 1) + dx)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(CHANNELS, CHANNELS)
        self.proj_drop = nn.Dropout(0.0)
        self.softmax = nn.Softmax(dim=-1)

    def attend(self, qkv: Tensor, table: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        logits = self.similarity(q, k) + table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj_drop(self.proj((self.attn_drop(self.softmax(logits)) @ v).transpose(1, 2).flatten(2)))


class WindowAttention(Attention):
    def __init__(self, attn_drop: float = 0.0) -> None:
        super().__init__(attn_drop)
        self.scale = 0.4
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, HEADS))
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        return self.scale * (q @ k.transpose(-1, -2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attend(self.qkv(x), self.relative_position_bias_table, mask)


class WindowAttentionV2(Attention):
    def __init__(self, attn_drop: float = 0.0) -> None:
        super().__init__(attn_drop)
        self.logit_scale = nn.Parameter(torch.full((HEADS, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, HEADS, bias=False))
        offsets = torch.linspace(-1, 1, 2 * WINDOW - 1)
        self.register_buffer("relative_coords_table", torch.cartesian_prod(offsets, offsets).unflatten(0, (1, 7, 7)))
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(CHANNELS)), nn.Parameter(torch.zeros(CHANNELS))

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        return cosine * self.logit_scale.clamp(max=math.log(100)).exp()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]))
        return self.attend(qkv, 16 * self.cpb_mlp(self.relative_coords_table).view(-1, HEADS).sigmoid(), mask)


class SwinTransformerBlock(nn.Module):
    attention: type[Attention] = WindowAttention

    def __init__(self, shift_size: int, attn_drop: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.input_resolution = GRID
        self.window_size = WINDOW
        self.shift_size = shift_size
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.attn = self.attention(attn_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU(), nn.Linear(2 * CHANNELS, CHANNELS))
        self.register_buffer("attn_mask", self.between_regions() if shift_size else None)

    def between_regions(self) -> Tensor:
        slices = (slice(0, -WINDOW), slice(-WINDOW, -self.shift_size), slice(-self.shift_size, None))
        regions = torch.zeros(1, *GRID, 1)
        for number, (rows, columns) in enumerate((rows, columns) for rows in slices for columns in slices):
            regions[:, rows, columns] = number
        regions = self.cut(regions)  # (windows, N, 1)
        return -100.0 * (regions != regions.transpose(1, 2))

    def cut(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def attend(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, GRID).roll((-self.shift_size, -self.shift_size), (1, 2))
        windows = self.attn(self.cut(x), mask=self.attn_mask)
        x = windows.view(-1, GRID[0] // WINDOW, GRID[1] // WINDOW, WINDOW, WINDOW, CHANNELS).transpose(2, 3)
        return x.reshape(-1, *GRID, CHANNELS).roll((self.shift_size, self.shift_size), (1, 2)).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinTransformerV2Block(SwinTransformerBlock):
    attention = WindowAttentionV2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.norm1(self.attend(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class ViTAttention(nn.Module):
    """All tokens of a grid and a class token, with a bias of its own and one that layers share."""

    def __init__(self, biased: bool = True) -> None:
        super().__init__()
        self.num_heads, self.scale, self.window_size = HEADS, 0.4, (2, 3) if biased else None
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(CHANNELS)), nn.Parameter(torch.zeros(CHANNELS))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(18, HEADS)) if biased else None
        index = torch.randint(18, (7, 7), generator=torch.Generator().manual_seed(0)) if biased else None
        self.register_buffer("relative_position_index", index)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        logits = self.scale * (q @ k.transpose(-1, -2))
        if self.relative_position_bias_table is not None:
            logits = logits + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if rel_pos_bias is not None:
            logits = logits + rel_pos_bias
        return self.proj_drop(self.proj((self.attn_drop(logits.softmax(-1)) @ v).transpose(1, 2).flatten(2)))


class Encoder(nn.Module):
    """Patches of 2 pixels, hidden ones replaced, two blocks, features at stride 2."""

    num_features = CHANNELS

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, CHANNELS, 2, 2)
        self.mask_token = nn.Parameter(torch.zeros(CHANNELS))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.where(mask.flatten(1).bool()[..., None], self.mask_token, x)
        for block in self.blocks:
            x = block(x)
        return x.transpose(1, 2).unflatten(2, GRID)


def norm_targets(images: Tensor, side: int) -> Tensor:
    """Each pixel normalised by the unbiased moments of the window around it, cut at the border."""
    count = F.avg_pool2d(torch.ones_like(images), side, 1, side // 2) * side**2
    mean, square = (F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False) for x in (images, images**2))
    variance = ((square - mean**2) * count / (count - 1)).clamp(min=0)
    return (images - mean) / (variance + 1e-6).sqrt()


class SimMIM(nn.Module):
    """With `norm_target`, the side of a window, it has the `config` of the later official repository."""

    def __init__(self, encoder: Encoder, norm_target: int | None = None) -> None:
        super().__init__()
        self.encoder, self.encoder_stride, self.in_chans, self.patch_size = encoder, 2, 3, 2
        self.norm_target = norm_target
        if norm_target is not None:
            self.config = SimpleNamespace(NORM_TARGET=SimpleNamespace(ENABLE=norm_target > 0, PATCH_SIZE=norm_target))
        self.decoder = nn.Sequential(nn.Conv2d(CHANNELS, 12, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        target = norm_targets(x, self.norm_target) if self.norm_target else x
        error = (target - self.decoder(self.encoder(x, mask))).abs()
        mask = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
        return (error * mask).sum() / (mask.sum() + 1e-5) / self.in_chans
