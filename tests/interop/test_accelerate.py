"""accelerate on modules of the official code's shape, and what it owes to every model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import simmim_fast
from simmim_fast import accelerate
from tests.interop.official_like import (
    CHANNELS,
    GRID,
    HEADS,
    Encoder,
    SimMIM,
    SwinTransformerBlock,
    SwinTransformerV2Block,
    ViTAttention,
)
from tests.interop.unchanged import assert_same, assert_unchanged, forward_calls, randomised, results

BLOCKS = [SwinTransformerBlock, SwinTransformerV2Block]
each_block = pytest.mark.parametrize("block", BLOCKS, ids=["swin", "swinv2"])


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, GRID[0] * GRID[1], CHANNELS, generator=generator, dtype=torch.float64).to(dtype)


def call(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    return model(tokens(dtype))


def simmim_arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 2 * GRID[0], 2 * GRID[1], generator=generator, dtype=torch.float64)
    return images.to(dtype), (torch.rand(2, *GRID, generator=generator) < 0.6).long()


def two_blocks(block: type[nn.Module], **options: float) -> nn.Sequential:
    return randomised(nn.Sequential(block(0, **options), block(2, **options)))


@each_block
@pytest.mark.parametrize("drop_path", [0.0, 0.4], ids="drop_path {}".format)
def test_blocks_are_unchanged(block, drop_path):
    report = assert_unchanged(two_blocks(block, drop_path=drop_path), call, modules=2, ops=2)
    assert report.accelerated == ["0", "1"]
    assert report.left == report.notes == {}


@pytest.mark.parametrize("biased", [True, False], ids=["own bias", "no own bias"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared bias", "no shared bias"])
def test_attention_of_vit_is_unchanged(biased, shared):
    x = tokens()[:, :7]
    bias = torch.randn(HEADS, 7, 7, dtype=torch.float64) if shared else None

    def attend(model: nn.Module, dtype: torch.dtype) -> Tensor:
        return model(x.to(dtype), rel_pos_bias=None if bias is None else bias.to(dtype))

    assert_unchanged(randomised(ViTAttention(biased)), attend, modules=1, ops=1)


@each_block
@pytest.mark.parametrize("norm_target", [None, 0, 5], ids=["plain", "not normalised", "normalised"])
def test_the_loss_of_simmim_is_unchanged(block, norm_target):
    def loss(model: nn.Module, dtype: torch.dtype) -> Tensor:
        return model(*simmim_arguments(dtype))

    model = randomised(SimMIM(Encoder(block(0), block(2)), norm_target))
    report = assert_unchanged(model, loss, modules=3, ops=3)
    assert report.accelerated == ["", "encoder.blocks.0", "encoder.blocks.1"]


def test_the_loss_takes_its_own_way_for_float_masks_and_gradients_of_images():
    model = randomised(SimMIM(Encoder()))
    accelerate(model, backend="native")
    images, mask = simmim_arguments()
    assert forward_calls(lambda: model(images, mask)) == 1
    assert forward_calls(lambda: model(images, mask.double())) == 0
    assert forward_calls(lambda: model(images.requires_grad_(), mask)) == 0


def test_attention_dropout_runs_its_own_forward_in_training():
    model = two_blocks(SwinTransformerBlock, attn_drop=0.3)
    report = accelerate(model, backend="native")
    reason = "in training it runs its own forward: its attention has dropout of 0.3"
    assert report.notes == {"0": reason, "1": reason}
    assert forward_calls(lambda: call(model)) == 0
    assert forward_calls(lambda: call(model.eval())) == 2


class Scaled(SwinTransformerBlock):
    """A fork: one factor is new."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * (super().forward(x) - x)


class WithoutSecondDropPath(SwinTransformerBlock):
    """A fork that differs in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class WithTwoArguments(SwinTransformerBlock):
    """A fork with another signature."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().forward(x)


class WithTwoResults(SwinTransformerBlock):
    """A fork whose callers take a tuple apart."""

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return super().forward(x), "attention weights"


