"""Who trains a model in the step benchmark, and what one step is: forward, backward, clipping, fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attention import Attend, attention, in_windows, of_all_tokens
from benchmarks.comparators import COMPARATORS, comparator
from benchmarks.measure import Absent
from benchmarks.models import MODELS, copy_of, loss_of
from benchmarks.peers import HF_OVERRIDES, Call, Peer, hugging_face, official, timm_swin
from simmim_fast import GraphedStep
from simmim_fast.models import SimMIM
from simmim_fast.models.swin import AttentionInWindows
from simmim_fast.models.vit import Attention
from simmim_fast.train import OptimizerConfig, build_optimizer, pretrain_groups

MAX_GRAD_NORM = 5.0  # TRAIN.CLIP_GRAD of the official configurations


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        model: Key of `benchmarks.models.MODELS`.
        dtype: "bf16", under autocast, or "fp32".
        batch: Images in a step.
        device: "cpu" or "cuda".
        official: Checkout of microsoft/SimMIM, for the contestant of that name.
    """

    model: str
    dtype: str
    batch: int
    device: str
    official: Path | None = None


class Trainee:
    """A model, its optimizer, and the step that is timed.

    Args:
        model: The model.
        dtype: "bf16", under autocast, or "fp32".
        call: What is called in the model's place, such as the model compiled.
    """

    def __init__(self, model: nn.Module, dtype: str, call: Call | None = None) -> None:
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

    def step(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One update; its loss and norm of the gradient. Waits for no device."""
        scalars = self.gradients(images, mask)
        self.optimizer.step()
        return scalars

    @property
    def draws(self) -> bool:
        """Whether a step in training mode draws at random which branches to drop."""
        return any("DropPath" in type(module).__name__ and _drop_rate(module) > 0 for module in self.model.modules())


class GraphedTrainee(Trainee):
    """The step recorded as a CUDA graph and replayed.

    Args:
        model: The model.
        dtype: "bf16", under autocast, or "fp32".
    """

    def __init__(self, model: nn.Module, dtype: str) -> None:
        super().__init__(model, dtype)
        self._replayed = GraphedStep(model, self.optimizer, clip_grad=MAX_GRAD_NORM, precision=dtype)

    def step(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """One update by the graph; its loss and norm of the gradient."""
        return self._replayed(images, mask)


def _drop_rate(module: nn.Module) -> float:
    """Of a stochastic depth of ours ("rate") or of timm, the official code and Hugging Face ("drop_prob")."""
    return getattr(module, "rate", None) or getattr(module, "drop_prob", None) or 0.0


def with_attention(model: SimMIM, attend: Attend) -> None:
    """Give the reference another library's fused attention in the place of its own."""
    for module in model.modules():
        if isinstance(module, AttentionInWindows):
            module.attend = partial(_attend_in_windows, module, attend)
        elif isinstance(module, Attention):
            module._attend = partial(_attend_to_all, module, attend)


def _attend_in_windows(
    module: AttentionInWindows, attend: Attend, qkv: Tensor, bias_table: Tensor, attn_mask: Tensor | None, **form: Any
) -> Tensor:
    kept = {"attn_mask": attn_mask, "position_index": module.relative_position_index}
    return in_windows(attend, qkv, bias_table, module.window_size, module.shift, module.num_heads, **form, **kept)


def _attend_to_all(
    module: Attention, attend: Attend, qkv: Tensor, bias: Tensor | None, queries: Tensor | None
) -> Tensor:
    return of_all_tokens(attend, qkv, bias, module.num_heads, module.scale, queries)


@dataclass(frozen=True)
class _Form:
    """A contestant that trains our own model.

    Attributes:
        backend: Of its ops.
        attention: Another library's in the place of its own, or None.
        mode: Of torch.compile, or None where it is not compiled.
        graphed: Whether the step is a CUDA graph.
    """

    backend: str
    attention: str | None = None
    mode: str | None = None
    graphed: bool = False


_OURS: Mapping[str, _Form] = {
    "fast": _Form("auto"),
    "fast_compiled": _Form("auto", mode="default"),
    "fast_graph": _Form("auto", graphed=True),
    "reference": _Form("reference"),
    "compiled": _Form("reference", mode="default"),
    "max_autotune": _Form("reference", mode="max-autotune"),
    "sdpa": _Form("reference", "sdpa"),
    "sdpa_compiled": _Form("reference", "sdpa", "default"),
    "flex": _Form("reference", "flex", "default"),
    "xformers": _Form("reference", "xformers"),
}
# (peer, mode of torch.compile)
_PEERS: Mapping[str, tuple[Callable[[Setting, SimMIM], Peer], str | None]] = {
    "hf": (lambda setting, like: hugging_face(setting.model, like, "eager"), None),
    "hf_sdpa": (lambda setting, like: hugging_face(setting.model, like, "sdpa"), None),
    "hf_compiled": (lambda setting, like: hugging_face(setting.model, like, _hf_fastest(setting.model)), "default"),
    "timm": (lambda setting, like: timm_swin(setting.model, like), None),
    "timm_compiled": (lambda setting, like: timm_swin(setting.model, like), "default"),
    "official": (lambda setting, like: official(setting.model, like, setting.official), None),
}
CONTESTANTS = (*_OURS, *_PEERS, *COMPARATORS)
FAST = tuple(name for name in _OURS if name.startswith("fast"))


def _hf_fastest(name: str) -> str:
    """Hugging Face's Swin V2 has its eager attention alone."""
    return "eager" if name.startswith("swinv2") else "sdpa"


@dataclass(frozen=True)
class Counterpart:
    """Whom a contestant must agree with.

    Attributes:
        overrides: What the reference is built with so that it computes the same.
        renamed: What is one for each of the reference's parameters, by the contestant's own names and parts.
    """

    overrides: Mapping[str, object] = field(default_factory=dict)
    renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict


def trainee(contestant: str, setting: Setting, reference: Callable[..., SimMIM]) -> tuple[Trainee, Counterpart | None]:
    """A contestant, and whom it must agree with, or None where there is nobody.

    Compiled ones are compiled at their first call, for its shapes alone. Whoever begins with new shapes resets dynamo:
    one compiled function serves other shapes badly, and a win over it would be none.

    Args:
        contestant: Of `CONTESTANTS`.
        setting: What it trains.
        reference: The reference on the CPU, by what it is built with; its parameters are copied.

    Raises:
        Absent: It cannot train this model here; the message says why.
    """
    if contestant in _OURS:
        return _of_ours(_OURS[contestant], setting, reference().state_dict()), Counterpart()
    if contestant in _PEERS:
        make, mode = _PEERS[contestant]
        overrides = HF_OVERRIDES[MODELS[setting.model]["encoder"]] if contestant.startswith("hf") else {}
        peer = make(setting, reference(**overrides))
        model = peer.model.to(setting.device)
        if mode is not None:
            model.compile(mode=mode, dynamic=False)
        return Trainee(model, setting.dtype, peer.call), Counterpart(overrides, peer.renamed)
    model, call = comparator(contestant, setting.model, reference())
    return Trainee(model.to(setting.device), setting.dtype, call), None


def _of_ours(form: _Form, setting: Setting, state: Mapping[str, Tensor]) -> Trainee:
    if form.graphed and setting.device != "cuda":
        raise Absent("a CUDA graph needs a CUDA device")
    model = copy_of(setting.model, state, setting.device, backend=form.backend)
    if form.attention is not None:
        with_attention(model, attention(form.attention, setting.device))
    if form.graphed:
        return GraphedTrainee(model, setting.dtype)
    call = None if form.mode is None else torch.compile(model, fullgraph=True, dynamic=False, mode=form.mode)
    return Trainee(model, setting.dtype, call)
