"""Optimizers with the official parameter groups.

Source: optimizer.py of microsoft/SimMIM. Biases, vectors (norms, layer scale) and what the model names in
`no_weight_decay()` are not decayed, nor is a parameter whose name contains one of `no_weight_decay_keywords()`. SimMIM
prefixes its encoder's keywords with "encoder.", so in pre-training "encoder.relative_position_bias_table" is part of no
name and the tables are decayed; in fine-tuning they are not. The released models were trained that way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from simmim_fast._arguments import check_choice
from simmim_fast.train.config import OptimizerConfig

Group = dict[str, Any]


def pretrain_groups(model: nn.Module) -> list[Group]:
    """Two groups: the decayed parameters, which take the optimizer's weight decay, and the rest."""
    decayed, rest = [], []
    for name, parameter in _trainable(model):
        (decayed if _is_decayed(model, name, parameter) else rest).append(parameter)
    return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]


def finetune_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    layer_of: Callable[[str], int],
    layers: int,
) -> list[Group]:
    """Up to two groups for each layer, whose rate falls by `layer_decay` a layer from the head down to the patches.

    Args:
        model: Classifier whose parameters have the official names.
        lr: Rate of the head.
        weight_decay: Of the decayed groups.
        layer_decay: Ratio of the rates of neighbouring layers, in (0, 1].
        layer_of: Layer of a parameter's name: `swin_layers` or `vit_layers`.
        layers: Number of layers, patch embedding and head included.
    """
    groups: dict[tuple[int, bool], Group] = {}
    for name, parameter in _trainable(model):
        layer, decayed = layer_of(name), _is_decayed(model, name, parameter)
        if (layer, decayed) not in groups:
            scale = layer_decay ** (layers - 1 - layer)
            groups[layer, decayed] = {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr": lr * scale,
                "lr_scale": scale,
            }
        groups[layer, decayed]["params"].append(parameter)
    return list(groups.values())


def swin_layers(depths: Sequence[int]) -> tuple[Callable[[str], int], int]:
    """(layer of a parameter's name, number of layers) of a Swin classifier: one layer per block."""
    layers = sum(depths) + 2
    return partial(_swin_layer, depths=tuple(depths), layers=layers), layers


def vit_layers(depth: int) -> tuple[Callable[[str], int], int]:
    """(layer of a parameter's name, number of layers) of a ViT classifier: one layer per block."""
    return partial(_vit_layer, layers=depth + 2), depth + 2


def build_optimizer(groups: list[Group], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum as officially, in its fused form.

    Args:
        groups: `pretrain_groups` or `finetune_groups`.
        config: Which optimizer, and its constants.
        lr: Peak rate of the groups that name none; see `OptimizerConfig.peak_lr`.

    Raises:
        ValueError: an unknown optimizer.
    """
    optimizers = {
        "adamw": partial(torch.optim.AdamW, betas=config.betas, eps=config.eps),
        "sgd": partial(torch.optim.SGD, momentum=config.momentum, nesterov=True),
    }
    check_choice("optimizer.name", config.name, optimizers)
    optimizer = optimizers[config.name](groups, lr=lr, weight_decay=config.weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _is_decayed(model: nn.Module, name: str, parameter: Tensor) -> bool:
    names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    keywords = model.no_weight_decay_keywords() if hasattr(model, "no_weight_decay_keywords") else ()
    excluded = parameter.ndim == 1 or name.endswith(".bias") or name in names
    return not (excluded or any(keyword in name for keyword in keywords))


def _swin_layer(name: str, depths: tuple[int, ...], layers: int) -> int:
    parts = name.split(".")
    if parts[0] in ("mask_token", "patch_embed"):
        return 0
    if parts[0] != "layers":
        return layers - 1
    stage = int(parts[1])
    if parts[2] == "downsample":  # belongs to the last block before it
        return sum(depths[: stage + 1])
    return sum(depths[:stage]) + int(parts[3]) + 1


def _vit_layer(name: str, layers: int) -> int:
    parts = name.split(".")
    if parts[0] in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
        return 0
    return int(parts[1]) + 1 if parts[0] == "blocks" else layers - 1
