"""The command line: what it does, and what it says when the input is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simmim_fast.cli import main
from simmim_fast.train import read_config

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
    assert read_config("printed.yaml") == replace(read_config("run.yaml"), out="other")
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


OPTS = ["--cfg", "official.yaml", "--opts", "DATA.DATA_PATH", "photos"]
FOUR = ["--mean", "[0.5, 0.5, 0.5, 0.5]", "--std", "[0.5, 0.5, 0.5, 0.5]"]
# What is added to a command line that works, and the message: name of the argument, what it must be, what came.
BAD = {
    "missing folder": (["--data", "nowhere"], "data: expected a folder .*'nowhere', which does not exist"),
    "empty folder": (["--data", "empty"], "data: expected at least one image .*'empty'.* got none"),
    "no image readable": (["--data", "broken"], "data: expected at least one readable image .*'broken', got 1 unr"),
    "out beneath a file": (
        ["--out", "run.yaml/x"],
        "out must be a folder.* got run.yaml/x, where .*run.yaml is a file",
    ),
    "unknown option": (["--epoch", "3"], "unknown option epoch; did you mean 'epochs'"),
    "unknown option of a group": (["--optimizer.betta", "3"], "unknown option .*betta; did you mean 'optimizer.betas'"),
    "no prefixes": (["--batch", "3"], "unknown option batch"),
    "unknown preset": (
        ["--model", "simmim_swin_bas_192"],
        "model must be one of .*; did you mean 'simmim_swin_base_192'",
    ),
    "unknown model argument": (
        ["--model_args.embed_dims", "8"],
        "model_args.embed_dims is no .*did you mean 'embed_dim'",
    ),
    "unknown choice": (
        ["--schedule.name", "cosinee"],
        "schedule.name must be one of .*'cosinee'; did you mean 'cosine'",
    ),
    "image size": (["--img_size", "30"], "img_size must be a multiple of the encoder's stride 8 .* got height 30"),
    "no image size": (["--img_size", "[32,0]"], r"img_size must be at least 1 on each side, got \(32, 0\)"),
    "cell and patch": (
        ["--mask_patch_size", "6"],
        r"mask_patch_size must be a multiple of model_patch_size \(4\), got 6",
    ),
    "cell and image": (["--mask_patch_size", "12"], r"img_size must be a multiple of mask_patch_size \(12\), got 32"),
    "ratio": (["--mask_ratio", "1.5"], "mask_ratio must be above 0 and at most 1, got 1.5"),
    "type": (["--epochs", "many"], "epochs must be an integer, got 'many'"),
    "type or none": (["--mean", "0.5"], "mean must be a list of numbers or None, got '0.5'"),
    "window": (["--model_args.window_size", "40"], "model_args.window_size must fit the grid .* 8 x 8, got 40 x 40"),
    "patch": (["--model_args.patch_size", "0"], "model_args.patch_size must be at least 1, got 0"),
    "depths": (["--model_args.depths", "3"], "model_args.depths must be a list of integers, got 3"),
    "width": (["--model_args.embed_dim", "abc"], "model_args.embed_dim must be an integer, got 'abc'"),
    "rate": (["--model_args.drop_path_rate", "3"], "model_args.drop_path_rate must be at least 0 and below 1, got 3"),
    "channels": (["--model_args.in_chans", "4", *FOUR], r"model_args.in_chans: expected 3 \(RGB\) or 1 .* got 4"),
    "unknown backend": (
        ["--model_args.backend", "nativ"],
        "model_args.backend must be one of .*; did you mean 'native'",
    ),
    "backend elsewhere": (["--model_args.backend", "triton"], ".*backend='triton' cannot run here: "),
    "batch larger than the folder": (["--batch_size", "64"], "batch_size: expected at most the 8 images .* got 64"),
    "update larger than an epoch": (["--accumulation_steps", "5"], "accumulation_steps must be at most 2, .* got 5"),
    "seed": (["--seed", "-1"], "seed must be at least 0, got -1"),
    "cuda": (["--device", "cuda"], "device must be cpu or auto on this machine.* got cuda"),
    "official file missing": (["--cfg", "nowhere.yaml"], ".*nowhere.yaml"),
    "opts without cfg": (["--opts", "TRAIN.EPOCHS", "3"], "--opts changes the file that --cfg names, got no --cfg"),
    "official key": ([*OPTS, "TRAIN.EPOCH", "3"], "opts: unknown key TRAIN.EPOCH; did you mean 'TRAIN.EPOCHS'"),
    "official encoder": ([*OPTS, "MODEL.TYPE", "swinn"], "MODEL.TYPE must be one of .*; did you mean 'swin'"),
    "official schedule": (
        [*OPTS, "TRAIN.LR_SCHEDULER.NAME", "poly"],
        r"schedule.name \(TRAIN.LR_SCHEDULER.NAME\) must be one of cosine, linear, step, multistep, got 'poly'",
    ),
    "official optimizer": (
        [*OPTS, "TRAIN.OPTIMIZER.NAME", "lamb"],
        r"optimizer.name \(TRAIN.OPTIMIZER.NAME\) must be one of adamw, sgd, got 'lamb'",
    ),
    "official size": (
        [*OPTS, "MODEL.SWIN.NUM_HEADS", "[0,1]"],
        r"model_args.num_heads \(MODEL.SWIN.NUM_HEADS\) must .* 0",
    ),
    "official resume": ([*OPTS, "MODEL.RESUME", "x.pth"], "MODEL.RESUME must stay at its default, .* got 'x.pth'"),
}


def assert_one_line(printed, pattern: str) -> None:
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.match(f"simmim-fast: error: {pattern}", printed.err), printed.err


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, folder, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken/x.jpg").write_bytes(b"not an image")
    arguments, pattern = BAD[case]
    start = ["--out", "run", "--device", "cpu"] if arguments[0] == "--cfg" else ["--config", "run.yaml"]
    before = sorted(folder.rglob("*"))
    assert main(["pretrain", *start, *arguments]) == 2
    assert_one_line(capsys.readouterr(), pattern)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "the command must be one of pretrain, reconstruct, info, got None"),
        (["pretrian"], "the command must be one of .* got 'pretrian'; did you mean 'pretrain'"),
        (["pretrain"], "data and out must be given"),
        (["pretrain", "--data", "photos"], "out must be given"),
        (["reconstruct", "run"], "images must be given"),
        (["info", "--jsn"], "unknown option jsn; did you mean 'json'"),
    ],
    ids=["nothing", "misspelt command", "no folders", "no out", "no images", "misspelt option"],
)
def test_incomplete_command_lines(arguments, pattern, folder, capsys):
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr(), pattern)


def test_out_must_be_writable(folder, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(folder))
    assert main(["pretrain", "--config", "run.yaml", "--out", "deep/run"]) == 2
    assert_one_line(capsys.readouterr(), f"out must lie where one may write, got deep/run, where {folder} is read-only")
    assert not (folder / "deep").exists()


def test_official_keys_without_effect_are_named(folder, capsys):
    assert main(["pretrain", "--out", "run", "--device", "cpu", *OPTS, "AUG.MIXUP", "0.5", "LOCAL_RANK", "1"]) == 0
    assert "without effect on pre-training: AUG.MIXUP, LOCAL_RANK\n" in capsys.readouterr().out


def test_the_picture_is_drawn_on_the_device_of_the_run(folder, monkeypatch):
    devices = []
    monkeypatch.setattr("simmim_fast.train.job.choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(
        "simmim_fast.report.run.choose_device", lambda name: devices.append(name) or torch.device("cpu")
    )
    assert main(["pretrain", "--config", "run.yaml", "--device", "cuda"]) == 0
    assert devices == ["cuda"]


# As if the packages were not installed: Python finds no module of these names.
WITHOUT_PACKAGES = """
import sys
sys.modules |= dict.fromkeys(["PIL", "rich", "torchvision", "matplotlib", "scipy", "triton"])
from simmim_fast.cli import main
codes = [main(["info"]), main(["pretrain", "--data", "photos", "--out", "run"]), main(["reconstruct", "run", "a.png"])]
assert codes == [0, 2, 2], codes
"""


def test_without_the_optional_packages(folder):
    result = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGES], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "substitute_mask_tokens" in result.stdout
    assert result.stderr.splitlines() == [
        f"simmim-fast: error: this needs {packages}: pip install 'simmim_fast[train]'"
        for packages in ("torchvision, PIL, rich, matplotlib", "torchvision, PIL, matplotlib")
    ]


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
    config = folder / "run/checkpoints/step-000002/config.yaml"
    config.write_text(config.read_text().replace("embed_dim: 8", "embed_dim: 8\n  backend: triton"))
    assert main(["reconstruct", "run", "photos/0.png"]) == 2
    assert_one_line(capsys.readouterr(), ".*backend='triton' cannot run here: ")
    assert not (folder / "reconstruction.png").exists()
