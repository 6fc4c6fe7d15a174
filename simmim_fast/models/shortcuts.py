"""Exact shortcuts: the same loss and gradients from less work.

The loss reads masked pixels, and mask tokens hide what lies under them. So the patch embedding is needed of the visible
patches alone; the head of those tokens alone that lie over a masked pixel; and so are, in the last block, queries,
projection, MLP and the norm behind it. SimMIM hides as many cells in every image, so the counts are known beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simmim_fast.masking import token_index

SHORTCUTS = ("patch_embed", "last_block", "head")


def masked_tokens(mask: Tensor, factor: int) -> Tensor:
    """Which tokens of the encoder's output, `factor` patches wide, lie over a masked pixel.

    Args:
        mask: (B, H / patch, W / patch), bool or integer: non-zero where hidden.
        factor: Patches along the side of a token.

    Returns:
        (B, h, w) bool.
    """
    return mask.ne(0).unflatten(1, (-1, factor)).unflatten(3, (-1, factor)).any(4).any(2)


def list_tokens(mask: Tensor, factor: int, counts: tuple[int, int] | None) -> tuple[Tensor | None, Tensor | None]:
    """The visible patches and the masked tokens of every image, by flat index.

    Args:
        mask: As in `masked_tokens`.
        factor: As in `masked_tokens`.
        counts: Visible patches and masked tokens of an image, every image having as many. Without them the tokens are
            counted where that needs no synchronisation: on the CPU, outside of torch.compile.

    Returns:
        (B, visible patches) and (B, masked tokens) int32, ascending, each None where it is not known.

    Raises:
        ValueError: the mask has other counts; on CUDA nothing is read, and the loss becomes NaN.
    """
    hidden, masked = mask.ne(0), masked_tokens(mask, factor)
    readable = mask.device.type == "cpu" and type(mask) is Tensor and not torch.compiler.is_compiling()
    if counts is not None:
        if readable:
            _check_counts(counts, (~hidden).flatten(1).sum(1), masked.flatten(1).sum(1))
        return token_index(~hidden, counts[0]), token_index(masked, counts[1])
    if not readable or masked.numel() == 0:
        return None, None
    most = int(masked.flatten(1).sum(1).max())
    return None, token_index(masked, most).sort(dim=1).values


def _check_counts(counts: tuple[int, int], visible: Tensor, masked: Tensor) -> None:
    for what, expected, actual in zip(("visible patches", "masked tokens"), counts, (visible, masked), strict=True):
        if not bool((actual == expected).all()):
            raise ValueError(f"counts say {expected} {what} an image, but the mask has {sorted(set(actual.tolist()))}")
