"""The patch embedding of masked images: see README.md."""

from simmim_fast.ops.masked_patch_embed.api import masked_patch_embed

__all__ = ["masked_patch_embed"]
