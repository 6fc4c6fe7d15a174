"""Every native op on the CPU, forward and backward, at whatever SIMD level this process has chosen.

ATEN_CPU_CAPABILITY=avx2 python -m tests.ops.simd_levels avx2
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from simmim_fast import _native, ops, testing
from simmim_fast.testing import assert_matches, differentiable

DTYPES = (torch.float32, torch.bfloat16)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of ops and their arguments: sizes that no vector divides beside sizes that kernels know."""
    for channels in (37, 128):
        yield "bias_gelu", testing.bias_gelu_inputs((19, channels), dtype)
        yield "residual_layer_norm", testing.residual_layer_norm_inputs((2, 9, channels), dtype, delta_bias=True)
        yield "residual_layer_norm", testing.residual_layer_norm_inputs((2, 9, channels), dtype, norm="delta")
        for pos_embed in (True, False):
            yield (
                "substitute_mask_tokens",
                testing.substitute_mask_tokens_inputs((3, 5, 4, channels), dtype, pos_embed=pos_embed),
            )
    for tokens, head_size in ((35, 24), (130, 64)):
        yield "biased_attention", testing.biased_attention_inputs((2, tokens, 2, head_size), dtype)
    for patch, channels in ((3, 37), (4, 128), (16, 70)):
        yield "masked_patch_embed", testing.masked_patch_embed_inputs((2, 5, 6, 3, patch, channels), dtype)
    for width in (28, 192):
        yield "masked_l1_loss", testing.masked_l1_loss_inputs((2, 3, 20, width), 4, dtype)
        yield "masked_l1_loss", testing.masked_l1_loss_inputs((2, 3, 20, width), 4, dtype, torch.uint8)
    for loss in ("l1", "l2", "smooth_l1"):
        yield "linear_masked_loss", testing.linear_masked_loss_inputs((2, 3, 5, 70, 6, 3), 2, dtype, loss=loss)
    yield "linear_masked_loss", testing.linear_masked_loss_inputs((2, 6, 6, 128, 32, 3), 4, dtype, tokens=True)
    for window, head_size, options in (
        (6, 32, {}),
        (7, 32, {"cosine": True}),
        (5, 20, {"cosine": True}),
        (5, 24, {}),
    ):
        shape = (2, 12, 14, 3, head_size)
        yield (
            "shifted_window_attention",
            testing.shifted_window_attention_inputs(shape, (window, window), (2, 3), dtype, **options),
        )
    yield (
        "shifted_window_attention",
        testing.shifted_window_attention_inputs((2, 6, 6, 2, 32), (6, 6), dtype=dtype, queries=11),
    )


def main(level: str) -> None:
    """Check the level and all cases against the error budgets."""
    if _native.simd_level() != level:
        sys.exit(f"asked for {level}, the kernels run at {_native.simd_level()}")
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that PyTorch hands out is NaN
    tested = set()
    for dtype in DTYPES:
        for op, inputs in cases(dtype):
            reference = getattr(importlib.import_module(f"simmim_fast.ops.{op}.reference"), op)
            native = partial(getattr(ops, op), backend="native")
            copies = ("out", "grad_x") if op == "substitute_mask_tokens" else ()
            assert_matches(native, reference, inputs, copies=copies, wanted=differentiable(inputs))
            tested.add(op)
    print(*sorted(tested))


if __name__ == "__main__":
    main(*sys.argv[1:])
