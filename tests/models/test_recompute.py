"""What the backward computes again changes no gradient, and takes less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from simmim_fast import MaskGenerator, SimMIM, create_model
from simmim_fast.models.layers import Stream, block_weights
from simmim_fast.models.recompute import RECOMPUTE, cast_together, is_plain
from simmim_fast.testing.rules import relative_error

SWIN = {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)}
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "qkv_bias": True, "use_mean_pooling": False}
ENCODERS = {
    "swin": SWIN,
    "swin-padded": {**SWIN, "window_size": 3},
    "swinv2": SWIN,
    "vit": {**VIT, "init_values": 0.1, "use_shared_rel_pos_bias": True},
    "vit-plain": VIT,
}
SIZE = 32
LOSS_SCALE = 1024  # or fp16 would have no digits left

every_encoder = pytest.mark.parametrize("encoder", ENCODERS)
recomputing = pytest.mark.parametrize("recompute", ["pointwise", "mlp"])


def build(encoder: str, **options: object) -> SimMIM:
    torch.manual_seed(0)
    options = {"img_size": SIZE, "backend": "native", "drop_path_rate": 0.3, **ENCODERS[encoder], **options}
    model = create_model(encoder.split("-")[0], **options)
    for parameter in model.parameters():  # official zeros would hide a lost gradient
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


def masks(encoder: str, **options: int) -> MaskGenerator:
    return MaskGenerator(SIZE, 16, ENCODERS[encoder]["patch_size"], 0.6, **options)


def batch(encoder: str, size: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    return images, masks(encoder).batch(size, generator=generator)


def train(model: nn.Module, images: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Loss and gradients, the same samples being dropped each time; under autocast where there is a dtype."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(images, mask)
    (LOSS_SCALE * loss).backward()
    return {"loss": LOSS_SCALE * loss.detach()} | {name: value.grad for name, value in model.named_parameters()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """In relative L2."""
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= relative * value.norm(), name


@every_encoder
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_leaves_loss_and_gradients_as_they_are(encoder: str, recompute: str) -> None:
    images, mask = batch(encoder)
    expected = train(build(encoder, backend="reference").double(), images.double(), mask)
    assert_close(train(build(encoder, recompute=recompute).double(), images.double(), mask), expected, 1e-12)


@every_encoder
@recomputing
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_errs_no_more_than_without_under_autocast(encoder: str, recompute: str, dtype: torch.dtype) -> None:
    """By the rule for gradients, against the same model that stores all: the plain one has other signs at L1's kink."""
    images, mask = batch(encoder)
    exact = train(build(encoder, backend="reference").double(), images.double(), mask)
    plain = train(build(encoder, recompute="none"), images, mask, dtype)
    for name, value in train(build(encoder, recompute=recompute), images, mask, dtype).items():
        budget = 3 * (plain[name] - exact[name]).norm() + 4 * torch.finfo(dtype).eps * exact[name].norm()
        assert (value - exact[name]).norm() <= budget, name


@recomputing
@pytest.mark.parametrize("encoder", ["swin", "vit"])
def test_drops_as_without(encoder: str, recompute: str) -> None:
    expected = train(build(encoder, recompute="none", drop_rate=0.2), *batch(encoder))
    assert_close(train(build(encoder, recompute=recompute, drop_rate=0.2), *batch(encoder)), expected, 1e-5)


@recomputing
@pytest.mark.parametrize("encoder", ["swin", "vit"])
def test_frozen_layers_get_no_gradient(encoder: str, recompute: str) -> None:
    def freeze(model: SimMIM) -> SimMIM:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in ("fc2.weight", "norm2.weight", "qkv", "q_bias")))
        return model

    expected = train(freeze(build(encoder, recompute="none")), *batch(encoder))
    actual = train(freeze(build(encoder, recompute=recompute)), *batch(encoder))
    assert {name for name, value in actual.items() if value is None} == {n for n, v in expected.items() if v is None}
    given = {name: value for name, value in expected.items() if value is not None}
    assert_close(actual, given, 1e-5)


@pytest.mark.parametrize("encoder", ["swin", "vit"])
def test_stores_less(encoder: str) -> None:
    """Distinct storages without the parameters, under autocast, against the plain model."""
    sizes = {"swin": {"embed_dim": 64, "num_heads": (2, 4), "img_size": 64}, "vit": {"embed_dim": 64, "img_size": 64}}
    images = torch.randn(8, 3, 64, 64)
    mask = MaskGenerator(64, 16, ENCODERS[encoder]["patch_size"], 0.6).batch(8)

    def stored(**options: str) -> int:
        return stored_bytes(build(encoder, **sizes[encoder], **options), images, mask)

    reference = stored(backend="reference")
    assert stored(recompute="pointwise") <= 0.6 * reference
    assert stored(recompute="mlp") <= 0.4 * reference
    assert stored(recompute="none") > 0.7 * reference


