"""What the three encoders share: patch embedding, MLP, stochastic depth, relative positions, input checks.

Shapes: B batch, H and W the token grid (or the image, where said), C channels, N tokens of one window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim_fast._arguments import check_at_least, check_choice, check_rate, check_types, mismatch
from simmim_fast._backends import BACKENDS
from simmim_fast.models.recompute import (
    RECOMPUTE,
    Affine,
    GeluLinear,
    LinearGeluLinear,
    NormLinear,
    NormMlp,
    cast_together,
    gelu_backend,
    has_hooks,
    is_plain,
    is_plain_norm,
    norm_backend,
)
from simmim_fast.ops import bias_gelu, masked_patch_embed, residual_layer_norm, substitute_mask_tokens

NormLayer = Callable[[int], nn.Module]


def check_encoder_arguments(
    constructor: Callable[..., None], values: Mapping[str, object], positive: Sequence[str]
) -> None:
    """Refuse arguments of an encoder's constructor that no image size or depth could make right.

    Args:
        constructor: Its annotations say of which type each argument is.
        values: The arguments by name.
        positive: Names of those that must be at least 1, besides the patch size and the channels.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of range, or a backend that there is none of.
    """
    check_types(constructor, values)
    for name in ("patch_size", "in_chans", "embed_dim", *positive):
        check_at_least(name, values[name], 1)
    for name in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        check_rate(name, values[name])
    check_choice("backend", values["backend"], ("auto", *BACKENDS))
    check_choice("recompute", values["recompute"], RECOMPUTE)
    if values["backend"] in ("native", "triton") and values["attn_drop_rate"] > 0:
        raise ValueError(
            f"attn_drop_rate must be 0 with backend={values['backend']!r}, whose kernels drop no attention weights, got"
            f" {values['attn_drop_rate']}"
        )


def check_image_size(img_size: tuple[int, int], stride: int) -> None:
    """Refuse an image that the encoder cannot tile.

    Raises:
        ValueError: if a side is not a multiple of the encoder's stride.
    """
    for name, side in zip(("height", "width"), img_size, strict=True):
        if side % stride:
            raise ValueError(
                f"img_size must be a multiple of the encoder's stride {stride} on each side, got {name} {side}"
            )


def check_images(images: Tensor, in_chans: int, img_size: tuple[int, int]) -> None:
    """Refuse images (B, C, H, W) that do not fit the model. Reads no data.

    Raises:
        ValueError: if the rank, the channels or the size differ.
        TypeError: if it is no tensor, or the dtype is not a float.
    """
    expected = f"(B, {in_chans}, {img_size[0]}, {img_size[1]})"
    _check_tensor("images", images)
    if images.dim() != 4 or tuple(images.shape[1:]) != (in_chans, *img_size):
        raise ValueError(f"images must have shape {expected}, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be a float tensor, got {images.dtype}")


def check_mask(mask: Tensor, batch: int, grid: tuple[int, int]) -> None:
    """Refuse a mask (B, H, W) that does not fit the patch grid. Reads no data.

    Raises:
        ValueError: if the shape differs.
        TypeError: if it is no tensor, or the dtype is a float; a mask is bool or an integer.
    """
    _check_tensor("mask", mask)
    if tuple(mask.shape) != (batch, *grid):
        raise ValueError(
            f"mask must have shape {(batch, *grid)}, one entry a patch (B, H/patch, W/patch), got {tuple(mask.shape)}"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be bool or an integer dtype, got {mask.dtype}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise mismatch(name, value, Tensor)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear projection, as a strided convolution: (B, channels, H, W) images
    to (B, H/p, W/p, C) tokens.

    Args:
        img_size: Height and width of the image in pixels.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the image.
        embed_dim: Channels of a token.
        norm_layer: Builds the norm after the projection, or None for none.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else None

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.in_chans, self.img_size)
        x = self.proj(images).permute(0, 2, 3, 1)  # (B, H, W, C)
        return x if self.norm is None else self.norm(x)

    def forward_masked(
        self,
        images: Tensor,
        mask: Tensor,
        mask_token: Tensor,
        pos_embed: Tensor | None,
        visible: Tensor | None,
        backend: str,
    ) -> Tensor:
        """Tokens (B, H/p, W/p, C) with mask_token (C) for the hidden patches, then pos_embed (H/p, W/p, C) on all.

        `visible` (B, K) lists the patches that are not hidden, where the caller knows them.
        """
        check_images(images, self.in_chans, self.img_size)
        check_mask(mask, images.shape[0], self.grid)
        is_fused = is_plain(self.proj, nn.Conv2d) and (self.norm is None or is_plain_norm(self.norm))
        if backend == "reference" or not is_fused:
            return substitute_mask_tokens(self(images), mask, mask_token, pos_embed, backend=backend)
        norm = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        options = {"visible": visible, "backend": backend}
        if self.norm is not None:
            options["eps"] = self.norm.eps
        projection = (self.proj.weight, self.proj.bias)
        return masked_patch_embed(images, mask, *projection, *norm, mask_token, pos_embed, **options)


def select_tokens(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Of x (B, H, W, C) or (B, N, C) the listed tokens (B, K), by flat index: (B, K, C). All of x without a list."""
    if tokens is None:
        return x
    x = x.flatten(1, -2)
    return x.gather(1, tokens.long()[..., None].expand(-1, -1, x.shape[-1]))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between, on (..., C).

    Args:
        dim: Channels in and out.
        hidden_dim: Channels between.
        drop: Dropout rate after the second layer, and after the GELU where `drop_hidden`.
        drop_hidden: Whether the hidden layer is dropped too: Swin does, the official ViT does not.
        backend: Of the bias and GELU between; the reference leaves the bias to the first layer.
        recompute: What the backward computes again: see `SwinTransformer`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        drop_hidden: bool = True,
        backend: str = "auto",
        recompute: str = "pointwise",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.recompute = recompute
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)
        self.drop_hidden = drop_hidden

    def forward(self, x: Tensor, fc2: Affine | None = None) -> Tensor:
        """x (..., C) to (..., C). With the second layer's parameters, x is the first's product, without its bias."""
        if fc2 is not None:
            return self.drop(self._second_layer(x, fc2))
        if self.backend == "reference" or not is_plain(self.fc1):
            x = self.act(self.fc1(x))
        else:
            x = bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias, backend=self.backend)
        if self.drop_hidden:
            x = self.drop(x)
        return self.drop(self.fc2(x))

    def _second_layer(self, hidden: Tensor, fc2: Affine) -> Tensor:
        backend = gelu_backend(hidden, self.backend)
        if backend is not None and self.recompute != "none" and not self._drops_hidden:
            return GeluLinear.apply(hidden, self.fc1.bias, *fc2, backend)
        x = bias_gelu(hidden, self.fc1.bias, backend=self.backend)
        return fc2.product(self.drop(x) if self.drop_hidden else x)

    @property
    def _drops_hidden(self) -> bool:
        return self.drop_hidden and self.training and self.drop.p > 0

    def backend_to_recompute(self, fc1: Affine | None) -> str | None:
        """The backend where the whole MLP is computed again; else None, and the module is to be called."""
        if fc1 is None or self.recompute != "mlp" or self._drops_hidden:
            return None
        return gelu_backend(fc1.weight, self.backend)


