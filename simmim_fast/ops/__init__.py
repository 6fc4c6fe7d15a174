"""The ops: one folder each, with the public function, its plain PyTorch reference and its kernels."""

from simmim_fast.ops._registration import OPS, bytes_loaded, bytes_moved, flops, register_flop_formulas
from simmim_fast.ops.bias_gelu import bias_gelu
from simmim_fast.ops.biased_attention import biased_attention
from simmim_fast.ops.linear_masked_loss import linear_masked_loss
from simmim_fast.ops.masked_l1_loss import masked_l1_loss
from simmim_fast.ops.masked_patch_embed import masked_patch_embed
from simmim_fast.ops.residual_layer_norm import residual_layer_norm
from simmim_fast.ops.shifted_window_attention import shifted_window_attention
from simmim_fast.ops.substitute_mask_tokens import substitute_mask_tokens

__all__ = [
    "OPS",
    "bias_gelu",
    "biased_attention",
    "bytes_loaded",
    "bytes_moved",
    "flops",
    "linear_masked_loss",
    "masked_l1_loss",
    "masked_patch_embed",
    "register_flop_formulas",
    "residual_layer_norm",
    "shifted_window_attention",
    "substitute_mask_tokens",
]
