"""The update and the loop: the official trajectory, accumulation, what a run leaves behind."""

from __future__ import annotations

import json
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from simmim_fast.train import (
    GraphedStep,
    Job,
    OptimizerConfig,
    PretrainConfig,
    ScheduleConfig,
    load_checkpoint,
    loop,
    prepare,
    pretrain,
    train,
    train_step,
)
from simmim_fast.train.run import RunFolder
from tests import golden_data

TINY = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "drop_path_rate": 0.0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven images in two folders, one of them broken."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(10):
        folder = root / f"label{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (root / "label0" / "broken.jpg").write_bytes(b"not an image")
    return root


def tiny_config(photos, out, **overrides) -> PretrainConfig:
    settings = {
        "model": "swin",
        "model_args": TINY,
        "img_size": 32,
        "mask_patch_size": 8,
        "batch_size": 4,
        "epochs": 2,
        "precision": "fp32",
        "device": "cpu",
        "workers": 0,
        "optimizer": OptimizerConfig(lr=1e-3),
        "schedule": ScheduleConfig(warmup_epochs=0),
        "print_freq": 1,
    }
    return PretrainConfig(data=str(photos), out=str(out), **{**settings, **overrides})


class GoldenUpdates:
    """The golden run's images and masks, one micro-batch an update, as `UpdateStream` has them."""

    def __init__(self, images, masks, per_epoch):
        self.images, self.masks, self.per_epoch = images, masks, per_epoch
        self.unreadable = {}

    def __len__(self):
        return len(self.masks)

    def __iter__(self):
        return ([(self.images, mask)] for mask in self.masks)


class RecordingFolder(RunFolder):
    """Keeps the rows as they are, besides writing them with six digits."""

    def write(self, row):
        vars(self).setdefault("rows", []).append(row)
        super().write(row)


def golden_job(out) -> tuple[Job, dict]:
    tensors, case = golden_data.read_case("train_swin_window6_img96")
    text = case["schedule"]
    number = {key: float(re.search(rf"{key} ([\d.e-]+)", text)[1]) for key in ("base", "warmup", "min")}
    epochs, per_epoch = (int(re.search(rf"(\d+) {key}", text)[1]) for key in ("epochs", "iters per epoch"))
    images = tensors["images"].double()
    rate_for_512 = 512 / len(images)
    config = PretrainConfig(
        data="golden",
        out=str(out),
        batch_size=len(images),
        epochs=epochs,
        precision="fp32",
        clip_grad=case["clip_grad"],
        optimizer=OptimizerConfig(base_lr=number["base"] * rate_for_512, weight_decay=0.05),
        schedule=ScheduleConfig(
            warmup_epochs=1, warmup_lr=number["warmup"] * rate_for_512, min_lr=number["min"] * rate_for_512
        ),
        print_freq=1,
    )
    model = golden_data.build_case(tensors, case, backend="reference")
    return Job(config, RecordingFolder(config), None, model, GoldenUpdates(images, tensors["masks"], per_epoch)), case


def test_the_run_equals_the_official_one(tmp_path):
    job, case = golden_job(tmp_path)
    train(job)
    rows = job.folder.rows
    assert [row["step"] for row in rows] == list(range(1, case["steps"] + 1))
    assert [row["lr"] for row in rows] == pytest.approx(case["lr"], rel=1e-14)
    assert [row["loss"] for row in rows] == pytest.approx(case["loss"], rel=1e-7)
    assert [row["grad_norm"] for row in rows] == pytest.approx(case["grad_norm"], rel=1e-7)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in written] == pytest.approx(case["loss"], rel=1e-5)


def test_the_run_clips_the_gradient_as_asked(photos, tmp_path):
    optimizer = OptimizerConfig(name="sgd", lr=1.0, weight_decay=0.0, momentum=0.5)
    job = prepare(tiny_config(photos, tmp_path, clip_grad=1e-3, optimizer=optimizer, print_freq=100))
    before = [parameter.detach().double() for parameter in job.model.parameters()]
    train(job)
    moved = torch.nn.utils.get_total_norm([p.double() - q for p, q in zip(job.model.parameters(), before, strict=True)])
    # Nesterov with momentum 0.5 goes at most twice as far as the clipped gradients together.
    assert 0 < moved.item() < 2 * 1e-3 * len(job.updates)