def stored_bytes(model: SimMIM, images: Tensor, mask: Tensor) -> int:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = model(images, mask)
    assert loss.requires_grad
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_the_position_mlp_runs_once_in_a_forward(recompute: str, use_checkpoint: bool) -> None:
    """Checkpointing runs it again with its block, in the backward."""
    images, mask = batch("swinv2")
    model = build("swinv2", recompute=recompute, use_checkpoint=use_checkpoint)
    called = []
    for stage in model.encoder.layers:
        for block in stage.blocks:
            block.attn.cpb_mlp.register_forward_pre_hook(lambda module, args: called.append(module))
    loss = model(images, mask)
    assert len(called) == len(set(called)) == 4
    loss.backward()
    assert len(called) == (8 if use_checkpoint else 4)


@every_encoder
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_runs_in_bf16_throughout(encoder: str, recompute: str) -> None:
    """By the rules for outputs and gradients, of features: L1 has other signs at its kink in another dtype."""
    images, mask = batch(encoder)
    weights = build(encoder).bfloat16().state_dict()

    def results(dtype: torch.dtype, **options: str) -> dict[str, Tensor]:
        model = build(encoder, drop_path_rate=0.0, **options).to(dtype)
        model.load_state_dict(weights)
        features = model.encoder(images.bfloat16().to(dtype), mask)
        generator = torch.Generator().manual_seed(3)
        features.backward(torch.randn(features.shape, generator=generator).bfloat16().to(dtype))
        gradients = {name: value.grad for name, value in model.encoder.named_parameters()}
        model.zero_grad()
        loss = model(images.to(dtype), mask)
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        return {"features": features.detach()} | gradients

    exact = results(torch.float64, backend="reference")
    plain = results(torch.bfloat16, backend="reference")
    for name, value in results(torch.bfloat16, recompute=recompute).items():
        assert value.dtype == torch.bfloat16
        allowed = (2 if name == "features" else 3) * (plain[name] - exact[name]).norm()
        assert (value - exact[name]).norm() <= allowed + 4 * torch.finfo(value.dtype).eps * exact[name].norm(), name


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_casts_the_weights_of_a_block_together(encoder: str) -> None:
    counted = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func.overloadpacket == torch.ops.aten._foreach_copy_:
                counted.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    with Copies():
        train(build(encoder), *batch(encoder), torch.bfloat16)
    blocks, merging = {"swin": ([6] * 4, [1]), "swinv2": ([7] * 4, []), "vit": ([8] * 2, [])}[encoder]
    assert sorted(counted) == sorted(2 * (blocks + merging))  # forward and backward


