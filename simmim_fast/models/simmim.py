"""SimMIM (arXiv 2111.09886): an encoder that sees masked images, a light head, a loss on the masked pixels.

Names and state-dict keys are those of the official models/simmim.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from simmim_fast._arguments import check_at_least, check_choice, check_types
from simmim_fast.models.heads import HEADS
from simmim_fast.models.layers import check_images, check_mask
from simmim_fast.models.recompute import has_hooks, is_plain
from simmim_fast.models.shortcuts import SHORTCUTS, list_tokens
from simmim_fast.models.targets import check_target_window, norm_targets
from simmim_fast.ops import linear_masked_loss, masked_l1_loss
from simmim_fast.ops.linear_masked_loss import reference
from simmim_fast.ops.linear_masked_loss.reference import predict_pixels


class SimMIM(nn.Module):
    """Masked image modelling on raw pixels.

    Args:
        encoder: `SwinTransformerForSimMIM`, `SwinTransformerV2ForSimMIM`, `VisionTransformerForSimMIM`, or a module of
            the official form: `encoder(images, mask)` returns features (B, num_features, H / stride, W / stride), and
            it has `num_features`, `in_chans` and `patch_size`. Read where it has them: `img_size`, `no_weight_decay()`,
            `no_weight_decay_keywords()`, and `encode(images, mask)`, which returns the features channels last.
        encoder_stride: Pixels of the image to one token of the encoder's output, along a side.
        norm_target: Whether each pixel of the target is normalised by the window around it.
        norm_target_patch_size: Side of that window in pixels, odd.
        head: "linear", the paper's, or "mlp".
        counts: `MaskGenerator.counts`, visible patches and masked tokens of an image, where all masks will have them.
            CUDA needs them for the shortcuts, since it is never asked for a number; the CPU counts by itself.
        shortcuts: Which exact ones are taken (`simmim_fast.models.shortcuts`); () for none. The reference takes none.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an even window, an unknown head or shortcut.
    """

    def __init__(
        self,
        encoder: nn.Module,
        encoder_stride: int,
        *,
        norm_target: bool = False,
        norm_target_patch_size: int = 47,
        head: str = "linear",
        counts: tuple[int, int | None] | None = None,
        shortcuts: Sequence[str] = SHORTCUTS,
    ) -> None:
        check_types(SimMIM.__init__, locals())
        check_at_least("encoder_stride", encoder_stride, 1)
        check_target_window(norm_target_patch_size)
        check_choice("head", head, HEADS)
        for shortcut in shortcuts:
            check_choice("shortcuts", shortcut, SHORTCUTS)
        super().__init__()
        self.encoder = encoder
        self.encoder_stride = encoder_stride
        self.decoder = HEADS[head](encoder.num_features, encoder_stride, encoder.in_chans)
        self.in_chans = encoder.in_chans
        self.img_size = getattr(encoder, "img_size", None)
        self.patch_size = encoder.patch_size
        self.backend = getattr(encoder, "backend", "auto")
        self.counts = counts
        self.shortcuts = tuple(shortcuts) if self.backend != "reference" else ()
        self.norm_target = norm_target
        self.norm_target_patch_size = norm_target_patch_size

    def forward(self, images: Tensor, mask: Tensor, *, counts: tuple[int, int | None] | None = None) -> Tensor:
        """Hide the masked patches, predict the image, compare.

        Args:
            images: (B, in_chans, H, W), float, as the encoder expects them (ImageNet-normalised in the paper).
            mask: (B, H / patch, W / patch), bool or integer: non-zero where hidden.
            counts: Visible patches and masked tokens of every image; the model's own by default.

        Returns:
            Scalar: mean absolute error over the masked pixels and channels; fp32, or float64 for float64.

        Raises:
            ValueError: shapes that do not fit the model; on the CPU also counts that the mask does not have, which on
                CUDA give a NaN. TypeError: integer images, a float mask.
        """
        visible, tokens = self._lists(images, mask, counts or self.counts)
        if not self._head_is_plain():
            prediction = self._predict(images, mask, visible)
            return masked_l1_loss(prediction, self.target(images), mask, self.patch_size, backend=self.backend)
        features = self._head_features(images, mask, visible, tokens)
        arguments = (features, *self._head_parameters(), self.target(images), mask)
        if self.backend == "reference":
            return reference.linear_masked_loss(*arguments, patch_size=self.patch_size)
        tokens = tokens if "head" in self.shortcuts else None
        return linear_masked_loss(*arguments, patch_size=self.patch_size, tokens=tokens, backend=self.backend)

    def _lists(
        self, images: Tensor, mask: Tensor, counts: tuple[int, int | None] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Visible patches and masked tokens, each None where it is not known or no shortcut needs it."""
        if not self.shortcuts or self.img_size is None:
            return None, None
        check_images(images, self.in_chans, self.img_size)
        check_mask(mask, images.shape[0], tuple(side // self.patch_size for side in self.img_size))
        return list_tokens(mask, self.encoder_stride // self.patch_size, counts)

    def target(self, images: Tensor) -> Tensor:
        """What the head regresses, (B, in_chans, H, W): the images, or the images normalised locally."""
        return norm_targets(images, self.norm_target_patch_size) if self.norm_target else images

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """The predicted image (B, in_chans, H, W), in the units of `target`. Arguments as in `forward`."""
        if not self._head_is_plain():
            return self._predict(images, mask)
        features = self._head_features(images, mask)
        return predict_pixels(features, *self._head_parameters(), self.in_chans)

    def _head_features(
        self, images: Tensor, mask: Tensor, visible: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """What the last linear layer reads: (B, H / stride, W / stride, D); of listed tokens alone, 0 at the others."""
        features = self._encode(images, mask, visible, tokens)
        hidden = self.decoder[:-2]
        return hidden(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if len(hidden) else features

    def _encode(self, images: Tensor, mask: Tensor, visible: Tensor | None, tokens: Tensor | None) -> Tensor:
        """Features, channels last: (B, H / stride, W / stride, num_features)."""
        if not hasattr(self.encoder, "encode") or has_hooks(self.encoder):
            return self.encoder(images, mask).permute(0, 2, 3, 1)
        lists = {"patch_embed": ("visible", visible), "last_block": ("tokens", tokens)}
        known = {name: listed for key, (name, listed) in lists.items() if key in self.shortcuts and listed is not None}
        if not known or not getattr(self.encoder, "takes_lists", False):
            return self.encoder.encode(images, mask)
        features = self.encoder.encode(images, mask, **known)
        return features if "tokens" not in known else self._spread(features, tokens, images)

    def _spread(self, features: Tensor, tokens: Tensor, images: Tensor) -> Tensor:
        """Features (B, K, D) of listed tokens at their places in the grid, which is 0 elsewhere."""
        height, width = (side // self.encoder_stride for side in images.shape[2:])
        grid = features.new_zeros(features.shape[0], height * width, features.shape[2])
        index = tokens.long()[..., None].expand_as(features)
        return grid.scatter(1, index, features).unflatten(1, (height, width))

    def _head_is_plain(self) -> bool:
        """Whether the last linear layer's parameters may stand for it, and nobody watches the head."""
        return is_plain(self.decoder[-2], nn.Conv2d) and not any(map(has_hooks, self.decoder.modules()))

    def _predict(self, images: Tensor, mask: Tensor, visible: Tensor | None = None) -> Tensor:
        """What the head as a module makes of the features: (B, in_chans, H, W)."""
        return self.decoder(self._encode(images, mask, visible, None).permute(0, 3, 1, 2))

    def _head_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight (stride^2 in_chans, D) and bias of the last linear layer."""
        last = self.decoder[-2]
        return last.weight.flatten(1), last.bias

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the official optimizer does not decay."""
        return {f"encoder.{name}" for name in _names(self.encoder, "no_weight_decay")}

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names of parameters that the official optimizer does not decay.

        They carry the prefix `encoder.`, as officially, and so match no parameter inside a stage: the official
        pre-training decays its relative-position tables, and a drop-in must too.
        """
        return {f"encoder.{keyword}" for keyword in _names(self.encoder, "no_weight_decay_keywords")}


def _names(encoder: nn.Module, method: str) -> set[str]:
    return getattr(encoder, method)() if hasattr(encoder, method) else set()
