"""The models beyond parity: any size and channels, options, initialisation, and refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from simmim_fast import PRESETS, SimMIM, build_model, create_model
from simmim_fast.masking import MaskGenerator
from simmim_fast.models.layers import DropPath
from simmim_fast.models.targets import local_statistics, norm_targets

SMALL = {
    "swin": {"img_size": 64, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4},
    "swinv2": {"img_size": 64, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4},
    "vit": {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "use_mean_pooling": False},
}


def build(encoder: str, **overrides: object):
    torch.manual_seed(0)
    return create_model(encoder, **{**SMALL[encoder], **overrides})


def batch(model, size: int = 2):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, model.in_chans, *model.img_size, generator=generator)
    grid = tuple(side // model.patch_size for side in model.img_size)
    return images, torch.rand(size, *grid, generator=generator) < 0.6


@pytest.mark.parametrize("encoder", SMALL)
@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize("img_size", [64, (32, 64)], ids=str)
def test_any_channels_and_any_shape(encoder, in_chans, img_size):
    model = build(encoder, in_chans=in_chans, img_size=img_size)
    images, mask = batch(model)
    loss = model(images, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.reconstruct(images, mask).shape == images.shape
    height, width = model.img_size
    stride = model.encoder_stride
    assert model.encoder(images, mask).shape == (2, model.encoder.num_features, height // stride, width // stride)


@pytest.mark.parametrize("encoder", SMALL)
def test_hidden_pixels_reach_the_loss_only_as_target(encoder):
    model = build(encoder).double().eval()
    images, mask = batch(model)
    pixels = mask.repeat_interleave(model.patch_size, 1).repeat_interleave(model.patch_size, 2)[:, None]
    changed = torch.where(pixels, torch.full_like(images, torch.nan), images).double()
    assert torch.equal(model.reconstruct(changed, mask), model.reconstruct(images.double(), mask))


@pytest.mark.parametrize("encoder", SMALL)
def test_loss_is_the_mean_error_over_masked_pixels(encoder):
    model = build(encoder).double().eval()
    images, mask = batch(model)
    images = images.double()
    pixels = mask.repeat_interleave(model.patch_size, 1).repeat_interleave(model.patch_size, 2)
    error = (model.reconstruct(images, mask) - images).abs().permute(0, 2, 3, 1)[pixels]
    assert model(images, mask).item() == pytest.approx(error.mean().item(), rel=1e-7)


@pytest.mark.parametrize("encoder", SMALL)
def test_no_pixel_masked_gives_zero(encoder):
    model = build(encoder)
    images, mask = batch(model)
    assert model(images, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize("encoder", SMALL)
def test_integer_and_bool_masks_agree(encoder):
    model = build(encoder).eval()
    images, mask = batch(model)
    assert torch.equal(model(images, mask), model(images, mask.long()))


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_windows_that_do_not_divide_the_grid_are_padded(encoder):
    model = build(encoder, window_size=5)  # grids of 16 and 8
    loss = model(*batch(model))
    loss.backward()
    assert torch.isfinite(loss)


def test_grid_smaller_than_the_window_is_one_unshifted_window():
    model = build("swin", img_size=(16, 64), window_size=4)  # grids 4 x 16, then 2 x 8
    first, second = model.encoder.layers
    assert [block.attn.shift for block in first.blocks] == [(0, 0), (0, 2)]
    assert second.blocks[1].attn.window_size == (2, 4)
    assert second.blocks[1].attn.shift == (0, 2)


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
def test_activation_checkpointing_changes_nothing(encoder):
    plain, recomputed = build(encoder), build(encoder, use_checkpoint=True)
    images, mask = batch(plain)
    for model in (plain, recomputed):
        torch.manual_seed(1)
        model(images, mask).backward()
    for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("encoder", SMALL)
def test_deepcopy_and_pickle(encoder):
    model = build(encoder).eval()
    images, mask = batch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images, mask), model(images, mask))


@pytest.mark.parametrize("encoder", SMALL)
def test_bf16_autocast(encoder):
    model = build(encoder)
    images, mask = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(images, mask).item(), rel=0.02)


def test_mlp_head():
    model = build("vit", head="mlp")
    images, mask = batch(model)
    assert torch.allclose(model.reconstruct(images, mask), model.decoder(model.encoder(images, mask)), atol=1e-6)


def test_norm_targets_is_the_local_z_score():
    images = torch.randn(1, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window = images[0, 1, 0:3, 2:7]  # around (0, 4), cut at the top
    expected = (images[0, 1, 0, 4] - window.mean()) / (window.var() + 1e-6).sqrt()
    assert norm_targets(images, 5)[0, 1, 0, 4].item() == pytest.approx(expected.item(), rel=1e-9)
    mean, deviation = local_statistics(images, 5)
    assert mean[0, 1, 0, 4].item() == pytest.approx(window.mean().item(), rel=1e-9)
    assert deviation[0, 1, 0, 4].item() == pytest.approx((window.var() + 1e-6).sqrt().item(), rel=1e-9)


def test_drop_path_keeps_or_drops_whole_samples():
    torch.manual_seed(0)
    x = torch.ones(1000, 3, 2)
    out = DropPath(0.25).train()(x)
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.min(1).values, per_sample.max(1).values)
    assert set(per_sample[:, 0].tolist()) == {0.0, torch.tensor(1.0).div(0.75).item()}
    assert (per_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(x), x)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_fit_their_masks(preset):
    with torch.device("meta"):
        model = create_model(preset)
    masks = MaskGenerator(model.img_size, 32, model.patch_size, 0.6, encoder_stride=model.encoder_stride)
    assert masks.batch(1).shape[1:] == tuple(side // model.patch_size for side in model.img_size)


def test_keywords_override_a_preset():
    with torch.device("meta"):
        model = create_model("simmim_swin_base_192", img_size=96, in_chans=4)
    assert model.img_size == (96, 96)
    assert model.decoder[0].weight.shape[0] == 32 * 32 * 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: create_model("simmim_swin_bas_192"), ValueError, "did you mean 'simmim_swin_base_192'"),
        (lambda: create_model("swin", embed_dims=96), TypeError, "did you mean 'embed_dim'"),
        (lambda: build("swin", img_size=60), ValueError, "multiple of the encoder's stride 8 .* got height 60"),
        (
            lambda: build("swin", img_size=(64, 0)),
            ValueError,
            r"img_size must be at least 1 on each side, got \(64, 0\)",
        ),
        (lambda: build("swin", window_size=17), ValueError, "window_size must fit the grid of patches 16 x 16, got 17"),
        (lambda: build("swin", img_size=None), TypeError, "img_size must be .* got None"),
        (lambda: build("vit", img_size=64.0), TypeError, "img_size must be .* got 64.0"),
        (lambda: build("swin", window_size=True), TypeError, "window_size must be .* got True"),
        (lambda: build("swin", depths=3), TypeError, "depths must be a list of integers, got 3"),
        (lambda: build("swin", depths=(), num_heads=()), ValueError, r"depths must have at least one stage, got \(\)"),
        (lambda: build("swin", num_heads=(0, 1)), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: build("swin", patch_size=-4), ValueError, "patch_size must be at least 1, got -4"),
        (lambda: build("vit", patch_size=0), ValueError, "patch_size must be at least 1, got 0"),
        (lambda: build("swinv2", in_chans=0), ValueError, "in_chans must be at least 1, got 0"),
        (lambda: build("vit", embed_dim="abc"), TypeError, "embed_dim must be an integer, got 'abc'"),
        (lambda: build("vit", depth=0), ValueError, "depth must be at least 1, got 0"),
        (
            lambda: build("vit", drop_path_rate=1.0),
            ValueError,
            "drop_path_rate must be at least 0 and below 1, got 1.0",
        ),
        (lambda: build("swin", backend="nativ"), ValueError, "backend must be one of .*; did you mean 'native'"),
        (lambda: build("swin", norm_target=3), TypeError, "norm_target must be a boolean, got 3"),
        (lambda: build("swinv2", pretrained_window_sizes=(4,)), ValueError, "one entry a stage, so 2, got"),
        (
            lambda: build_model({"MODEL": {"TYPE": "swni"}}),
            ValueError,
            "MODEL.TYPE must be one of .*did you mean 'swin'",
        ),
        (lambda: build("swin", num_heads=(1,)), ValueError, "num_heads must have one entry a stage"),
        (lambda: build("swin", num_heads=(3, 2)), ValueError, "num_heads must divide the channels"),
        (lambda: build("swin", num_classes=10), ValueError, "num_classes must be 0"),
        (lambda: build("swinv2", qk_scale=0.5), ValueError, "qk_scale must be None"),
        (lambda: build("vit", num_heads=3), ValueError, "num_heads must divide embed_dim 16, got 3"),
        (lambda: build("vit", head="deep"), ValueError, "head must be one of linear, mlp, got 'deep'"),
        (lambda: build("vit", norm_target_patch_size=4), ValueError, "norm_target_patch_size must be odd"),
    ],
)
def test_construction_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("encoder", SMALL)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, m: (x[:, :, :32], m), ValueError, r"images must have shape \(B, 3, 64, 64\), got \(2, 3, 32, 64\)"),
        (lambda x, m: (x[:, :2], m), ValueError, r"images must have shape \(B, 3, 64, 64\), got \(2, 2, 64, 64\)"),
        (lambda x, m: (x[0], m), ValueError, r"got \(3, 64, 64\)"),
        (lambda x, m: (x.int(), m), TypeError, "images must be a float tensor, got torch.int32"),
        (lambda x, m: (x, m[:, 1:]), ValueError, "mask must have shape"),
        (lambda x, m: (x, m[:1]), ValueError, "mask must have shape"),
        (lambda x, m: (x, None), TypeError, "mask must be a Tensor, got None"),
        (lambda x, m: (x.numpy(), m), TypeError, "images must be a Tensor, got array"),
        (lambda x, m: (x, m.float()), TypeError, "mask must be bool or an integer dtype, got torch.float32"),
    ],
)
def test_inputs_refused(encoder, change, error, message):
    model = build(encoder)
    with pytest.raises(error, match=message):
        model(*change(*batch(model)))


class OfficialEncoder(nn.Module):
    """An encoder as the official code knows it: without `encode` and `img_size`."""

    num_features, in_chans, patch_size = 8, 3, 4

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 8, kernel_size=8, stride=8)

    def forward(self, images, mask):
        return self.proj(images * mask.logical_not().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None])


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_an_encoder_of_the_official_form(head):
    torch.manual_seed(0)
    model = SimMIM(OfficialEncoder(), 8, head=head)
    images = torch.randn(2, 3, 32, 48)
    mask = torch.rand(2, 8, 12) < 0.6
    expected = model.decoder(model.encoder(images, mask))
    assert torch.allclose(model.reconstruct(images, mask), expected, atol=1e-6)
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    error = (expected - images).abs().permute(0, 2, 3, 1)[pixels].mean()
    assert model(images, mask).item() == pytest.approx(error.item(), rel=1e-5)
    assert model.img_size is None
    assert model.no_weight_decay() == model.no_weight_decay_keywords() == set()


def test_modules_print_their_geometry():
    text = repr(build("swin"))
    assert "window_size=(4, 4), shift=(2, 2), num_heads=1" in text
    assert isinstance(build("swin").encoder.layers[0].downsample, nn.Module)
