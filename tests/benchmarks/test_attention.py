"""Others' attention in its strongest form: nothing is repeated for each image, nothing is copied for it alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import attention
from simmim_fast import ops
from simmim_fast.testing import relative_error, shifted_window_attention_inputs

BATCH, GRID, WINDOW, HEADS = 3, 8, 4, 2


@pytest.mark.parametrize("shift", [0, 2], ids=["whole", "shifted"])
def test_bias_and_mask_are_broadcast_over_the_images(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def spied(*tensors: torch.Tensor, attn_mask: torch.Tensor, scale: float | None) -> torch.Tensor:
        called.append((tensors, attn_mask))
        return original(*tensors, attn_mask=attn_mask, scale=scale)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    shape = (BATCH, GRID, GRID, HEADS, 8)
    inputs = shifted_window_attention_inputs(shape, (WINDOW, WINDOW), (shift, shift), pad_value=False)
    actual = attention.in_windows(attention.sdpa, **inputs)
    ((tensors, joined),) = called
    windows, tokens = (GRID // WINDOW) ** 2, WINDOW**2
    assert joined.untyped_storage().nbytes() == (windows if shift else 1) * HEADS * tokens**2 * joined.itemsize
    assert len({one.untyped_storage().data_ptr() for one in tensors}) == 1  # of one copy, that of the windows
    expected = ops.shifted_window_attention(**inputs, backend="reference")
    assert relative_error(actual, expected) < 1e-6
