"""Official checkpoints. The pickle is the official script's own; the weights around it are golden data's."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simmim_fast.interop import UnsafePickleError, load_official, read_checkpoint
from simmim_fast.models import SimMIM, build_simmim
from simmim_fast.models.official_config import read_official_config
from tests import golden_data

PICKLE = golden_data.FOLDER / "official_pretrain_swin.pkl"
SWIN = {"EMBED_DIM": 8, "DEPTHS": [1, 1, 2, 1], "NUM_HEADS": [1, 2, 4, 8], "WINDOW_SIZE": 4}
VIT = {"EMBED_DIM": 12, "DEPTH": 2, "NUM_HEADS": 2}
NORM_TARGET = {"ENABLE": True, "PATCH_SIZE": 7}
TINY: dict[str, dict[str, Any]] = {
    "swin": {"DATA": {"IMG_SIZE": 64}, "MODEL": {"TYPE": "swin", "SWIN": SWIN}},
    "swinv2": {
        "DATA": {"IMG_SIZE": 64},
        "MODEL": {"TYPE": "swinv2", "SWINV2": SWIN, "SIMMIM": {"NORM_TARGET": NORM_TARGET}},
    },
    "vit": {"DATA": {"IMG_SIZE": 64}, "MODEL": {"TYPE": "vit", "VIT": VIT}},
}


class StorageKeys(pickle.Unpickler):
    """Reads the official pickle, tensors replaced by (storage key, size), independently of the code under test."""

    def persistent_load(self, identifier: tuple[Any, ...]) -> str:
        return identifier[2]

    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_tensor_v2":
            return lambda key, offset, size, *rest: (key, size)
        if name == "CfgNode":
            return type(name, (dict,), {})
        return super().find_class(module, name)


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each pair of tokens, (N, N)."""
    rows, columns = torch.arange(window * window) // window, torch.arange(window * window) % window
    down = rows[:, None] - rows + window - 1
    right = columns[:, None] - columns + window - 1
    return down * (2 * window - 1) + right


