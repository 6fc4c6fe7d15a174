"""Whole models on a GPU: what they compute, that they never wait, what they hold. The CPU runs all but the last."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor

from simmim_fast import MaskGenerator, SimMIM, create_model
from simmim_fast.testing.rules import GRADIENT_FACTOR, assert_within_budget
from simmim_fast.train import OptimizerConfig, build_optimizer, pretrain_groups, train_step

SIZE = 64
SWIN = {"patch_size": 4, "window_size": 4, "embed_dim": 64, "depths": (2, 2), "num_heads": (2, 4)}
ENCODERS = {
    "swin": SWIN,
    "swinv2": SWIN,
    "vit": {
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "init_values": 0.1,
        "use_mean_pooling": False,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

every_encoder = pytest.mark.parametrize("encoder", ENCODERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])


def build(encoder: str, device: str, counted: bool = True, **options: object) -> SimMIM:
    torch.manual_seed(0)
    model = create_model(encoder, img_size=SIZE, drop_path_rate=0.0, **ENCODERS[encoder], **options)
    for parameter in model.parameters():  # official zeros would hide a lost gradient
        parameter.data += 0.02 * torch.randn(parameter.shape)
    if counted:
        model.counts = masks_for(model).counts
    return model.to(device)


def masks_for(model: SimMIM) -> MaskGenerator:
    return MaskGenerator(SIZE, 16, model.patch_size, 0.6, encoder_stride=model.encoder_stride)


def batch(model: SimMIM, size: int = 4) -> tuple[Tensor, Tensor]:
    """Images of -3 and 3, far from what a new model predicts: at L1's kink a rounding would turn a gradient's sign."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    images = 3 * torch.randn(size, 3, SIZE, SIZE, generator=generator).sign()
    return images.to(device), masks_for(model).batch(size, generator=generator).to(device)


def train(model: SimMIM, dtype: str = "fp32", mask: Tensor | None = None) -> dict[str, Tensor]:
    """Loss and gradients."""
    images, drawn = batch(model)
    parameters = dict(model.named_parameters())
    images = images.to(next(iter(parameters.values())).dtype)
    with torch.autocast(images.device.type, DTYPES[dtype], enabled=dtype == "bf16"):
        loss = model(images, drawn if mask is None else mask)
    return {"loss": loss.detach()} | dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


def flattened(results: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss, and all gradients as one vector; of a dtype, whose eps is allowed for."""
    gradients = torch.cat([value.flatten() for name, value in results.items() if name != "loss"])
    return {"loss": results["loss"].to(dtype), "gradients": gradients.to(dtype)}


@pytest.mark.parametrize(
    ("encoder", "dtype"),
    [
        pytest.param(encoder, dtype, marks=pytest.mark.smoke if (encoder, dtype) == ("swin", "bf16") else ())
        for encoder in ENCODERS
        for dtype in DTYPES
    ],
)
@every_device
def test_is_right_beside_the_reference(encoder: str, dtype: str, device: str) -> None:
    """By the rule for gradients, over the whole gradient, as many roundings lie between a loss and a first layer."""
    exact = train(build(encoder, device, backend="reference").double())
    plain, actual = train(build(encoder, device, backend="reference"), dtype), train(build(encoder, device), dtype)
    for name, value in actual.items():
        assert (value.dtype, value.shape) == (plain[name].dtype, plain[name].shape)
        assert value.isfinite().all(), name
    plain, actual = (flattened(results, DTYPES[dtype]) for results in (plain, actual))
    for name, value in flattened(exact, torch.float64).items():
        assert_within_budget(actual[name], plain[name], value, GRADIENT_FACTOR, name)


@every_encoder
@every_device
def test_counts_change_nothing(encoder: str, device: str) -> None:
    expected = train(build(encoder, device, counted=False, shortcuts=()).double())
    torch.testing.assert_close(train(build(encoder, device).double()), expected, rtol=1e-11, atol=1e-13)


@every_encoder
@every_device
@pytest.mark.parametrize("change", [(-1, 0), (1, 0), (0, -1), (0, 1)], ids=str)
def test_wrong_counts_show_and_spoil_nothing_else(encoder: str, device: str, change: tuple[int, int]) -> None:
    """The CPU refuses them; a GPU is not asked, and the loss is NaN, save where a patch is embedded for nothing."""
    model = build(encoder, device)
    expected, right = train(model), model.counts
    model.counts = tuple(count + more for count, more in zip(right, change, strict=True))
    if device == "cpu":
        with pytest.raises(ValueError, match="counts say"):
            train(model)
    elif change == (1, 0):
        torch.testing.assert_close(train(model), expected)
    else:
        assert train(model)["loss"].isnan()
    model.counts = right
    torch.testing.assert_close(train(model), expected)


@every_encoder
@every_dtype
@every_device
def test_a_step_never_waits(encoder: str, dtype: str, device: str) -> None:
    """Fake tensors show as much of the CPU's code, in test_ecosystem.py; here it is the step that is shown to run."""
    model = build(encoder, device)
    optimizer = build_optimizer(pretrain_groups(model), OptimizerConfig(), 1e-4)
    pairs, options = [batch(model)] * 2, {"clip_grad": 5.0, "bf16": dtype == "bf16"}
    train_step(model, optimizer, pairs, **options)  # compiles kernels and makes the optimizer's state
    before = copy.deepcopy(model.state_dict())
    mode = torch.cuda.get_sync_debug_mode() if device == "cuda" else None
    try:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        loss, norm = train_step(model, optimizer, pairs, **options)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
    assert torch.stack([loss, norm]).isfinite().all()
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


@every_encoder
@on_gpu
def test_a_step_holds_less_than_the_reference(encoder: str, device: str) -> None:
    peaks = {}
    for backend in ("auto", "reference"):
        model = build(encoder, device, backend=backend)
        images, mask = batch(model, 64)
        optimizer = build_optimizer(pretrain_groups(model), OptimizerConfig(), 1e-4)
        for _ in range(2):
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            train_step(model, optimizer, [(images, mask)], 5.0, bf16=True)
            optimizer.zero_grad()
            peaks[backend] = torch.cuda.max_memory_allocated() - held
        del model, optimizer, images, mask
    assert peaks["auto"] < peaks["reference"]
