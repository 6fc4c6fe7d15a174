"""The linear head and the loss over masked pixels: see README.md."""

from simmim_fast.ops.linear_masked_loss.api import linear_masked_loss

__all__ = ["linear_masked_loss"]
