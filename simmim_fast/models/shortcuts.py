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


def list_tokens(
    mask: Tensor, factor: int, counts: tuple[int, int | None] | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The visible patches and the masked tokens of every image, by flat index.

    Args:
        mask: As in `masked_tokens`.
        factor: As in `masked_tokens`.
        counts: Visible patches and masked tokens of an image, every image having as many; None for the tokens where
            images differ. Unknown tokens are counted where that needs no synchronisation: on the CPU, outside of
            torch.compile.

    Returns:
        (B, visible patches) and (B, masked tokens) int32, ascending, each None where it is not known.

    Raises:
        ValueError: the mask has other counts; on CUDA nothing is read, and the loss becomes NaN.
    """
    hidden, masked = mask.ne(0), masked_tokens(mask, factor)
    readable = mask.device.type == "cpu" and type(mask) is Tensor and not torch.compiler.is_compiling()
    visible_count, token_count = counts or (None, None)
    if readable:
        _check_count("visible patches", visible_count, ~hidden)
        _check_count("masked tokens", token_count, masked)
    visible = None if visible_count is None else token_index(~hidden, visible_count)
    if token_count is not None:
        return visible, token_index(masked, token_count)
    if not readable or masked.numel() == 0:
        return visible, None
    most = int(masked.flatten(1).sum(1).max())
    return visible, token_index(masked, most).sort(dim=1).values


def _check_count(what: str, expected: int | None, selected: Tensor) -> None:
    counted = selected.flatten(1).sum(1)
    if expected is not None and not bool((counted == expected).all()):
        raise ValueError(f"counts say {expected} {what} an image, but the mask has {sorted(set(counted.tolist()))}")