class BlockWeights(NamedTuple):
    """The parameters of a block's linear layers, all None where attention, MLP and layers are called as modules.

    The bias of `fc1` is not among them: it goes into the GELU.

    Attributes:
        qkv: Of the attention's first layer.
        proj: Of its second, without the bias but before a dropout.
        fc1: Of the MLP's first layer, without the bias.
        fc2: Of its second, as `proj`.
        proj_bias: (C), what is yet to be added to the attention's branch.
        fc2_bias: (C), the same of the MLP's branch.
        gamma: (C), layer scale of the MLP's branch, or None. It and `fc2_bias` are copies: the next block adds the
            branch, when the parameters of this one may be sharded again.
    """

    qkv: Affine | None = None
    proj: Affine | None = None
    fc1: Affine | None = None
    fc2: Affine | None = None
    proj_bias: Tensor | None = None
    fc2_bias: Tensor | None = None
    gamma: Tensor | None = None


def block_weights(attn: nn.Module, mlp: Mlp, gamma: Tensor | None = None) -> BlockWeights:
    """The parameters of a block's layers, cast and copied together; gamma (C) is of the MLP's branch."""
    layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
    if attn.backend == "reference" or has_hooks(attn) or has_hooks(mlp) or not all(map(is_plain, layers)):
        return BlockWeights(gamma=None if gamma is None else gamma.clone())
    proj_bias, proj_bias_later = _before_and_after(attn.proj_drop, attn.proj.bias)
    fc2_bias, fc2_bias_later = _before_and_after(mlp.drop, mlp.fc2.bias)
    outgoing = [tensor for tensor in (fc2_bias_later, gamma) if tensor is not None]
    parameters = (*(layer.weight for layer in layers), *attn.qkv_biases())
    (qkv, proj, fc1, fc2, *qkv_biases), copies = cast_together(parameters, outgoing)
    casts_all = mlp.recompute == "mlp"
    return BlockWeights(
        Affine(qkv, join_biases(qkv_biases), attn.qkv.weight.detach() if casts_all else None),
        Affine(proj, proj_bias),
        Affine(fc1, None, mlp.fc1.weight.detach() if casts_all else None),
        Affine(fc2, fc2_bias, mlp.fc2.weight.detach()),
        proj_bias_later,
        None if fc2_bias_later is None else copies[0],
        None if gamma is None else copies[-1],
    )


