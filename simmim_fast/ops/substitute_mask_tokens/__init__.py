"""Mask tokens in the place of hidden patches: see README.md."""

from simmim_fast.ops.substitute_mask_tokens.api import substitute_mask_tokens

__all__ = ["substitute_mask_tokens"]
