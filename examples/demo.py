"""Pre-train a small Swin on real photographs, on the CPU, in a few minutes: `make demo`.

The photographs are those that scikit-image and scikit-learn carry in their packages. Crops of the left two thirds of
each are written to a folder of images, and training takes the road of any user's folder. The right third of each is
held out: the reconstruction picture shows parts of the photographs that the model never saw.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from pathlib import Path

import skimage.data
import sklearn.datasets
import torch
from PIL import Image

from simmim_fast.report import plot_run, reconstruct_images
from simmim_fast.train import OptimizerConfig, PretrainConfig, ScheduleConfig, pretrain

RUN = Path("runs/demo")
TRAIN, HELD_OUT = RUN / "photographs/train", RUN / "photographs/held_out"
PICTURE = RUN / "reconstruction.png"

FOLDERS = (Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images")
PHOTOGRAPHS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "china.jpg", "flower.jpg"),
    *("hubble_deep_field.jpg", "ihc.png", "retina.jpg", "brick.png", "grass.png", "gravel.png", "coins.png"),
)
SHOWN = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "china.jpg",
    "flower.jpg",
    "coins.png",
)
CROPS, SMALLEST_CROP, CROP_SIZE = 48, 96, 128
TRAINED_SHARE = 2 / 3
MULTIPLIES_BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)  # without that, fp32 is faster

CONFIG = PretrainConfig(
    data=str(TRAIN),
    out=str(RUN),
    model="swin",
    model_args={"embed_dim": 48, "depths": [2, 2, 4], "num_heads": [3, 6, 12], "window_size": 6, "drop_path_rate": 0.0},
    img_size=96,
    mask_patch_size=8,  # an image has 12 x 12 cells, as one of 192 pixels has with cells of 16
    batch_size=32,
    epochs=24,
    precision="bf16" if MULTIPLIES_BF16 else "fp32",
    device="cpu",
    workers=0,
    optimizer=OptimizerConfig(lr=2e-3),
    schedule=ScheduleConfig(warmup_epochs=1, warmup_lr=1e-4, min_lr=1e-5),
    print_freq=20,
    save_freq=1000,
)


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(RUN / "photographs", ignore_errors=True)
    count = write_photographs(random.Random(0))
    print(f"{count} crops of {len(PHOTOGRAPHS)} photographs in {TRAIN}, their right thirds in {HELD_OUT}")
    checkpoint = pretrain(CONFIG, overwrite=True)
    plot_run(RUN)
    shown = [HELD_OUT / Path(name).with_suffix(".png") for name in SHOWN]
    result = reconstruct_images(checkpoint, shown, PICTURE, title="Parts of the photographs that the model never saw")
    print(f"{result.summary()}\n{RUN}: metrics.jsonl, {checkpoint.relative_to(RUN)}, loss.png, {PICTURE.name}")
    print(f"{time.monotonic() - started:.0f} s")


def write_photographs(rng: random.Random) -> int:
    """Writes training crops and held-out parts; returns the number of crops."""
    TRAIN.mkdir(parents=True)
    HELD_OUT.mkdir()
    for name in PHOTOGRAPHS:
        photograph = open_photograph(name)
        width, height = photograph.size
        border = int(width * TRAINED_SHARE)
        known = photograph.crop((0, 0, border, height))
        for number in range(CROPS):
            random_crop(known, rng).save(TRAIN / f"{Path(name).stem}-{number:02d}.jpg", quality=95)
        side = min(width - border, height)
        top = (height - side) // 2
        unseen = photograph.crop((border, top, border + side, top + side))
        unseen.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.LANCZOS).save(HELD_OUT / f"{Path(name).stem}.png")
    return CROPS * len(PHOTOGRAPHS)


def open_photograph(name: str) -> Image.Image:
    path = next(folder / name for folder in FOLDERS if (folder / name).exists())
    return Image.open(path).convert("RGB")


def random_crop(photograph: Image.Image, rng: random.Random) -> Image.Image:
    """A square crop, its side drawn evenly on a logarithmic scale, at CROP_SIZE pixels."""
    width, height = photograph.size
    side = int(math.exp(rng.uniform(math.log(SMALLEST_CROP), math.log(min(width, height)))))
    left, top = rng.randint(0, width - side), rng.randint(0, height - side)
    crop = photograph.crop((left, top, left + side, top + side))
    return crop.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
