"""shifted_window_attention against Hugging Face's Swin layer where the window does not divide the grid.

Padding at the bottom and right, then the roll. Swin V2's cosine form is held to the official gradients in
tests/models/test_parity.py, on the reference and the compiled library.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simmim_fast.ops.shifted_window_attention import shifted_window_attention

pytest.importorskip("transformers", reason="not run: transformers is not installed (requirements-dev.txt pins it)")

from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

WINDOW, HEADS, CHANNELS = 4, 2, 6
GRIDS = [(6, 7), (4, 9), (5, 8)]


class Nothing(nn.Module):
    """Takes the MLP out of a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def attention_layer(grid: tuple[int, int], shift: int) -> SwinLayer:
    """Hugging Face's layer in float64 with random parameters, reduced to x + attention(x)."""
    config = SwinConfig(window_size=WINDOW, qkv_bias=True, attn_implementation="sdpa")  # eager has a float32 softmax
    layer = SwinLayer(config, CHANNELS, grid, HEADS, shift_size=shift).double()
    layer.layernorm_before = layer.layernorm_after = nn.Identity()
    layer.mlp = Nothing()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer


def by_our_op(layer: SwinLayer, x: Tensor, grid: tuple[int, int], shift: int, backend: str) -> Tensor:
    """What the layer computes, from its parameters."""
    attention = layer.attention
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    bias = torch.cat([projection.bias for projection in projections])
    qkv = nn.functional.linear(x, torch.cat([projection.weight for projection in projections]), bias)
    table = attention.relative_position_bias.relative_position_bias_table
    geometry = (WINDOW, shift, HEADS)
    out = shifted_window_attention(qkv.unflatten(1, grid), table, *geometry, pad_value=bias, backend=backend)
    return x + attention.o_proj(out.flatten(1, 2))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("shift", [0, 1, 2], ids="shift {}".format)
@pytest.mark.parametrize("grid", GRIDS, ids="{0[0]} x {0[1]}".format)
def test_padding_is_that_of_hugging_face(grid, shift, backend):
    layer = attention_layer(grid, shift)
    x = torch.randn(2, grid[0] * grid[1], CHANNELS, dtype=torch.float64, requires_grad=True)
    grad_out = torch.randn_like(x)
    # Without the clamp, which does not shift a grid of one window along an axis, and which is the caller's affair.
    wanted, _ = layer(x, grid, always_partition=True)
    got = by_our_op(layer, x, grid, shift, backend)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    leaves = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(out, leaves, grad_out) for out in (got, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