def attention_mask(grid: int, window: int) -> Tensor:
    """-100 between tokens that the cyclic shift by half a window has brought together, (windows, N, N)."""
    side = grid * window
    band = torch.zeros(side)
    band[side - window :] = 1
    band[side - window // 2 :] = 2
    region = 3 * band[:, None] + band
    windows = region.reshape(grid, window, grid, window).transpose(1, 2).reshape(grid**2, window**2)
    return torch.where(windows[:, :, None] == windows[:, None], 0.0, -100.0)


def official_tensor(name: str, size: tuple[int, ...], weights: dict[str, Tensor]) -> Tensor:
    window = math.isqrt(size[-1])
    if name.endswith("relative_position_index"):
        return relative_position_index(window)
    if name.endswith("attn_mask"):
        return attention_mask(math.isqrt(size[0]), window)
    return weights[name]


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return golden_data.read_case("train_swin_window6_img96")


@pytest.fixture(scope="module")
def tensors(golden) -> dict[str, tuple[str, Tensor]]:
    """What belongs under each name of the official state dict, and in which storage."""
    weights = {name.removeprefix("weight."): value for name, value in golden[0].items() if name.startswith("weight.")}
    model = StorageKeys(PICKLE.open("rb")).load()["model"]
    return {name: (key, official_tensor(name, size, weights)) for name, (key, size) in model.items()}


@pytest.fixture(scope="module")
def official_file(tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "ckpt_epoch_0.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt_epoch_0/data.pkl", PICKLE.read_bytes())
        for key, value in tensors.values():
            archive.writestr(f"ckpt_epoch_0/data/{key}", value.contiguous().numpy().tobytes())
    return path


def save(path: Path, model: SimMIM, **entries: Any) -> Path:
    torch.save({"model": model.state_dict(), **entries}, path)
    return path


def test_official_file_loads_every_weight_and_buffer(official_file: Path, tensors) -> None:
    model = load_official(official_file)
    assert isinstance(model, SimMIM)
    assert model.training
    state = model.state_dict()
    assert list(state) == list(tensors)
    for name, (_, value) in tensors.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name
    assert "yacs" not in sys.modules


def test_official_file_gives_the_official_loss(official_file: Path, golden) -> None:
    arrays, case = golden
    model = load_official(official_file).double().eval()
    loss = model(arrays["images"].double(), arrays["masks"][0])
    assert loss.item() == pytest.approx(case["loss"][0], rel=1e-9)


def test_official_file_holds_its_configuration(official_file: Path) -> None:
    record = read_checkpoint(official_file)["config"]
    assert record.class_name == "yacs.config.CfgNode"
    config = read_official_config(record)
    assert (config.DATA.IMG_SIZE, config.MODEL.TYPE, config.MODEL.SWIN.WINDOW_SIZE) == (96, "swin", 6)
    assert config.MODEL.SWIN.DEPTHS == [2, 2, 2, 1]
    assert config.TRAIN.OPTIMIZER.BETAS == (0.9, 0.999)
    assert config.MODEL.SIMMIM.NORM_TARGET.ENABLE is False


@pytest.mark.parametrize("encoder", TINY)
def test_what_we_save_loads(tmp_path: Path, encoder: str) -> None:
    model = build_simmim(TINY[encoder])
    config = read_official_config(TINY[encoder])
    path = save(tmp_path / "ours.pth", model, config=config.to_dict())
    loaded = load_official(path)
    assert type(loaded.encoder) is type(model.encoder)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    without = save(tmp_path / "without.pth", model)
    assert torch.equal(load_official(without, config=TINY[encoder]).encoder.mask_token, model.encoder.mask_token)


def test_swinv2_keys_of_before_the_renaming_load(tmp_path: Path) -> None:
    model = build_simmim(TINY["swinv2"])
    old = {name.replace("cpb_mlp", "rpe_mlp"): value for name, value in model.state_dict().items()}
    assert old.keys() != model.state_dict().keys()
    torch.save({"model": old, "config": TINY["swinv2"]}, tmp_path / "old.pth")
    torch.testing.assert_close(load_official(tmp_path / "old.pth").state_dict(), model.state_dict(), rtol=0, atol=0)


class Bomb:
    """Creates `marker` when a pickle that holds it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("entry", ["config", "optimizer", "model"])
def test_nothing_is_executed(tmp_path: Path, entry: str) -> None:
    model = build_simmim(TINY["vit"])
    entries = {"model": model.state_dict(), "config": TINY["vit"], "optimizer": {"state": {}}}
    entries[entry] = {**entries[entry], "MODEL": Bomb(tmp_path / "marker")}
    torch.save(entries, tmp_path / "bomb.pth")
    with pytest.raises(UnsafePickleError, match=rf"bomb\.pth: the pickle asks for {os.name}\.system to be called"):
        load_official(tmp_path / "bomb.pth")
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.fixture(scope="module")
def tiny_weights() -> dict[str, Tensor]:
    return build_simmim(TINY["vit"]).state_dict()


def without(weights: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name not in names}


FAULTS = {
    "a list": (lambda weights: [weights], "an official checkpoint holds a dict, this one a list"),
    "a bare state dict": (lambda weights: weights, "no state dict under 'model', only the entries encoder.cls_token,"),
    "no config": (lambda weights: {"model": weights}, "no official configuration under 'config'; pass config="),
    "config of another script": (
        lambda weights: {"model": weights, "config": argparse.Namespace(model="vit")},
        "no official configuration under 'config'",
    ),
    "config of unknown keys": (
        lambda weights: {"model": weights, "config": {"MODEL": {"TYPE": "vit", "VIT": {"DEPHT": 2}}}},
        r"unknown key MODEL\.VIT\.DEPHT; did you mean 'MODEL\.VIT\.DEPTH'",
    ),
    "fine-tuned": (
        lambda weights: {"model": {"cls_token": weights["encoder.cls_token"], "head.weight": torch.zeros(2, 12)}},
        r"the weights of a fine-tuned classifier \(head\.\*\), expected encoder\.\* and decoder\.\*, got cls_token",
    ),
    "encoder only": (
        lambda weights: {"model": {"encoder.cls_token": weights["encoder.cls_token"]}},
        "no SimMIM weights, expected",
    ),
    "not tensors": (
        lambda weights: {"model": {**weights, "epoch": 3}},
        "the entries epoch of 'model' are not named tensors",
    ),
    "a missing key": (
        lambda weights: {"model": without(weights, "encoder.mask_token"), "config": TINY["vit"]},
        "do not fit the configuration: 1 missing: encoder.mask_token$",
    ),
    "an unknown key": (
        lambda weights: {"model": {**weights, "encoder.extra": torch.ones(1)}, "config": TINY["vit"]},
        "do not fit the configuration: 1 unknown: encoder.extra$",
    ),
    "another depth": (
        lambda weights: {"model": weights, "config": {"MODEL": {**TINY["vit"]["MODEL"], "VIT": {**VIT, "DEPTH": 1}}}},
        r"\d+ unknown: encoder\.blocks\.1\.\S+, .* and \d+ more",
    ),
    "another width": (
        lambda weights: {"model": {**weights, "encoder.mask_token": torch.ones(1, 1, 8)}, "config": TINY["vit"]},
        r"1 of another shape: encoder\.mask_token \(1, 1, 8\) for \(1, 1, 12\)$",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit(tmp_path: Path, tiny_weights: dict[str, Tensor], fault: str) -> None:
    contents, message = FAULTS[fault]
    torch.save(contents(OrderedDict(tiny_weights)), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=rf"file\.pth: .*{message}"):
        load_official(tmp_path / "file.pth")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "missing.pth")
