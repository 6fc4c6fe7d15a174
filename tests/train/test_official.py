"""Official configurations as ours: every option of the released files, and the keys that are refused or ignored."""

from __future__ import annotations

import pytest
import yaml

from simmim_fast.train import PretrainConfig
from simmim_fast.train.official import ignored_keys, official_names, read_official_options
from tests.official_files import FILES

ENCODER = {"patch_size": 4, "in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": True, "drop_rate": 0.0}
SWIN = {**ENCODER, "ape": False, "patch_norm": True, "use_checkpoint": False, "depths": [2, 2, 18, 2]}
OUR_SWIN = {**SWIN, "qk_scale": None, "drop_path_rate": 0.0, "norm_target": False, "norm_target_patch_size": 47}
MODEL_ARGS = {
    "simmim_swin_base_192": {**OUR_SWIN, "embed_dim": 128, "num_heads": [4, 8, 16, 32], "window_size": 6},
    "simmim_swin_large_192": {**OUR_SWIN, "embed_dim": 192, "num_heads": [6, 12, 24, 48], "window_size": 12},
    "simmim_swinv2_base_192": {
        **SWIN,
        "embed_dim": 128,
        "num_heads": [4, 8, 16, 32],
        "window_size": 12,
        "drop_path_rate": 0.1,
        "norm_target": True,
        "norm_target_patch_size": 47,
    },
    "simmim_vit_base_224": {
        **ENCODER,
        "patch_size": 16,
        "embed_dim": 768,
        "depth": 12,
        "num_heads": 12,
        "init_values": 0.1,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": False,
        "use_shared_rel_pos_bias": True,
        "use_mean_pooling": False,
        "drop_path_rate": 0.1,
        "norm_target": False,
        "norm_target_patch_size": 47,
    },
}
MODEL_ARGS["100 epochs"] = MODEL_ARGS["simmim_swin_base_192"]
COMMON = {
    "mask_patch_size": 32,
    "mask_ratio": 0.6,
    "batch_size": 128,
    "accumulation_steps": 1,
    "workers": 8,
    "precision": "bf16",
    "seed": 0,
    "clip_grad": 5.0,
    "print_freq": 100,
    "save_freq": 5,
    "optimizer.name": "adamw",
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": (0.9, 0.999),
    "optimizer.eps": 1e-8,
    "optimizer.momentum": 0.9,
    "schedule.warmup_epochs": 10,
    "schedule.decay_epochs": 30,
    "schedule.decay_rate": 0.1,
    "schedule.gamma": 0.1,
}
EPOCHS_800 = {
    "epochs": 800,
    "optimizer.base_lr": 1e-4,
    "schedule.name": "multistep",
    "schedule.multisteps": (700,),
    "schedule.warmup_lr": 5e-7,
    "schedule.min_lr": 5e-6,
}
EPOCHS_100 = {
    "epochs": 100,
    "optimizer.base_lr": 2e-4,
    "schedule.name": "cosine",
    "schedule.multisteps": (),
    "schedule.warmup_lr": 1e-6,
    "schedule.min_lr": 1e-5,
}


@pytest.fixture
def write(tmp_path):
    def write_yaml(content):
        path = tmp_path / "official.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write_yaml


@pytest.mark.parametrize("name", FILES)
def test_every_option_of_a_released_file(name, write):
    content = FILES[name]
    kind = content["MODEL"]["TYPE"]
    assert read_official_options(write(content)) == {
        **COMMON,
        **(EPOCHS_100 if name == "100 epochs" else EPOCHS_800),
        "out": f"output/simmim_pretrain/{content['TAG']}",
        "model": kind,
        "model_args": MODEL_ARGS[name],
        "img_size": 224 if kind == "vit" else 192,
        # The Swin repository, which alone pre-trains V2, starts the cosine after the warm-up.
        "schedule.warmup_prefix": kind == "swinv2",
    }
    assert ignored_keys(write(content)) == []


def test_the_defaults_are_the_released_recipe_of_100_epochs(write):
    config = PretrainConfig(data="photos", out="run")
    values = {**vars(config), "schedule.warmup_epochs": config.schedule.warmup(config.epochs)}
    values |= {f"optimizer.{name}": value for name, value in vars(config.optimizer).items()}
    values |= {f"schedule.{name}": value for name, value in vars(config.schedule).items() if name != "warmup_epochs"}
    options = read_official_options(write(FILES["100 epochs"]))
    ours = {"out", "model", "model_args", "img_size", "workers"}
    assert {name: values[name] for name in options if name not in ours} == {
        name: value for name, value in options.items() if name not in ours
    }


CHANGES = {
    "data": (["DATA.DATA_PATH", "photos"], {"data": "photos"}),
    "folder": (["OUTPUT", "runs", "TAG", "mine"], {"out": "runs/simmim_pretrain/mine"}),
    "no apex": (["AMP_OPT_LEVEL", "O0"], {"precision": "fp32"}),
    "no autocast": (["AMP_ENABLE", "False"], {"precision": "fp32"}),
    "no clipping": (["TRAIN.CLIP_GRAD", "0.0"], {"clip_grad": None}),
    "accumulation": (["TRAIN.ACCUMULATION_STEPS", "4"], {"accumulation_steps": 4}),
    "optimizer": (["TRAIN.OPTIMIZER.NAME", "SGD", "TRAIN.OPTIMIZER.MOMENTUM", "0.8"], {"optimizer.name": "sgd"}),
    "seed": (["SEED", "3"], {"seed": 3}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_opts_take_effect(change, write):
    opts, expected = CHANGES[change]
    assert read_official_options(write(FILES["100 epochs"]), opts).items() >= expected.items()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESUME", "ckpt.pth"),
        ("MODEL.PRETRAINED", "ckpt.pth"),
        ("PRETRAINED", "ckpt.pth"),
        ("TRAIN.START_EPOCH", "3"),
        ("EVAL_MODE", "True"),
        ("THROUGHPUT_MODE", "True"),
        ("DATA.ZIP_MODE", "True"),
    ],
)
def test_what_the_trainer_cannot_do_is_refused(key, value, write):
    with pytest.raises(ValueError, match=f"{key} must stay at its default, .*got '?{value}"):
        read_official_options(write({}), [key, value])


def test_changed_keys_without_effect_are_listed(write):
    opts = ["AUG.MIXUP", "0.5", "MODEL.VIT.DEPTH", "3", "DATA.PIN_MEMORY", "False", "TRAIN.EPOCHS", "7", "TAG", "x"]
    assert ignored_keys(write({}), opts) == ["DATA.PIN_MEMORY", "MODEL.VIT.DEPTH", "AUG.MIXUP"]


def test_checkpointing_is_without_effect_in_a_vit(write):
    assert ignored_keys(write({"MODEL": {"TYPE": "vit"}}), ["TRAIN.USE_CHECKPOINT", "True"]) == ["TRAIN.USE_CHECKPOINT"]


@pytest.mark.parametrize("kind", ["swin", "swinv2", "vit"])
def test_every_option_has_its_official_name(kind, write):
    path = write({"MODEL": {"TYPE": kind}})
    options = read_official_options(path, ["DATA.DATA_PATH", "photos"])
    arguments = options.pop("model_args")
    assert official_names(path).keys() >= {*options, *(f"model_args.{name}" for name in arguments)}


def test_an_unknown_encoder_is_answered_with_the_nearest(write):
    with pytest.raises(
        ValueError, match=r"MODEL.TYPE must be one of swin, swinv2, vit, got 'swinn'; did you mean 'swin'"
    ):
        read_official_options(write({"MODEL": {"TYPE": "swinn"}}))
