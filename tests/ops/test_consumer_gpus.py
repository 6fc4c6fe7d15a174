"""GPUs of compute capability 8.6, 8.9 and 12.0: their blocks may have 99 KiB of shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simmim_fast.ops import _devices
from simmim_fast.testing import (
    linear_masked_loss_inputs,
    masked_patch_embed_inputs,
    offline,
)
from tests.ops import biased_attention_operators, masked_patch_embed_operators, shifted_window_operators

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("device", "tiles"), [((8, 6), 80), ((8, 9), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 80)])
def test_takes_the_tiles_of_a_family(device: tuple, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: device)
    assert _devices.capability_of(torch.device("cuda"), (80, 90, 100)) == tiles
    assert _devices.capability_of(torch.device("cuda"), (80, 86, 90, 100)) == (86 if tiles == 80 else tiles)


@pytest.mark.slow
@pytest.mark.compiles(2)
@pytest.mark.parametrize("capability", [89, 120])
def test_windows_of_swin_b_fit(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simmim_fast.ops.shifted_window_attention import kernels

    monkeypatch.setattr(kernels, "capability_of", lambda device, known: 80)
    case = {"shape": (64, 24, 24, 4, 32), "window_size": (6, 6), "shift": (3, 3), "dtype": BF16}
    calls = shifted_window_operators.operator_arguments(**case, parameter_dtype=FP32, device="meta")
    launches = offline.launches(kernels.forward, *calls[0]) + offline.launches(kernels.backward, *calls[1])
    for launch in launches:
        if "qkv_ptr" in launch.arguments:
            offline.assert_frugal(offline.compile_launch(launch, capability, tmp_path), capability)


@pytest.mark.slow
@pytest.mark.compiles(2)
@pytest.mark.parametrize("capability", [86, 120])
def test_attention_of_vit_b_fits(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simmim_fast.ops.biased_attention import kernels

    monkeypatch.setattr(kernels, "capability_of", lambda device, known: 86)
    calls = biased_attention_operators.operator_arguments((64, 197, 12, 64), BF16, FP32, "meta", queries=None)
    launches = offline.launches(kernels.forward, *calls[0]) + offline.launches(kernels.backward, *calls[1])
    for launch in launches:
        offline.assert_frugal(offline.compile_launch(launch, capability, tmp_path), capability)


@pytest.mark.slow
@pytest.mark.compiles(4)
def test_the_head_of_swin_b_fits(tmp_path: Path) -> None:
    from simmim_fast.ops.linear_masked_loss import kernels

    i = linear_masked_loss_inputs((64, 6, 6, 1024, 32, 3), 4, BF16, FP32, device="meta")
    names = ("features", "weight", "bias", "target", "mask", "tokens", "mean", "std")
    arguments = (*(i.get(name) for name in names), 4, 0, True)
    _, slope, scale = torch.ops.simmim_fast.linear_masked_loss_triton(*arguments)
    kept = (i["features"], i["weight"], slope, scale, i["mask"], None)
    launches = offline.launches(kernels.forward, *arguments)
    launches += offline.launches(kernels.backward, scale, *kept, 3, 4, 0, True, True, True)
    for launch in launches:
        offline.assert_frugal(offline.compile_launch(launch, 89, tmp_path), 89)


@pytest.mark.slow
@pytest.mark.compiles(1)
@pytest.mark.parametrize("capability", [80, 89])
def test_the_embedding_of_vit_b_fits(capability: int, tmp_path: Path) -> None:
    """float32 pixels, rounded to bf16 for the product, take more registers than bf16 pixels."""
    from simmim_fast.ops.masked_patch_embed import kernels

    inputs = masked_patch_embed_inputs((8, 14, 14, 3, 16, 768), norm=False, visible=True, device="meta")
    arguments, _ = masked_patch_embed_operators.operator_arguments(inputs, BF16, FP32)
    *_, launch = offline.launches(kernels.forward, *arguments)
    compiled = offline.compile_launch(launch, capability, tmp_path)
    offline.assert_frugal(compiled, capability)
    offline.assert_products(compiled, BF16, 1)
