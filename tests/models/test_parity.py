"""The models against what the official code computes, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from simmim_fast import create_model
from simmim_fast.models import SwinTransformer, VisionTransformer
from tests import golden_data


@pytest.fixture(params=["reference", "native"])
def backend(request):
    return request.param


@pytest.fixture(params=golden_data.PARITY_CASES)
def golden(request, backend):
    tensors, case = golden_data.read_case(request.param)
    return tensors, case, golden_data.build_case(tensors, case, backend=backend)


def test_loss_equals_official(golden):
    tensors, case, model = golden
    loss = model(tensors["image"].double(), tensors["mask"])
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)


def test_every_gradient_equals_official(golden):
    tensors, _, model = golden
    model(tensors["image"].double(), tensors["mask"]).backward()
    expected = golden_data.with_prefix(tensors, "grad")
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert actual.keys() == expected.keys()
    errors = {name: golden_data.relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])


def test_features_and_reconstruction_equal_official(golden):
    tensors, _, model = golden
    images, mask = tensors["image"].double(), tensors["mask"]
    with torch.no_grad():
        assert golden_data.relative_error(model.encoder(images, mask), tensors["features"]) < 1e-5
        assert golden_data.relative_error(model.reconstruct(images, mask), tensors["reconstruction"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "classifier"), [("finetune_swin", SwinTransformer), ("finetune_vit", VisionTransformer)]
)
def test_classifier_logits_equal_official(name, classifier):
    tensors, case = golden_data.read_case(name)
    arguments = {k: v for k, v in case.items() if k not in ("encoder", "layer_norm_eps")}
    if "layer_norm_eps" in case:
        arguments |= {"qkv_bias": True, "use_abs_pos_emb": False}
        arguments["norm_layer"] = partial(torch.nn.LayerNorm, eps=case["layer_norm_eps"])
    model = classifier(**arguments).double().eval()
    golden_data.load_weights(model, golden_data.with_prefix(tensors, "weight"))
    with torch.no_grad():
        assert golden_data.relative_error(model(tensors["image"].double()), tensors["logits"]) < 1e-5


RELEASED = {
    "simmim_swin_base_192": "simmim_pretrain__swin_base__img192_window6",
    "simmim_swin_large_192": "simmim_pretrain__swin_large__img192_window12",
    "simmim_vit_base_224": "simmim_pretrain__vit_base__img224",
    "simmim_swinv2_base_192": "simmim_pretrain__swinv2_base__img192_window12",
}


@pytest.mark.parametrize("preset", RELEASED)
def test_state_dict_is_the_official_one(preset):
    official = golden_data.read_json("state_dict_keys")[RELEASED[preset]]
    with torch.device("meta"):
        model = create_model(preset)
    state = {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in model.state_dict().items()}
    assert state == official["state_dict"]
    assert list(state) == list(official["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == official["parameters"]
    assert sorted(model.no_weight_decay()) == official["no_weight_decay"]
    assert sorted(model.no_weight_decay_keywords()) == official["no_weight_decay_keywords"]
