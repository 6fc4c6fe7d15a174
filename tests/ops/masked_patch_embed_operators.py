"""The operators of masked_patch_embed by backend, and arguments for them."""

from __future__ import annotations

from typing import Any

import torch

from tests.ops.targets import Target

PARAMETERS = ("weight", "bias", "norm_weight", "norm_bias", "mask_token", "pos_embed")


def operators(target: Target) -> tuple[Any, Any]:
    name = f"masked_patch_embed_{target.backend}"
    return getattr(torch.ops.simmim_fast, name), getattr(torch.ops.simmim_fast, f"{name}_backward")


def operator_arguments(inputs: dict[str, Any], compute: torch.dtype, out: torch.dtype) -> tuple[tuple, tuple]:
    """Arguments of the forward and of the backward operator, all gradients being wanted."""
    i = inputs
    tensors = tuple(i[name] for name in ("image", "mask", *PARAMETERS, "mean", "std", "visible"))
    grad_out = torch.ones(*i["mask"].shape, i["weight"].shape[0], dtype=out, device=i["mask"].device)
    dtypes = tuple(None if i[name] is None else i[name].dtype for name in PARAMETERS)
    kept = tuple(i[name] for name in ("image", "mask", "weight", "bias", "norm_weight", "mean", "std", "visible"))
    return (*tensors, 1e-5, compute, out), (grad_out, *kept, 1e-5, compute, *dtypes)
