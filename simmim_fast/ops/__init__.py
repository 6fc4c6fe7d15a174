"""The ops: one folder each, with the public function, its plain PyTorch reference and its kernels."""

from simmim_fast.ops._registration import OPS, bytes_moved, register_flop_formulas
from simmim_fast.ops.substitute_mask_tokens import substitute_mask_tokens

__all__ = ["OPS", "bytes_moved", "register_flop_formulas", "substitute_mask_tokens"]
