"""Official initialisation, parameter by parameter, and the presets against the official configurations."""

from __future__ import annotations

import math

import pytest
import torch

from simmim_fast import PRESETS, build_simmim, create_model
from tests.official_files import FILES

# Standard deviation of a normal of 0.02 that is cut at two absolute units, and at one deviation.
WIDE, CUT_AT_ONE = 0.02, 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(0.5**0.5))
SWIN = {"img_size": 64, "embed_dim": 64, "depths": (2, 2), "num_heads": (32, 32), "window_size": 8, "ape": True}
VIT = {"img_size": 64, "embed_dim": 256, "depth": 2, "num_heads": 64, "qkv_bias": True, "use_mean_pooling": False}
VIT |= {"init_values": 0.1, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}


def parameters(encoder: str, **arguments: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: p.detach() for name, p in create_model(encoder, **arguments).encoder.named_parameters()}


def assert_normal(name: str, value: torch.Tensor, std: float, bound: float = math.inf) -> None:
    tolerance = 4 / math.sqrt(2 * value.numel())  # four deviations of a sample's standard deviation
    assert value.std().item() == pytest.approx(std, rel=tolerance), name
    assert value.abs().max().item() <= bound, name


def assert_constant(name: str, value: torch.Tensor, constant: float) -> None:
    assert torch.equal(value, torch.full_like(value, constant)), name


def assert_convolution(name: str, value: torch.Tensor, fan_in: int) -> None:
    """PyTorch's own: uniform to 1 / sqrt(fan in)."""
    assert_normal(name, value, 1 / math.sqrt(3 * fan_in), 1 / math.sqrt(fan_in))


def test_swin():
    for name, value in parameters("swin", **SWIN).items():
        if name.startswith("patch_embed.proj"):
            assert_convolution(name, value, 3 * 4 * 4)
        elif "norm" in name or name.endswith("bias"):
            assert_constant(name, value, float("norm" in name and name.endswith("weight")))
        else:  # linear layers, position bias tables, mask token, position embedding
            assert_normal(name, value, WIDE)


def test_swin_v2():
    found = parameters("swinv2", **{**SWIN, "img_size": 128, "depths": (1,) * 5, "num_heads": (2,) * 5})
    for name, value in found.items():
        if name.startswith("patch_embed.proj"):
            assert_convolution(name, value, 3 * 4 * 4)
        elif name.endswith("logit_scale"):
            assert_constant(name, value, math.log(10.0))
        elif ".blocks." in name and "norm" in name:  # a branch adds nothing at first
            assert_constant(name, value, 0.0)
        elif "norm" in name or name.endswith("bias"):
            assert_constant(name, value, float("norm" in name and name.endswith("weight")))
        else:
            assert_normal(name, value, WIDE)
    assert len({name.split(".")[1] for name in found if ".blocks." in name}) == 5


def test_vit():
    for name, value in parameters("vit", **VIT).items():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else None
        if "relative_position_bias_table" in name:
            assert_constant(name, value, 0.0)
        elif "gamma" in name:
            assert_constant(name, value, 0.1)
        elif name.endswith("bias") or "norm" in name:
            assert_constant(name, value, float("norm" in name and name.endswith("weight")))
        elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            assert_normal(name, value, CUT_AT_ONE / math.sqrt(2 * layer), 0.02 / math.sqrt(2 * layer))
        else:  # linear layers, patch embedding, class and mask token, position embedding
            assert_normal(name, value, CUT_AT_ONE, 0.02)


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() & FILES.keys()))
def test_a_preset_is_its_official_configuration(preset):
    with torch.device("meta"):
        ours, official = create_model(preset), build_simmim(FILES[preset])
    assert str(ours) == str(official)  # every module, rate and window
    assert (ours.norm_target, ours.norm_target_patch_size) == (official.norm_target, official.norm_target_patch_size)
    assert (ours.img_size, ours.patch_size, ours.in_chans) == (
        official.img_size,
        official.patch_size,
        official.in_chans,
    )


def test_the_presets_with_values_that_no_module_prints():
    torch.manual_seed(0)
    vit = create_model("simmim_vit_base_224", depth=1)
    assert_constant("gamma_1", vit.encoder.blocks[0].gamma_1.detach(), 0.1)
    assert vit.encoder.pos_embed is None
    rates = [block.drop_path.rate for block in create_model("simmim_vit_base_224", embed_dim=48).encoder.blocks]
    assert rates == pytest.approx([0.1 * number / 11 for number in range(12)])