@recomputing
@pytest.mark.parametrize("layer", ["qkv", "proj", "fc1", "fc2"])
def test_calls_layers_that_somebody_watches(layer: str, recompute: str) -> None:
    model = build("vit", recompute=recompute)
    expected = train(build("vit", recompute=recompute), *batch("vit"))
    block = model.encoder.blocks[0]
    watched = getattr(block.attn if layer in ("qkv", "proj") else block.mlp, layer)
    assert is_plain(watched)
    watched.register_forward_pre_hook(lambda module, args: None)
    assert not is_plain(watched)
    assert_close(train(model, *batch("vit")), expected, 1e-5)


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_calls_layers_of_another_kind(encoder: str, layer: str) -> None:
    """Such as an adapter's, which must not be passed over."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def double(model: SimMIM) -> dict[str, Tensor]:
        block = model.encoder.blocks[0] if encoder == "vit" else model.encoder.layers[0].blocks[0]
        plain = block.get_submodule(layer)
        doubled = Doubled(plain.in_features, plain.out_features, bias=plain.bias is not None)
        doubled.load_state_dict(plain.state_dict())
        block.set_submodule(layer, doubled)
        return train(model.double(), images.double(), mask)

    images, mask = batch(encoder)
    expected = double(build(encoder, backend="reference"))
    actual = double(build(encoder))
    assert_close(actual, expected, 1e-12)
    plain = train(build(encoder).double(), images.double(), mask)
    assert (actual["loss"] - plain["loss"]).abs() > 1e-6 * plain["loss"], "the layer is passed over"


class DoubledNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@every_encoder
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("norm_layer", [DoubledNorm, nn.RMSNorm], ids=["subclass", "rms"])
def test_calls_norms_of_another_kind(encoder: str, recompute: str, norm_layer: type[nn.Module]) -> None:
    images, mask = batch(encoder)
    reference = build(encoder, backend="reference", norm_layer=norm_layer).double()
    model = build(encoder, recompute=recompute, norm_layer=norm_layer).double()
    assert_close(train(model, images.double(), mask), train(reference, images.double(), mask), 1e-12)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_who_watches_a_block_sees_what_the_plain_one_shows(encoder: str, recompute: str) -> None:
    def watch(model: SimMIM) -> dict[str, tuple[Tensor, Tensor]]:
        seen = {}
        block = model.encoder.blocks[0] if encoder == "vit" else model.encoder.layers[0].blocks[0]
        names = ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2")
        for name in names:
            block.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: seen.update({name: (args[0].detach(), out.detach())})
            )
        train(model.double(), *(t.double() if t.is_floating_point() else t for t in batch(encoder)))
        return seen

    expected, seen = watch(build(encoder, backend="reference")), watch(build(encoder, recompute=recompute))
    assert seen.keys() == expected.keys() >= {"norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1"}
    for name, tensors in seen.items():
        for actual, value in zip(tensors, expected[name], strict=True):
            assert relative_error(actual, value) < 1e-12, name


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("name", ["encoder", "decoder", "decoder.0"])
@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_who_watches_encoder_or_head_sees_what_the_plain_one_shows(encoder: str, name: str, head: str) -> None:
    images, mask = batch(encoder)

    def watch(backend: str) -> list[Tensor]:
        seen = []
        model = build(encoder, backend=backend, head=head, drop_path_rate=0.0).double()
        model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        return [model(images.double(), mask).detach(), model.reconstruct(images.double(), mask).detach(), *seen]

    actual, expected = watch("native"), watch("reference")
    assert len(actual) == len(expected) == 4, "the hook is called by forward and by reconstruct"
    assert all(relative_error(*pair) < 1e-12 for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["attn", "mlp", "norm2"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_backward_hooks_are_called(recompute: str, name: str) -> None:
    called = []
    model = build("vit", recompute=recompute)
    model.encoder.blocks[0].get_submodule(name).register_full_backward_hook(lambda *_: called.append(name))
    train(model, *batch("vit"))
    assert called == [name]


@pytest.mark.parametrize("delta", [False, True], ids=["stream", "stream-and-branch"])
@recomputing
def test_a_stream_alone_has_gradients(recompute: str, delta: bool) -> None:
    block = build("vit", recompute=recompute).encoder.blocks[0]
    x, branch = (torch.randn(2, 17, 32, requires_grad=True) for _ in range(2))
    stream = Stream(x, branch if delta else None)
    weights = block_weights(block.attn, block.mlp)
    for y, _ in (
        stream.normalise_into(block.norm1, weights.qkv, "native", recompute),
        stream.through_mlp(block.norm2, block.mlp, weights, "native"),
    ):
        gradients = torch.autograd.grad(y, [x, branch][: 1 + delta], torch.ones_like(y))
        assert all(torch.equal(gradient, torch.ones_like(x)) for gradient in gradients)


def test_casts_frozen_weights_without_gradients() -> None:
    frozen, trained = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = cast_together([frozen, trained])
    assert [tensor.requires_grad for tensor in cast] == [False, True]
    sum(cast).sum().backward()
    assert torch.equal(trained.grad, torch.ones(3))


@pytest.mark.parametrize("autocast", [False, True])
def test_what_leaves_a_block_is_a_copy(autocast: bool) -> None:
    block = build("vit", init_values=0.1).encoder.blocks[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weights = block_weights(block.attn, block.mlp, block.gamma_2)
    for copied, parameter in ((weights.fc2_bias, block.mlp.fc2.bias), (weights.gamma, block.gamma_2)):
        assert torch.equal(copied, parameter)
        assert copied.data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_compiles_whole_under_autocast(encoder: str) -> None:
    """As pre-training compiles it: with stochastic depth, and knowing what every mask hides."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = build(encoder, recompute="mlp", drop_path_rate=0.1)
    model.counts = masks(encoder, encoder_stride=model.encoder_stride).counts
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in (2, 3, 5):
        expected = train(model, *batch(encoder, size), torch.bfloat16)
        actual = train(compiled, *batch(encoder, size), torch.bfloat16)
        assert_close({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected, 2**-7)
    assert counter.frame_count <= 2, "recompiled for the third batch size"


@pytest.mark.parametrize("encoder", ["swin", "swinv2"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
def test_checkpointing_recomputes_the_same(
    encoder: str, backend: str, drop_rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout nothing asks for the random generator's state, which a CUDA graph cannot tell."""
    options = {"recompute": "mlp", "backend": backend, "drop_rate": drop_rate}
    expected = train(build(encoder, **options), *batch(encoder), torch.bfloat16)
    model = build(encoder, **options, use_checkpoint=True)
    if drop_rate == 0.0:
        monkeypatch.delattr(torch, "get_rng_state")
    actual = train(model, *batch(encoder), torch.bfloat16)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
def test_refuses_an_unknown_name(encoder: str) -> None:
    with pytest.raises(ValueError, match=r"recompute must be one of .*pointwise.* got 'pointwize'"):
        build(encoder, recompute="pointwize")
