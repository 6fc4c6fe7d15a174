"""SimMIM (arXiv 2111.09886): an encoder that sees masked images, a light head, a loss on the masked pixels.

Names and state-dict keys are those of the official models/simmim.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from simmim_fast._arguments import check_at_least, check_choice, check_types
from simmim_fast.models.heads import HEADS
from simmim_fast.models.targets import check_target_window, norm_targets
from simmim_fast.ops import linear_masked_loss
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

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an even window, an unknown head.
    """

    def __init__(
        self,
        encoder: nn.Module,
        encoder_stride: int,
        *,
        norm_target: bool = False,
        norm_target_patch_size: int = 47,
        head: str = "linear",
    ) -> None:
        check_types(SimMIM.__init__, locals())
        check_at_least("encoder_stride", encoder_stride, 1)
        check_target_window(norm_target_patch_size)
        check_choice("head", head, HEADS)
        super().__init__()
        self.encoder = encoder
        self.encoder_stride = encoder_stride
        self.decoder = HEADS[head](encoder.num_features, encoder_stride, encoder.in_chans)
        self.in_chans = encoder.in_chans
        self.img_size = getattr(encoder, "img_size", None)
        self.patch_size = encoder.patch_size
        self.backend = getattr(encoder, "backend", "auto")
        self.norm_target = norm_target
        self.norm_target_patch_size = norm_target_patch_size

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Hide the masked patches, predict the image, compare.

        Args:
            images: (B, in_chans, H, W), float, as the encoder expects them (ImageNet-normalised in the paper).
            mask: (B, H / patch, W / patch), bool or integer: non-zero where hidden.

        Returns:
            Scalar: mean absolute error over the masked pixels and channels; fp32, or float64 for float64.

        Raises:
            ValueError: shapes that do not fit the model. TypeError: integer images, a float mask.
        """
        features = self._head_features(images, mask)
        weight, bias = self._head_parameters()
        arguments = (features, weight, bias, self.target(images), mask)
        if self.backend == "reference":
            return reference.linear_masked_loss(*arguments, patch_size=self.patch_size)
        return linear_masked_loss(*arguments, patch_size=self.patch_size, backend=self.backend)

    def target(self, images: Tensor) -> Tensor:
        """What the head regresses, (B, in_chans, H, W): the images, or the images normalised locally."""
        return norm_targets(images, self.norm_target_patch_size) if self.norm_target else images

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """The predicted image (B, in_chans, H, W), in the units of `target`. Arguments as in `forward`."""
        features = self._head_features(images, mask)
        return predict_pixels(features, *self._head_parameters(), self.in_chans)

    def _head_features(self, images: Tensor, mask: Tensor) -> Tensor:
        """What the last linear layer reads: (B, H / stride, W / stride, D)."""
        features = self._encode(images, mask)
        hidden = self.decoder[:-2]
        return hidden(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if len(hidden) else features

    def _encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """Features, channels last: (B, H / stride, W / stride, num_features)."""
        if hasattr(self.encoder, "encode"):
            return self.encoder.encode(images, mask)
        return self.encoder(images, mask).permute(0, 2, 3, 1)

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
