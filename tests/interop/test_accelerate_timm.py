"""accelerate on timm's Swin and Swin V2."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from simmim_fast import accelerate
from tests.interop.unchanged import assert_same, assert_unchanged, forward_calls, randomised, results

timm = pytest.importorskip("timm", reason="not run: timm is not installed (requirements-dev.txt pins it)")

NAMES = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]
each_model = pytest.mark.parametrize("name", NAMES, ids=["swin", "swinv2"])


def build(name: str, img_size: int | tuple[int, int], **options: object) -> nn.Module:
    """Two stages of two blocks with windows of 4 x 4, patches of 4 pixels."""
    sizes = {"img_size": img_size, "patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    return randomised(timm.create_model(name, **sizes, window_size=4, num_classes=3, **options))


def classify(img_size: tuple[int, int]):
    images = torch.randn(2, 3, *img_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return lambda model, dtype=torch.float64: model(images.to(dtype))


@each_model
@pytest.mark.parametrize(
    "img_size",
    [
        pytest.param((32, 48), id="whole windows"),
        pytest.param((28, 52), id="padded"),  # 7 x 13 tokens, then 4 x 7
        pytest.param((36, 20), id="padded by more than the shift"),  # 9 x 5, then 5 x 3
    ],
)
def test_outputs_are_unchanged(name, img_size):
    """timm rolls and then pads; where a shifted grid is padded, its roll is taken out and put back exactly."""
    report = assert_unchanged(build(name, img_size, drop_path_rate=0.3), classify(img_size), modules=4, ops=4)
    assert report.left == report.notes == {}


@each_model
def test_head_size_of_its_own_and_always_partition(name):
    options = {"always_partition": True} | ({"head_dim": 6} if name == NAMES[0] else {})
    assert_unchanged(build(name, 24, **options), classify((24, 24)), modules=4, ops=4)


def test_any_layer_may_stand_for_q_k_and_v_of_swin():
    """Such as one with low-rank additions: it is called, also for the padding."""
    model = build(NAMES[0], (28, 52))
    for block in (block for stage in model.layers for block in stage.blocks):
        block.attn.qkv = nn.Sequential(block.attn.qkv, nn.Tanh())
    assert_unchanged(model, classify((28, 52)), modules=4, ops=4)


@each_model
def test_images_of_any_size(name):
    """Masks are made at each call then."""
    assert_unchanged(build(name, 32, strict_img_size=False), classify((52, 28)), modules=4, ops=4)


@each_model
def test_a_new_size_is_set_afterwards(name):
    model, call = build(name, 32), classify((48, 80))
    accelerate(model, backend="native")
    own = copy.deepcopy(model)
    accelerate(own, undo=True)
    for each in (model, own):
        each.set_input_size((48, 80), window_size=(3, 5))
    assert_same(results(model, call), results(own, call))
    assert forward_calls(lambda: call(model)) == 4


@each_model
def test_a_mask_kept_for_another_grid_is_the_blocks_own_affair(name):
    model = build(name, 32)  # 8 x 8 tokens
    accelerate(model, backend="native")
    block = model.layers[0].blocks[1]
    assert forward_calls(lambda: block(torch.randn(1, 7, 6, 8, dtype=torch.float64))) == 1
    with pytest.raises(RuntimeError, match="shape"):
        block(torch.randn(1, 12, 12, 8, dtype=torch.float64))


@each_model
def test_dropout_runs_its_own_forward_in_training(name):
    model = build(name, 32, attn_drop_rate=0.1, proj_drop_rate=0.2)
    report = accelerate(model, backend="native")
    assert set(report.notes.values()) == {"in training it runs its own forward: its attention has dropout of 0.2"}
    call = classify((32, 32))
    assert forward_calls(lambda: call(model)) == 0
    assert forward_calls(lambda: call(model.eval())) == 4


@each_model
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated(name, duplicate):
    model, call = build(name, 32), classify((32, 32))
    accelerate(model, backend="native")
    twin = duplicate(model)
    assert forward_calls(lambda: call(twin)) == 4
    assert_same(results(twin, call), results(model, call))


@each_model
def test_compiles_into_one_graph_and_is_checkpointed(name):
    model, call = build(name, 28), classify((28, 28))
    wanted = results(model, call)
    accelerate(model, backend="native")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(results(model, lambda _: call(compiled)), wanted)
    model.set_grad_checkpointing()
    assert_same(results(model, call), wanted)


def test_other_attention_is_listed():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    report = accelerate(model)
    assert report.accelerated == []
    assert report.left == {"blocks.0.attn": "Attention has none of the forms that are known"}


def test_features_for_dense_prediction():
    sizes = {"img_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    model = randomised(timm.create_model(NAMES[0], features_only=True, out_indices=(0, 1), **sizes))

    def features(model: nn.Module, dtype: torch.dtype) -> Tensor:
        images = torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return torch.cat([feature.flatten(1) for feature in model(images.to(dtype))], dim=1)

    assert_unchanged(model, features, modules=4, ops=4)
