"""Photographs that packages carry with them, those of examples/demo.py: real images without a download."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.measure import Absent
from benchmarks.results import ROOT
from simmim_fast.data import pretrain_transform

CROPPED_SHARE = (0.05, 0.5)  # least and greatest area of a crop


def crops(img_size: tuple[int, int], count: int, seed: int = 0) -> Tensor:
    """(count, 3, H, W) float32: augmented crops of the photographs in turn, normalised as the trainer's images.

    Raises:
        Absent: scikit-image, scikit-learn, Pillow or torchvision is not installed.
    """
    demo = _demo()
    transform = pretrain_transform(img_size, scale=CROPPED_SHARE)
    photographs = [demo.open_photograph(name) for name in demo.PHOTOGRAPHS]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.stack([transform(photographs[i % len(photographs)]) for i in range(count)])


def write_jpegs(folder: Path, count: int, shorter_side: int | None, seed: int = 0) -> None:
    """Write photographs as JPEG files: large parts of them at their own size, or shrunk to a shorter side.

    Args:
        folder: Where; it exists.
        count: Files.
        shorter_side: In pixels; None leaves the size.
        seed: Of the parts.

    Raises:
        Absent: As `crops`.
    """
    from PIL import Image, ImageOps

    demo, rng = _demo(), random.Random(seed)
    photographs = [demo.open_photograph(name) for name in demo.PHOTOGRAPHS]
    for number in range(count):
        image = photographs[number % len(photographs)]
        left, top = (rng.randrange(1 + side // 8) for side in image.size)
        image = image.crop((left, top, *image.size))
        if shorter_side is not None:
            factor = shorter_side / min(image.size)
            size = tuple(round(factor * side) for side in image.size)
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        image.save(folder / f"{number:05d}.jpg", quality=90)


def _demo() -> ModuleType:
    for package in ("skimage", "sklearn", "PIL", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise Absent(f"the photographs need the package {package}, which is not installed")
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
