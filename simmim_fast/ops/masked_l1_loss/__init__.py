"""The loss over masked pixels: see README.md."""

from simmim_fast.ops.masked_l1_loss.api import masked_l1_loss

__all__ = ["masked_l1_loss"]
