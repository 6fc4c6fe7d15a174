"""accelerate on Hugging Face's models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simmim_fast import accelerate
from tests.interop.unchanged import assert_same, assert_unchanged, forward_calls, randomised, results

transformers = pytest.importorskip(
    "transformers", reason="not run: transformers is not installed (requirements-dev.txt pins it)"
)

# Two stages of two blocks; windows of 4 x 4, patches of 2 pixels.
SWIN = {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "encoder_stride": 2}
VIT = {"patch_size": 8, "encoder_stride": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def swin(image_size: int = 32, attn_implementation: str = "sdpa", **options: object) -> transformers.SwinConfig:
    return transformers.SwinConfig(image_size=image_size, attn_implementation=attn_implementation, **(SWIN | options))


def swinv2(image_size: int = 32, **options: object) -> transformers.Swinv2Config:
    return transformers.Swinv2Config(image_size=image_size, **(SWIN | options))


def vit(attn_implementation: str = "sdpa", **options: object) -> transformers.ViTConfig:
    sizes = VIT | {"image_size": 32, "intermediate_size": 16} | options
    return transformers.ViTConfig(attn_implementation=attn_implementation, **sizes)


def images(size: tuple[int, int] = (32, 32), batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def last_state(size: tuple[int, int] = (32, 32)) -> Callable[..., Tensor]:
    return lambda model, dtype=torch.float64: model(images(size).to(dtype)).last_hidden_state


def masked_loss(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    patches = (model.config.image_size // model.config.patch_size) ** 2
    mask = torch.rand(2, patches, generator=torch.Generator().manual_seed(2)) < 0.6
    return model(images().to(dtype), bool_masked_pos=mask).loss


def one_stage(config: object) -> object:
    """The configuration with the stride of its encoder equal to the patch, which Hugging Face wants for the loss."""
    config.depths, config.num_heads, config.num_layers = [4], [2], 1
    return config


@pytest.mark.parametrize(
    ("build", "modules"),
    [
        pytest.param(
            lambda: transformers.SwinForMaskedImageModeling(one_stage(swin(drop_path_rate=0.3))), 4, id="swin"
        ),
        pytest.param(
            lambda: transformers.Swinv2ForMaskedImageModeling(one_stage(swinv2(drop_path_rate=0.3))), 4, id="swinv2"
        ),
        pytest.param(lambda: transformers.ViTForMaskedImageModeling(vit()), 2, id="vit"),
    ],
)
def test_masked_image_modelling_is_unchanged(build, modules):
    assert_unchanged(randomised(build()), masked_loss, modules=modules, ops=modules)


def encoders() -> list[pytest.param]:
    few = {"mlp_ratio": 2.0, "qkv_bias": True}
    base = {name: value for name, value in SWIN.items() if name != "encoder_stride"}
    kinds = {
        "swin": lambda: transformers.SwinModel(swin(**few)),
        "swinv2": lambda: transformers.Swinv2Model(swinv2(**few)),
        "no bias": lambda: transformers.SwinModel(swin(qkv_bias=False)),
        "maskformer": lambda: transformers.MaskFormerSwinModel(
            transformers.MaskFormerSwinConfig(image_size=32, **base)
        ),
        "donut": lambda: transformers.DonutSwinModel(transformers.DonutSwinConfig(image_size=32, **base)),
    }
    return [pytest.param(build, id=name) for name, build in kinds.items()]


@pytest.mark.parametrize("build", encoders())
@pytest.mark.parametrize("size", [pytest.param((32, 32), id="whole windows"), pytest.param((26, 36), id="padded")])
def test_encoders_are_unchanged(build, size):
    if isinstance(model := build(), transformers.Swinv2Model | transformers.SwinModel):
        model.config.image_size = size  # read by nothing but errors
    assert_unchanged(randomised(model), last_state(size), modules=4, ops=4)


def test_clap_is_unchanged():
    sizes = {"window_size": 4, "num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4]}
    sizes |= {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [2, 2], "num_attention_heads": [1, 2]}
    config = transformers.ClapAudioConfig(**sizes)
    spectrogram = torch.randn(2, 1, 256, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_unchanged(
        randomised(transformers.ClapAudioModel(config)).eval(),  # batch norm keeps statistics in training
        lambda model, dtype: model(spectrogram.to(dtype)).last_hidden_state,
        modules=4,
        ops=4,
    )


SEGMENTERS = {
    "Mask2Former": {"feature_size": 32, "mask_feature_size": 32},
    "OneFormer": {"conv_dim": 32, "mask_dim": 32, "text_encoder_width": 8, "text_encoder_num_layers": 1},
}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_on_swin_run_a_fused_backbone(name):
    """Which never clamps its windows to the grid."""
    backbone = swin(depths=[2, 2, 2, 2], num_heads=[1, 1, 1, 1], out_indices=[1, 2, 3, 4], image_size=64)
    small = {"hidden_dim": 32, "encoder_feedforward_dim": 8, "dim_feedforward": 8, "encoder_layers": 1}
    small |= {"decoder_layers": 2, "num_attention_heads": 2, "num_queries": 3}
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **SEGMENTERS[name], **small)
    model = getattr(transformers, f"{name}Model")(config).eval()
    encoder = randomised(model.pixel_level_module.encoder)
    pixels = images((60, 52), batch=1)
    wanted = encoder(pixels).feature_maps
    report = accelerate(model, backend="native")
    layers = "pixel_level_module.encoder.swin.encoder.layers"
    assert report.accelerated == [f"{layers}.{stage}.blocks.{block}" for stage in range(4) for block in range(2)]
    assert "none of the forms that are known" in str(report)
    assert forward_calls(lambda: encoder(pixels)) == 8
    for got, expected in zip(encoder(pixels).feature_maps, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_eager_attention_is_replaced_too():
    """Its softmax is in float32 in any dtype: in float64 the fused op is the more exact, so float32 is compared."""
    model = randomised(transformers.SwinModel(swin(attn_implementation="eager"))).float().eval()
    own = copy.deepcopy(model)
    assert len(accelerate(model, backend="native").accelerated) == 4
    call = last_state()
    torch.testing.assert_close(call(model, torch.float32), call(own, torch.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ask", ["call", "configuration"])
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: transformers.SwinModel(swin(attn_implementation="eager")), id="swin"),
        pytest.param(lambda: transformers.Swinv2Model(swinv2()), id="swinv2"),
        pytest.param(lambda: transformers.ViTModel(vit(attn_implementation="eager")), id="vit"),
    ],
)
def test_attention_weights_are_given_by_the_own_forward(build, ask):
    model = randomised(build()).eval()
    own = copy.deepcopy(model)
    accelerate(model, backend="native")
    assert forward_calls(lambda: model(images())) > 0
    if ask == "configuration":
        model.config.output_attentions = own.config.output_attentions = True
    options = {"output_attentions": True} if ask == "call" else {}
    got = []
    assert forward_calls(lambda: got.append(model(images(), **options))) == 0
    wanted = own(images(), **options)
    assert len(got[0].attentions) == len(wanted.attentions) > 0
    for ours, theirs in zip(got[0].attentions, wanted.attentions, strict=True):
        assert torch.equal(ours, theirs)


def test_hidden_states_are_recorded():
    model = randomised(transformers.SwinModel(swin())).eval()
    wanted = model(images(), output_hidden_states=True)
    accelerate(model, backend="native")
    got = model(images(), output_hidden_states=True)
    for states in ("hidden_states", "reshaped_hidden_states"):
        for ours, theirs in zip(getattr(got, states), getattr(wanted, states), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_mask_over_tokens_of_vit_runs_its_own_forward():
    model = randomised(transformers.ViTModel(vit())).eval()
    accelerate(model, backend="native")
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[:, 9:] = 0
    assert forward_calls(lambda: model(images())) == 2
    assert forward_calls(lambda: model(images(), attention_mask=mask)) == 0


def test_dropout_runs_its_own_forward_in_training():
    model = randomised(transformers.SwinModel(swin(attention_probs_dropout_prob=0.1))).train()
    report = accelerate(model, backend="native")
    assert set(report.notes.values()) == {"in training it runs its own forward: its attention has dropout of 0.1"}
    assert forward_calls(lambda: model(images())) == 0
    assert forward_calls(lambda: model.eval()(images())) == 4


def test_an_attention_that_was_chosen_stays():
    model = transformers.ViTModel(vit())
    model.config._attn_implementation = "flex_attention"
    assert set(accelerate(model).left.values()) == {"it was told to use the attention 'flex_attention'"}


def test_a_grid_smaller_than_the_window_is_refused_as_before():
    model = randomised(transformers.SwinModel(swin(image_size=12)))  # 6 x 6 tokens, then 3 x 3
    own = copy.deepcopy(model)
    report = accelerate(model, backend="native")
    assert len(report.accelerated) == 4
    with pytest.raises(RuntimeError) as theirs:
        own(images((12, 12)))
    with pytest.raises(RuntimeError) as ours:
        model(images((12, 12)))
    assert str(ours.value) == str(theirs.value)


def test_logit_factors_of_swinv2_that_may_show_its_other_mask():
    model = randomised(transformers.Swinv2Model(swinv2()))
    shifted = model.encoder.layers[1].blocks[1].attention.self
    with torch.no_grad():
        shifted.logit_scale[0] = 3.5
    report = accelerate(model, backend="native")
    reason = "its mask is -200 where the op's is -100: a logit factor of 33.1, above 22.6, may show it"
    assert report.left == {"encoder.layers.1.blocks.1": reason}
    assert list(report.notes) == ["encoder.layers.0.blocks.1"]
    accelerate(model, undo=True)
    assert len(accelerate(model.float(), backend="native").accelerated) == 3  # 33.1 is above 32.6, too
    with torch.no_grad():
        shifted.logit_scale[0] = 3.4
    assert len(accelerate(model, backend="native").accelerated) == 4


MODELS = [
    pytest.param(lambda: transformers.SwinModel(swin(drop_path_rate=0.3)), id="swin"),
    pytest.param(lambda: transformers.Swinv2Model(swinv2(drop_path_rate=0.3)), id="swinv2"),
    pytest.param(lambda: transformers.ViTModel(vit()), id="vit"),
]


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated(build, duplicate):
    model, call = randomised(build()), last_state()
    number = len(accelerate(model, backend="native").accelerated)
    twin = duplicate(model)
    assert forward_calls(lambda: call(twin)) == number
    assert_same(results(twin, call), results(model, call))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("build", MODELS)
def test_compiles_into_one_graph_and_is_checkpointed(build):
    model, call = randomised(build()), last_state((28, 36))
    if isinstance(model, transformers.ViTModel):
        call = last_state()
    model.train()
    wanted = results(model, call)
    accelerate(model, backend="native")
    model.gradient_checkpointing_enable()
    assert_same(results(model, call), wanted)
    model.gradient_checkpointing_disable()
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    torch.testing.assert_close(call(compiled), call(model), rtol=1e-10, atol=1e-10)


def test_save_and_load(tmp_path):
    model = randomised(transformers.SwinModel(swin()))
    accelerate(model, backend="native")
    model.save_pretrained(tmp_path)
    loaded = transformers.SwinModel.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="sdpa")
    assert type(loaded) is transformers.SwinModel
    call = last_state()
    torch.testing.assert_close(call(loaded.eval()), call(model.eval()), rtol=1e-10, atol=1e-10)
