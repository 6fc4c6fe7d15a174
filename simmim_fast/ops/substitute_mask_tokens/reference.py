"""Mask-token substitution in plain PyTorch. The oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def substitute_mask_tokens(x: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None) -> Tensor:
    """Put the mask token where the mask is set, then add the position embedding.

        where(mask, mask_token, x) + pos_embed

    Args:
        x: (B, H, W, C).
        mask: (B, H, W), bool or integer: non-zero where hidden.
        mask_token: (C).
        pos_embed: (H, W, C), or None.

    Returns:
        (B, H, W, C) in the dtype that the three promote to.
    """
    x = torch.where(mask.bool()[..., None], mask_token, x)
    return x if pos_embed is None else x + pos_embed
