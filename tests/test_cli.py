"""The command line: what it does, and what it says when the input is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from simmim_fast.cli import main

TINY = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
FAST = {"model": "swin", "model_args": TINY, "img_size": 32, "mask_patch_size": 8, "batch_size": 4, "epochs": 1}
FAST |= {"workers": 0, "device": "cpu", "precision": "fp32", "schedule": {"warmup_epochs": 0}, "print_freq": 1}
OFFICIAL = """
MODEL: {TYPE: swin, NAME: tiny, SWIN: {EMBED_DIM: 8, DEPTHS: [1, 1], NUM_HEADS: [1, 2], WINDOW_SIZE: 4}}
DATA: {IMG_SIZE: 32, MASK_PATCH_SIZE: 8, BATCH_SIZE: 4, NUM_WORKERS: 0}
TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 0}
AMP_OPT_LEVEL: O0
TAG: run
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working folder with eight photographs and a configuration for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"photos/{number}.png")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**FAST, "data": "photos", "out": "run"}))
    (tmp_path / "official.yaml").write_text(OFFICIAL)
    return tmp_path


def test_pretrain_then_reconstruct(folder, capsys):
    assert main(["pretrain", "--config", "run.yaml", "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "step 4/4" in out
    assert "images/s" in out
    assert "model " in out
    assert "mean visible colour" in out
    names = {path.name for path in (folder / "run").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints", "loss.png", "reconstruction.png"}
    assert main(["reconstruct", "run", "photos/0.png", "photos/1.png", "--out", "two.png"]) == 0
    with Image.open(folder / "two.png") as picture:
        assert picture.format == "PNG"


def test_official_configuration(folder):
    opts = ["DATA.DATA_PATH", "photos", "TRAIN.CLIP_GRAD", "1.0"]
    assert main(["pretrain", "--cfg", "official.yaml", "--opts", *opts, "--out", "run"]) == 0
    config = yaml.safe_load((folder / "run/config.yaml").read_text())
    assert config["clip_grad"] == 1.0
    assert config["precision"] == "fp32"
    assert config["model_args"]["embed_dim"] == 8


def test_the_printed_configuration_is_one(folder, capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--config", "run.yaml", "--out", "other", "--print_config"])
    (folder / "printed.yaml").write_text(capsys.readouterr().out)
    assert not (folder / "other").exists()
    assert main(["pretrain", "--config", "printed.yaml"]) == 0
    assert (folder / "other/metrics.jsonl").exists()


def test_official_files_belong_on_the_command_line(folder, capsys):
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text() + "cfg: official.yaml\n")
    assert main(["pretrain", "--config", "run.yaml"]) == 2
    assert "cfg and opts belong on the command line" in capsys.readouterr().err


def test_unreadable_images_are_counted_and_listed(folder, capsys):
    (folder / "photos/broken.jpg").write_bytes(b"not an image")
    assert main(["pretrain", "--config", "run.yaml", "--epochs", "2"]) == 0
    assert "1 images could not be read" in capsys.readouterr().out
    assert "broken.jpg" in (folder / "run/unreadable.txt").read_text()


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "torch" in json.dumps(facts)
    assert main(["info"]) == 0
    assert "substitute_mask_tokens" in capsys.readouterr().out


def test_help_has_a_line_for_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "share of the cells that are hidden" in text
    assert "peak learning rate" in text


BAD = {
    "missing folder": (["--data", "nowhere"], ["nowhere"]),
    "empty folder": (["--data", "empty"], ["empty"]),
    "no image readable": (["--data", "broken"], ["broken"]),
    "unknown option": (["--epoch", "3"], ["unknown option epoch", "did you mean epochs?"]),
    "no prefixes": (["--batch", "3"], ["unknown option batch"]),
    "unknown preset": (["--model", "simmim_swin_bas_192"], ["did you mean 'simmim_swin_base_192'"]),
    "unknown model argument": (["--model_args.embed_dims", "8"], ["embed_dims", "did you mean 'embed_dim'"]),
    "image size": (["--img_size", "30"], ["img_size", "8", "30"]),
    "cell and patch": (["--mask_patch_size", "6"], ["mask_patch_size", "6"]),
    "cell and image": (["--mask_patch_size", "12"], ["32", "12"]),
    "ratio": (["--mask_ratio", "1.5"], ["mask_ratio", "1.5"]),
    "type": (["--epochs", "many"], ["epochs", "many"]),
    "window": (["--model_args.window_size", "40"], ["window_size", "40"]),
    "batch larger than the folder": (["--batch_size", "64"], ["batch_size", "64"]),
    "official file missing": (["--cfg", "nowhere.yaml"], ["nowhere.yaml"]),
    "official key": (["--cfg", "official.yaml", "--opts", "TRAIN.EPOCH", "3"], ["TRAIN.EPOCH", "EPOCHS"]),
    "opts without cfg": (["--opts", "TRAIN.EPOCHS", "3"], ["--cfg"]),
    "cuda": (["--device", "cuda"], ["device", "cuda"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, folder, capsys):
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken/x.jpg").write_bytes(b"not an image")
    arguments, words = BAD[case]
    before = sorted(folder.rglob("*"))
    assert main(["pretrain", "--config", "run.yaml", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("simmim-fast: error: ")
    assert printed.err.count("\n") == 1
    assert not [word for word in words if word not in printed.err], printed.err
    assert sorted(folder.rglob("*")) == before


def test_a_run_is_not_overwritten(folder, capsys):
    assert main(["pretrain", "--config", "run.yaml"]) == 0
    metrics = (folder / "run/metrics.jsonl").read_text()
    assert main(["pretrain", "--config", "run.yaml"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "run/metrics.jsonl").read_text() == metrics
    assert main(["pretrain", "--config", "run.yaml", "--overwrite"]) == 0


def test_reconstruct_refuses(folder, capsys):
    assert main(["reconstruct", "nowhere", "photos/0.png"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["pretrain", "--config", "run.yaml"]) == 0
    (folder / "bad.jpg").write_bytes(b"not an image")
    capsys.readouterr()
    assert main(["reconstruct", "run", "bad.jpg"]) == 2
    assert "bad.jpg" in capsys.readouterr().err
    assert not (folder / "reconstruction.png").exists()