def _before_and_after(dropout: nn.Dropout, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The bias of a product: what must be added before its dropout, and what may be added later, with the branch."""
    drops = dropout.training and dropout.p > 0
    return (bias, None) if drops else (None, bias)


def project(x: Tensor, layer: nn.Module, bias: Tensor | None) -> Tensor:
    """The product (..., D) of x (..., C) by a linear layer without a bias of its own, and a bias (D) beside it."""
    if is_plain(layer):
        return F.linear(x, layer.weight, bias)
    return layer(x) if bias is None else layer(x) + bias


def join_biases(biases: Sequence[Tensor]) -> Tensor | None:
    """The bias of q, k and v together, (3C), from none, from itself or from those of q and v; k then has none."""
    if len(biases) == 2:
        return torch.cat([biases[0], torch.zeros_like(biases[1]), biases[1]])
    return biases[0] if biases else None


Drawn = tuple[Tensor | None, Tensor | None]  # (B) bool each: which samples keep the attention's and the MLP's branch


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): a residual branch is dropped whole, sample by sample.

    Args:
        rate: Probability of dropping; the kept samples are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def draw(self, x: Tensor, dtype: torch.dtype = torch.bool) -> Tensor | None:
        """Draw which samples of x (B, ...) keep the branch: (B,) of 0 or 1, or None where nothing drops."""
        if self.rate == 0.0 or not self.training:
            return None
        return x.new_empty(x.shape[0], dtype=dtype).bernoulli_(1 - self.rate)

    def keep(self, x: Tensor, drawn: Tensor | None = None) -> Tensor | None:
        """The factor of each sample of x (B, ...): (B,) of 0 or 1 / (1 - rate), or None where nothing drops.

        drawn (B,) bool is what `draw` gave, where that must be the same in a second forward; by default it draws.
        """
        kept = self.draw(x, x.dtype) if drawn is None else drawn.to(x.dtype)
        return None if kept is None else kept.div_(1 - self.rate)

    def forward(self, x: Tensor, drawn: Tensor | None = None) -> Tensor:
        keep = self.keep(x, drawn)
        return x if keep is None else x * keep.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Stream(NamedTuple):
    """The residual stream with a branch that is still to be added, so that the next norm does both in one pass.

    Attributes:
        x: (B, ..., C), the stream before.
        branch: (B, ..., C), or None where there is none.
        gamma: (C), layer scale of the branch, or None.
        keep: (B), 0 or 1 / (1 - rate) from stochastic depth, or None.
        bias: (C), to be added to the branch first, or None.
    """

    x: Tensor
    branch: Tensor | None = None
    gamma: Tensor | None = None
    keep: Tensor | None = None
    bias: Tensor | None = None

    def add(self) -> Tensor:
        """The stream with its branch."""
        if self.branch is None:
            return self.x
        branch = self.branch if self.bias is None else self.branch + self.bias.to(self.branch.dtype)
        branch = branch if self.gamma is None else self.gamma * branch
        if self.keep is not None:
            branch = branch * self.keep.view(-1, *[1] * (branch.dim() - 1))
        return self.x + branch

    def normalise(self, norm: nn.Module, backend: str) -> tuple[Tensor, Tensor]:
        """The stream with its branch, and its norm: in one pass where it is a plain LayerNorm."""
        if not is_plain_norm(norm):
            y = self.add()
            return y, norm(y)
        scaled = {"gamma": self.gamma, "keep": self.keep, "delta_bias": self.bias}
        return residual_layer_norm(self.x, self.branch, norm.weight, norm.bias, norm.eps, **scaled, backend=backend)

    def normalise_into(
        self, norm: nn.Module, layer: Affine | None, backend: str, recompute: str, store_sum: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The stream with its branch, and the product of its LayerNorm.

        Args:
            norm: Of the channels.
            layer: Parameters of the product; None for the LayerNorm itself.
            backend: Of the norm.
            recompute: Whether the backward computes the norm again, unless "none".
            store_sum: Whether the backward keeps the sum for it; else x and branch, which others keep anyway.
        """
        stores = layer is None or recompute == "none" or not is_plain_norm(norm)
        chosen = None if stores else norm_backend(self.x, self.branch, backend)
        if chosen is None:
            y, normed = self.normalise(norm, backend)
            return y, normed if layer is None else layer.product(normed)
        options = (norm.eps, chosen, store_sum or not self._is_narrower)
        return NormLinear.apply(*self, norm.weight, norm.bias, *layer, *options)

    def through_mlp(
        self, norm: nn.Module, mlp: Mlp, weights: BlockWeights, backend: str, store_sum: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The stream with its branch, and what the MLP makes of its LayerNorm; the rest as in `normalise_into`."""
        gelu = mlp.backend_to_recompute(weights.fc1)
        chosen = None if gelu is None or not is_plain_norm(norm) else norm_backend(self.x, self.branch, backend)
        if chosen is None:
            y, hidden = self.normalise_into(norm, weights.fc1, backend, mlp.recompute, store_sum)
            return y, mlp(hidden, weights.fc2)
        options = (norm.eps, chosen, gelu, store_sum or not self._is_narrower)
        hidden = (weights.fc1.weight, weights.fc1.stored, mlp.fc1.bias)
        y, branch = NormMlp.apply(*self, norm.weight, norm.bias, *hidden, *weights.fc2, *options)
        return y, mlp.drop(branch)

    @property
    def _is_narrower(self) -> bool:
        """Whether it takes less to keep the branch than the sum, x being kept anyway."""
        if self.branch is None or torch.promote_types(self.x.dtype, self.branch.dtype) != self.x.dtype:
            return False
        return self.gamma is not None or self.branch.dtype.itemsize < self.x.dtype.itemsize


def apply_mlp(x: Tensor, mlp: Mlp, weights: BlockWeights) -> Tensor:
    """The MLP of x (B, ..., C)."""
    fc1 = weights.fc1
    backend = mlp.backend_to_recompute(fc1)
    if backend is None:
        return mlp(x if fc1 is None else fc1.product(x), weights.fc2)
    hidden = (fc1.weight, fc1.stored, mlp.fc1.bias)
    return mlp.drop(LinearGeluLinear.apply(x.to(fc1.weight.dtype), *hidden, *weights.fc2, backend))


def init_linear_and_norm(module: nn.Module) -> None:
    """Official initialisation: linear weights from a normal of std 0.02 cut at +-2, biases 0, norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def stochastic_depth_rates(drop_path_rate: float, depth: int) -> list[float]:
    """Drop rates that grow linearly from 0 to `drop_path_rate` over `depth` blocks."""
    return torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
