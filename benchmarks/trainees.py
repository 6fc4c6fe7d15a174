"""Who trains a model in the step benchmark, and what one step is: forward, backward, clipping, fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contestants import Absent, sdpa
from benchmarks.models import build, loss_of
from simmim_fast.models import SimMIM
from simmim_fast.models.layers import DropPath
from simmim_fast.models.swin import AttentionInWindows
from simmim_fast.models.vit import Attention
from simmim_fast.ops.shifted_window_attention.reference import partition, reverse
from simmim_fast.train import OptimizerConfig, build_optimizer, pretrain_groups

MAX_GRAD_NORM = 5.0  # TRAIN.CLIP_GRAD of the official configurations


class Trainee:
    """A model, its optimizer, and the step that is timed.

    Args:
        model: The model.
        dtype: "bf16", under autocast, or "fp32".
        call: What is called in the model's place, such as the model compiled.
    """

    def __init__(self, model: SimMIM, dtype: str, call: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.model = model
        self.dtype = dtype
        self._call = model if call is None else call
        config = OptimizerConfig()
        self.optimizer = build_optimizer(pretrain_groups(model), config, config.base_lr)

    def gradients(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and norm of the gradient, which is clipped."""
        self.optimizer.zero_grad()
        loss = loss_of(self._call, images, mask, self.dtype)
        loss.backward()
        return loss.detach(), nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)

    def step(self, images: Tensor, mask: Tensor) -> None:
        """One update. Waits for no device."""
        self.gradients(images, mask)
        self.optimizer.step()

    @property
    def draws(self) -> bool:
        """Whether a step in training mode draws at random which branches to drop."""
        return any(isinstance(module, DropPath) and module.rate > 0 for module in self.model.modules())


def with_sdpa(model: SimMIM) -> SimMIM:
    """The reference with PyTorch's fused attention in the place of its own, in place.

    Raises:
        Absent: Swin V2's cosine form has none.
    """
    for module in model.modules():
        if isinstance(module, AttentionInWindows):
            if hasattr(module, "logit_scale"):
                raise Absent("cosine attention is no scaled dot product")
            module.attend = partial(_sdpa_in_windows, module)
        elif isinstance(module, Attention):
            module._attend = partial(_sdpa_of_all_tokens, module)
    return model


def _sdpa_in_windows(
    module: AttentionInWindows,
    qkv: Tensor,
    bias_table: Tensor,
    attn_mask: Tensor | None,
    *,
    scale: float | None,
    **unused: Any,
) -> Tensor:
    """As `AttentionInWindows.attend`, for grids that whole windows fill; biases and mask are one tensor, as in timm."""
    grid, rows, columns = qkv.shape[1:3], *module.shift
    qkv = torch.roll(qkv, (-rows, -columns), (1, 2)) if rows or columns else qkv
    windows = partition(qkv, module.window_size)
    q, k, v = windows.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B G, h, N, D)
    bias = bias_table[module.relative_position_index].permute(2, 0, 1)[None]
    if attn_mask is not None:
        bias = (bias + attn_mask[:, None]).repeat(qkv.shape[0], 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(len(q), -1, -1, -1), scale=scale)
    out = reverse(out.transpose(1, 2).flatten(2), module.window_size, grid)
    return torch.roll(out, (rows, columns), (1, 2)) if rows or columns else out


def _sdpa_of_all_tokens(module: Attention, qkv: Tensor, bias: Tensor | None, queries: Tensor | None) -> Tensor:
    if bias is None or module.scale is not None or queries is not None:
        raise Absent("scaled_dot_product_attention is written here for a bias, the default scale and all tokens")
    return sdpa(qkv, bias, module.num_heads)


def _compiled(model: SimMIM) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(model, fullgraph=True, dynamic=False)


# Backend, what is done to the model, and what is called in its place.
_CONTESTANTS: Mapping[str, tuple[str, Callable[[SimMIM], SimMIM], Callable | None]] = {
    "fast": ("auto", lambda model: model, None),
    "fast_compiled": ("auto", lambda model: model, _compiled),
    "reference": ("reference", lambda model: model, None),
    "compiled": ("reference", lambda model: model, _compiled),
    "sdpa": ("reference", with_sdpa, None),
}
CONTESTANTS = tuple(_CONTESTANTS)


def trainee(contestant: str, name: str, dtype: str, device: str, state: Mapping[str, Tensor]) -> Trainee:
    """A contestant on a model of `benchmarks.models`, with the parameters of a state dict.

    Compiled ones are compiled at their first call, for its shapes alone. Whoever begins with new shapes resets dynamo:
    one compiled function serves other shapes badly, and a win over it would be none.

    Raises:
        Absent: It cannot train this model; the message says why.
    """
    backend, changed, call = _CONTESTANTS[contestant]
    model = build(name, backend=backend)
    model.load_state_dict(state)
    model = changed(model.to(device))
    return Trainee(model, dtype, None if call is None else call(model))
