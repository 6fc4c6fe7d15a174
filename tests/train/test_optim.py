"""Parameter groups against the official grouping."""

from __future__ import annotations

import pytest
import torch

from simmim_fast import create_model
from simmim_fast.models import SwinTransformer, VisionTransformer
from simmim_fast.train import (
    OptimizerConfig,
    build_optimizer,
    finetune_groups,
    pretrain_groups,
    swin_layers,
    vit_layers,
)
from tests import golden_data

GROUPS = golden_data.read_json("param_groups")


def names_of(groups: list[dict], model: torch.nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


@pytest.mark.parametrize("case", ["pretrain_swin", "pretrain_vit"])
def test_pretrain_groups_equal_official(case):
    arguments = {k: v for k, v in GROUPS[case]["model"].items() if k not in ("encoder_stride", "layer_norm_eps")}
    model = create_model(**arguments, **({"qkv_bias": True} if case == "pretrain_vit" else {}))
    official = GROUPS[case]["pretrain"]
    optimizer = build_optimizer(pretrain_groups(model), OptimizerConfig(weight_decay=0.05), 1e-3)
    assert names_of(optimizer.param_groups, model) == [group["params"] for group in official]
    for ours, theirs in zip(optimizer.param_groups, official, strict=True):
        assert (ours["weight_decay"], ours["lr"]) == (theirs["weight_decay"], theirs["lr"])


FINETUNED = {
    "swin_layer_decay_0.8": ("finetune_swin", SwinTransformer, 0.8),
    "vit_layer_decay_0.65": ("finetune_vit", VisionTransformer, 0.65),
}


@pytest.mark.parametrize("case", FINETUNED)
def test_finetune_groups_equal_official(case):
    file, classifier, layer_decay = FINETUNED[case]
    _, arguments = golden_data.read_case(file)
    encoder = arguments.pop("encoder")
    arguments.pop("layer_norm_eps", None)
    arguments |= {"qkv_bias": True, "use_abs_pos_emb": False} if encoder == "vit" else {}
    model = classifier(**arguments)
    official = GROUPS["finetune"][case]
    layer_of, layers = swin_layers(arguments["depths"]) if encoder == "swin" else vit_layers(arguments["depth"])
    head_lr = max(group["lr"] / group["lr_scale"] for group in official)
    groups = finetune_groups(model, head_lr, 0.05, layer_decay, layer_of, layers)
    assert names_of(groups, model) == [group["params"] for group in official]
    for ours, theirs in zip(groups, official, strict=True):
        for key in ("weight_decay", "lr", "lr_scale"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-12)


def test_sgd_is_nesterov():
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.ones(2))]}], OptimizerConfig(name="sgd"), 0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["nesterov"]
    assert optimizer.defaults["momentum"] == 0.9


def test_rates_scale_with_the_batch_unless_given():
    assert OptimizerConfig(base_lr=1e-4).peak_lr(2048) == pytest.approx(4e-4)
    assert OptimizerConfig(lr=1e-3).peak_lr(2048) == 1e-3