class LossAndPicture(SimMIM):
    """The same of the whole model."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, str]:
        return super().forward(x, mask), "picture"


@pytest.mark.parametrize(
    ("fork", "reason"),
    [
        (Scaled, "its forward computes something else"),
        (WithoutSecondDropPath, "its forward computes something else"),
        (WithTwoArguments, "its own forward could not be run for comparison: TypeError"),
        (WithTwoResults, "its forward returns 2 results, where a Tensor would be"),
    ],
)
def test_forks_that_compute_something_else_are_left(fork, reason):
    model = fork(2, drop_path=0.2)
    report = accelerate(model)
    assert report.accelerated == []
    assert report.left[""].startswith(reason)
    assert type(model) is fork


def test_a_model_that_returns_more_than_a_loss_is_left():
    model = LossAndPicture(Encoder(SwinTransformerBlock(0)))
    report = accelerate(model)
    assert report.left[""] == "its forward returns 2 results, where a Tensor would be"
    assert type(model) is LossAndPicture


def test_forks_that_compute_the_same_are_accelerated():
    fork = type("OurBlock", (SwinTransformerBlock,), {})
    assert_unchanged(randomised(fork(2)), call, modules=1, ops=1)


def test_any_layer_may_stand_for_q_k_and_v_of_swin():
    model = SwinTransformerBlock(2)
    model.attn.qkv = nn.Sequential(model.attn.qkv, nn.Tanh())
    assert_unchanged(randomised(model), call, modules=1, ops=1)


def test_comparing_draws_nothing_and_stores_nothing():
    model = two_blocks(SwinTransformerBlock, drop_path=0.5)
    stored = [dict(vars(module)) for module in model.modules()]
    before = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [vars(module) for module in model.modules()] == stored


def hook(module: nn.Module, arguments: object, output: Tensor) -> None:
    raise AssertionError("must not run while comparing")


def replaced_forward(model: nn.Module) -> None:
    model.forward = model.forward


def wrapped_projection(model: nn.Module) -> None:
    model.attn.qkv = nn.Sequential(model.attn.qkv)
    model.attn.qkv.weight = model.attn.qkv[0].weight


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.attn.register_forward_hook(hook), "its WindowAttentionV2 carries a hook"),
        (lambda model: model.attn.softmax.register_forward_pre_hook(hook), "its Softmax carries a hook"),
        (replaced_forward, "its forward was replaced on the object itself"),
        (wrapped_projection, "it holds a Sequential where a plain linear layer is expected"),
        (lambda model: setattr(model, "input_resolution", (8, 13)), "the window does not divide its grid"),
        (lambda model: model.to("meta"), "its weights are on the meta device"),
    ],
    ids=["hook", "pre-hook", "forward", "qkv", "grid", "meta"],
)
def test_obstacles_are_told(change, reason):
    model = SwinTransformerV2Block(0)
    change(model)
    report = accelerate(model)
    assert report.accelerated == []
    assert report.left[""].startswith(reason)


def test_a_hook_of_later_is_called():
    model = two_blocks(SwinTransformerBlock)
    accelerate(model, backend="native")
    seen = []
    handle = model[0].attn.register_forward_hook(lambda module, arguments, output: seen.append(module))
    assert forward_calls(lambda: call(model)) == 1
    assert seen == [model[0].attn]
    handle.remove()
    assert forward_calls(lambda: call(model)) == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated(duplicate):
    model = two_blocks(SwinTransformerBlock)
    accelerate(model, backend="native")
    twin = duplicate(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert forward_calls(lambda: call(twin)) == 2
    assert_same(results(twin, call), results(model, call))
    accelerate(twin, undo=True)
    assert [type(block) for block in twin] == [SwinTransformerBlock] * 2
    assert forward_calls(lambda: call(model)) == 2


def test_weights_pass_both_ways():
    plain, fast = two_blocks(SwinTransformerBlock), two_blocks(SwinTransformerBlock)
    accelerate(fast)
    randomised(plain, seed=3)
    fast.load_state_dict(plain.state_dict(), strict=True)
    assert_same(results(fast, call), results(plain, call))
    plain.load_state_dict(fast.state_dict(), strict=True)


@each_block
def test_compiles_into_one_graph(block):
    model = two_blocks(block)
    wanted = results(model, call)
    accelerate(model, backend="native")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    got = results(model, lambda _: compiled(tokens()))
    assert counter.frame_count == 1
    assert_same(got, wanted)


@each_block
def test_autocast_errs_no_more_than_before(block):
    model = two_blocks(block)
    exact = results(model, call)
    own = model.float()
    fast = copy.deepcopy(own)
    accelerate(fast, backend="native")

    def mixed(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(model, torch.float32)

    got, wanted = results(fast, mixed), results(own, mixed)
    for name, tensor in exact.items():
        assert got[name].dtype == wanted[name].dtype
        error, allowed = ((result[name].double() - tensor).norm() for result in (got, wanted))
        assert error <= 3 * allowed, name


@each_block
def test_activation_checkpointing(block):
    model = two_blocks(block, drop_path=0.4)
    wanted = results(model, call)
    accelerate(model, backend="native")

    def by_checkpoints(blocks: nn.Sequential) -> Tensor:
        x = tokens().requires_grad_()
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    assert_same(results(model, by_checkpoints), wanted)


def test_again_and_with_another_backend():
    model = two_blocks(SwinTransformerBlock)
    assert accelerate(model, backend="native").accelerated == ["0", "1"]
    assert accelerate(model, backend="native").accelerated == ["0", "1"]
    assert forward_calls(lambda: call(model)) == 2
    assert accelerate(model, backend="reference").accelerated == ["0", "1"]
    assert forward_calls(lambda: call(model)) == 0
    assert accelerate(model, undo=True).restored == ["0", "1"]
    assert [type(block) for block in model] == [SwinTransformerBlock] * 2
    assert accelerate(model, undo=True).restored == []


def test_undo_does_not_touch_a_class_that_was_changed_again():
    model = two_blocks(SwinTransformerBlock)
    accelerate(model)
    wrapped = type("Sharded", (type(model[0]),), {})
    model[0].__class__ = wrapped
    assert accelerate(model).left == {"0": "it is accelerated already, and its class was changed again, to Sharded"}
    report = accelerate(model, undo=True)
    assert report.restored == ["1"]
    assert report.left == {"0": "its class was changed again, to Sharded: undo that first"}
    assert type(model[0]) is wrapped


def test_the_report_lists_what_is_not_known():
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([SwinTransformerBlock(0), Scaled(2), Scaled(0), Scaled(2), Scaled(0)]),
            "other": nn.TransformerEncoderLayer(8, 2),
            "ours": simmim_fast.create_model("vit", img_size=32, embed_dim=8, depth=1, num_heads=1),
            "norm": nn.LayerNorm(8),
        }
    )
    report = accelerate(model)
    assert report.accelerated == ["blocks.0"]
    assert report.left["other.self_attn"] == "MultiheadAttention has none of the forms that are known"
    assert report.left["ours"] == "it is of simmim_fast, and calls the fused ops already"
    assert set(report.left) == {"blocks.1", "blocks.2", "blocks.3", "blocks.4", "other.self_attn", "ours"}
    text = str(report).splitlines()
    assert text[:2] == ["accelerated: 1", "left as they are: 6"]
    assert "  left: blocks.1, blocks.2, blocks.3 and 1 more: its forward computes something else" in text


def mixer(heads: str, *projections: str) -> nn.Module:
    """A module without a telling name."""
    module = nn.Module()
    setattr(module, heads, 2)
    for name in projections:
        setattr(module, name, nn.Linear(4, 4))
    return module


@pytest.mark.parametrize(
    "module",
    [
        mixer("num_heads", "qkv"),
        mixer("heads", "to_q", "to_kv"),
        mixer("num_attention_heads", "query", "key", "value"),
        mixer("n_heads", "q_proj", "k_proj", "v_proj"),
    ],
)
def test_attention_of_another_name_is_listed(module):
    report = accelerate(nn.ModuleDict({"mixer": module, "mlp": mixer("num_heads", "fc1", "fc2")}))
    assert report.left == {"mixer": "Module has none of the forms that are known"}


def test_positions_that_are_no_attention_are_not_listed():
    shared = nn.Module()
    shared.relative_position_bias_table = nn.Parameter(torch.zeros(18, HEADS))
    assert accelerate(nn.ModuleDict({"rel_pos_bias": shared, "attn": ViTAttention(biased=False)})).left == {}


def test_a_model_that_is_named_for_its_attention_is_looked_into():
    model = type("AttentionModel", (nn.Module,), {})()
    model.block, model.other = SwinTransformerBlock(0), nn.MultiheadAttention(4, 1)
    report = accelerate(model)
    assert report.accelerated == ["block"]
    assert set(report.left) == {"other"}


@pytest.mark.parametrize("encoder", ["swin", "swinv2", "vit"])
@pytest.mark.parametrize("derived", [False, True], ids=["ours", "of a derived class"])
def test_says_of_our_models_which_ops_they_call(encoder, derived):
    sizes = {"embed_dim": 8, "img_size": 32, "num_heads": 1 if encoder == "vit" else (1, 1)}
    sizes |= {"depth": 1} if encoder == "vit" else {"depths": (1, 1), "window_size": 4}
    for backend, reason in {
        "auto": "it is of simmim_fast, and calls the fused ops already",
        "reference": 'it is of simmim_fast, built with backend="reference"',
    }.items():
        model = simmim_fast.create_model(encoder, backend=backend, **sizes)
        model.__class__ = type("Theirs", (type(model),), {}) if derived else type(model)
        report = accelerate(model)
        assert list(report.left) == [""]
        assert report.left[""].startswith(reason)
        assert report.accelerated == []


def test_their_encoder_in_our_simmim_is_accelerated():
    encoder = Encoder(SwinTransformerBlock(0))
    encoder.in_chans, encoder.patch_size = 3, 2
    model = simmim_fast.SimMIM(encoder, 2)
    report = accelerate(model)
    assert report.accelerated == ["encoder.blocks.0"]
    assert report.left == {"": "it is of simmim_fast, and calls the fused ops already"}


def test_names_and_texts_of_layers_stay():
    model = two_blocks(SwinTransformerBlock)
    accelerate(model)
    assert type(model[0]).__name__ == "SwinTransformerBlock"
    assert type(model[0]).__module__ == SwinTransformerBlock.__module__
    assert isinstance(model[0], SwinTransformerBlock)
    assert repr(model).count("accelerated") == 2


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        accelerate({})
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'nativ'; did you mean 'native'"):
        accelerate(nn.Identity(), backend="nativ")
