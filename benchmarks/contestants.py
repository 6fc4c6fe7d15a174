"""Who computes an op: its reference eager and compiled, what else people use, and its backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import ATTENTIONS, attention, in_windows, of_all_tokens
from benchmarks.measure import Absent
from simmim_fast import ops
from simmim_fast._backends import BACKENDS, BackendError, choose
from simmim_fast.ops import OPS

Function = Callable[..., Tensor]


def blend(x: Tensor, mask: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None) -> Tensor:
    """The official formula of mask tokens (microsoft/SimMIM, models/simmim.py)."""
    weight = mask[..., None].type_as(mask_token)
    x = x * (1 - weight) + mask_token * weight
    return x if pos_embed is None else x + pos_embed


def convolution(
    image: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mask_token: Tensor,
    pos_embed: Tensor | None,
    **unused: Any,
) -> Tensor:
    """Patch embedding by the operators that a model has without this op; all patches are embedded."""
    x = F.conv2d(image, weight, bias, stride=weight.shape[3]).permute(0, 2, 3, 1)
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[3:], norm_weight, norm_bias)
    x = torch.where(mask[..., None], mask_token, x)
    return x if pos_embed is None else x + pos_embed


def biased_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Bias and GELU in the dtype of x, as autocast leaves them."""
    return F.gelu(x + bias.to(x.dtype))


def added_and_normalised(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    keep: Tensor,
    delta_bias: Tensor | None,
    norm: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """A residual branch by the operators of a model under autocast, which normalises in float32."""

    def normalised(value: Tensor) -> Tensor:
        return F.layer_norm(value.to(weight.dtype), value.shape[-1:], weight, bias)

    delta = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)
    kept = keep.view(-1, *[1] * (x.ndim - 1))
    if norm == "delta":
        return x + normalised(delta) * kept
    y = x + (delta if gamma is None else gamma * delta) * kept.to(delta.dtype)
    return y, normalised(y).to(delta.dtype)


# What takes the reference's place as "eager" and, compiled, as "compiled": what a model does without the op.
_EAGER: dict[str, Function] = {
    "bias_gelu": biased_gelu,
    "masked_patch_embed": convolution,
    "residual_layer_norm": added_and_normalised,
}
_PEERS: dict[str, dict[str, Function]] = {"substitute_mask_tokens": {"blend": blend}}
# What calls others' attention in an op's place.
_ATTENTION: dict[str, Function] = {"biased_attention": of_all_tokens, "shifted_window_attention": in_windows}


def eager(op: str) -> Function:
    """What a model calls without the op."""
    return _EAGER.get(op) or partial(getattr(ops, op), backend="reference")


def names(op: str) -> tuple[str, ...]:
    """Everyone who may compute an op."""
    fused = ATTENTIONS if op in _ATTENTION else ()
    return ("eager", "compiled", *_PEERS.get(op, ()), *fused, *(name for name in BACKENDS if name != "reference"))


def contestant(op: str, name: str, device: str, dtype: torch.dtype) -> Function:
    """A function of the op's arguments.

    "compiled" and "flex" are compiled anew for each call of this function: one compiled function serves other shapes
    badly, and a win over it would be none.

    Raises:
        Absent: It cannot run here.
    """
    if name == "eager":
        return eager(op)
    if name == "compiled":
        return _compiled(eager(op))
    if name in ATTENTIONS and op in _ATTENTION:
        function = partial(_ATTENTION[op], attention(name, device))
        return _compiled(function) if name == "flex" else function
    if name in _PEERS.get(op, {}):
        return _PEERS[op][name]
    try:
        choose(OPS[op], name, torch.device(device), dtype)
    except BackendError as error:
        raise Absent(str(error)) from error
    return partial(getattr(ops, op), backend=name)


def _compiled(function: Function) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)