def test_the_run_replays_a_graph_where_asked(photos, tmp_path, monkeypatch):
    built, seen = [], []

    class Recorder(GraphedStep):
        def __init__(self, *args: object, **options: object):
            built.append(options)
            super().__init__(*args, **options)

        def __call__(self, *inputs: torch.Tensor):
            seen.append(len(inputs))
            return super().__call__(*inputs)

    monkeypatch.setattr(loop, "GraphedStep", Recorder)
    plain = losses(photos, tmp_path / "plain", batch_size=2, accumulation_steps=2)
    assert built == []
    options = {"batch_size": 2, "accumulation_steps": 2, "clip_grad": 3.0, "cuda_graph": True}
    assert losses(photos, tmp_path / "graph", **options) == pytest.approx(plain, rel=1e-2)
    assert built == [{"clip_grad": 3.0, "precision": "fp32"}]
    assert seen == [4] * len(plain)  # two pairs of images and mask an update


def test_the_run_goes_through_the_compiled_model(photos, tmp_path, monkeypatch):
    compiled, seen = [], []

    def compile_model(model):
        compiled.append(model)
        return lambda images, mask: seen.append(mask) or model(images, mask)

    monkeypatch.setattr(torch, "compile", compile_model)
    pretrain(tiny_config(photos, tmp_path / "plain"))
    assert (compiled, seen) == ([], [])
    job = prepare(tiny_config(photos, tmp_path / "compiled", compile=True))
    train(job)
    assert compiled == [job.model]
    assert len(seen) == len(job.updates)


def test_a_run_leaves_metrics_checkpoint_and_names_of_bad_images(photos, tmp_path):
    out = tmp_path / "run"
    checkpoint = pretrain(tiny_config(photos, out))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) >= {"epoch", "loss", "lr", "grad_norm", "images_per_second", "seconds", "unreadable"}
    assert rows[-1]["unreadable"] == 1
    assert "broken.jpg" in (out / "unreadable.txt").read_text()
    assert checkpoint == out / "checkpoints/step-000004"
    assert {path.name for path in checkpoint.iterdir()} == {"model.safetensors", "config.yaml", "state.json"}
    model = load_checkpoint(out)
    assert not model.training
    assert torch.isfinite(model(torch.randn(1, 3, 32, 32), torch.ones(1, 8, 8, dtype=torch.bool)))


def losses(photos, out, **overrides) -> list[float]:
    pretrain(tiny_config(photos, out, **overrides))
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_same_seed_same_run_whatever_the_workers_and_the_split(photos, tmp_path):
    plain = losses(photos, tmp_path / "a")
    assert losses(photos, tmp_path / "b", workers=1) == plain
    assert losses(photos, tmp_path / "c", batch_size=2, accumulation_steps=2) == pytest.approx(plain, rel=1e-4)
    assert losses(photos, tmp_path / "d", seed=1) != plain


def test_bf16_run(photos, tmp_path):
    assert losses(photos, tmp_path / "a", precision="bf16") == pytest.approx(losses(photos, tmp_path / "b"), rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run(photos, tmp_path):
    config = tiny_config(photos, tmp_path / "run", optimizer=OptimizerConfig(lr=1e30), clip_grad=None, epochs=4)
    with pytest.raises(FloatingPointError, match=r"step \d+: expected a finite loss and gradient"):
        pretrain(config)
    assert "broken.jpg" in (tmp_path / "run/unreadable.txt").read_text()


def test_only_the_newest_checkpoints_stay(photos, tmp_path):
    pretrain(tiny_config(photos, tmp_path / "run", epochs=4, save_freq=1, keep=2))
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000006", "step-000008"]


def test_a_folder_with_a_run_is_refused_unless_overwritten(photos, tmp_path):
    config = tiny_config(photos, tmp_path / "run")
    pretrain(config)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="out must be a folder without a run, or --overwrite be given"):
        pretrain(config)
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    pretrain(config, overwrite=True)


def test_ctrl_c_completes_the_update_and_saves(photos, tmp_path, monkeypatch):
    def step_then_press(*args: object, **kwargs: object):
        signal.raise_signal(signal.SIGINT)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step_then_press)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"after update 1 of 4; checkpoint: .*step-000001"):
        pretrain(tiny_config(photos, tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]
    state = json.loads((tmp_path / "run/checkpoints/step-000001/state.json").read_text())
    assert (state["step"], state["epoch"], state["seed"]) == (1, 0.5, 0)
    load_checkpoint(tmp_path / "run")
