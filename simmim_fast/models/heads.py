"""Prediction heads: features of the encoder to pixels (arXiv 2111.09886, section 3.3).

A head is a sequence that ends in a 1 x 1 convolution and a pixel shuffle; the loss computes those two together.
"""

from __future__ import annotations

from torch import nn


def linear_head(num_features: int, stride: int, channels: int) -> nn.Sequential:
    """The paper's head: one linear layer. Keys as in the official code (`decoder.0`)."""
    return nn.Sequential(nn.Conv2d(num_features, stride**2 * channels, kernel_size=1), nn.PixelShuffle(stride))


def mlp_head(num_features: int, stride: int, channels: int) -> nn.Sequential:
    """A two-layer head, for comparison: the paper finds that it costs more and transfers no better (table 3)."""
    hidden = [nn.Conv2d(num_features, num_features, kernel_size=1), nn.GELU()]
    return nn.Sequential(*hidden, *linear_head(num_features, stride, channels))


HEADS = {"linear": linear_head, "mlp": mlp_head}
