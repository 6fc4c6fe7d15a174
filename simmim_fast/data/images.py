"""Folders of images: a deterministic listing, a decoder that takes what users have, randomness keyed by the sample."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
MODES = {1: "L", 3: "RGB"}


class SampleKey(NamedTuple):
    """Names one sample of a run: file ``index``, seen in ``epoch`` of a run with ``seed``."""

    index: int
    epoch: int = 0
    seed: int = 0


class UnreadableImage(NamedTuple):
    """A file that could not be decoded, and why."""

    path: str
    reason: str


class Sample(NamedTuple):
    """One image; ``label`` and ``index`` are those of the file shown, which may be a replacement."""

    image: Tensor
    label: int
    index: int
    unreadable: tuple[UnreadableImage, ...]


class Batch(NamedTuple):
    """Samples stacked: images (B, C, H, W), labels and indices (B,) int64, and every unreadable file met."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    unreadable: Sequence[UnreadableImage]


class ImageFolder(Dataset[Sample]):
    """All images below a folder, at any depth, with or without class sub-folders.

    Files count by extension, in any case; hidden files and folders (leading dot) do not. The order is that of
    ``torchvision.datasets.ImageFolder``: by first sub-folder, then folder, then name.

    An unreadable file is replaced by another one that the sample's own generator picks, and reported in
    ``Sample.unreadable``. The transform draws from torch's default CPU generator, which is seeded by the sample's key
    for the call and restored after it: the result depends on the key alone, not on the worker or on earlier samples.

    Args:
        root: The folder.
        transform: Maps the decoded Pillow image to a tensor.
        channels: 3 decodes to RGB, 1 to grayscale.

    Attributes:
        classes: Names of the sub-folders of ``root`` that hold images, sorted.
        labels: (N,) int64 index into ``classes`` per file; -1 for a file directly in ``root``.

    Raises:
        ValueError: ``root`` is missing, not a folder, or cannot be listed; it holds no image, or none that can be read;
            ``channels`` is neither 1 nor 3.
    """

    def __init__(
        self, root: str | os.PathLike[str], transform: Callable[[Image.Image], Tensor], *, channels: int = 3
    ) -> None:
        if channels not in MODES:
            raise ValueError(f"channels: expected 3 (RGB) or 1 (grayscale) for a folder of images, got {channels!r}")
        self.root = os.fspath(root)
        self.transform = transform
        self.channels = channels
        paths = _list_images(self.root)
        folders = [path.partition(os.sep)[0] if os.sep in path else None for path in paths]
        self.classes = tuple(sorted({folder for folder in folders if folder is not None}))
        label = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array([label.get(folder, -1) for folder in folders], dtype=np.int64)
        # One buffer instead of millions of strings: forked workers share it, as no reference count is ever written.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._first_readable(range(len(self)))  # a folder without any fails here, not in a worker

    def path(self, index: int) -> str:
        """Returns the path of one file, ``root`` included."""
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, key: int | SampleKey) -> Sample:
        """Loads one sample; an integer is its index, in epoch 0 of seed 0.

        Raises:
            IndexError: The index is out of range.
            ValueError: No file of the folder can be read any more.
        """
        key = SampleKey(int(key)) if isinstance(key, Integral) else key
        if not 0 <= key.index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {key.index}")
        image, index, unreadable = self._first_readable(self._candidates(key))
        with _seeded(stream_seed(key.seed, "augment", key.epoch, key.index)):
            return Sample(self.transform(image), int(self.labels[index]), index, unreadable)

    def _candidates(self, key: SampleKey) -> Iterator[int]:
        """Yields the file asked for, then all others in random order."""
        yield key.index
        random = np.random.default_rng(stream_seed(key.seed, "replace", key.epoch, key.index))
        yield from (int(index) for index in random.permutation(len(self)) if index != key.index)

    def _first_readable(self, indices: Iterable[int]) -> tuple[Image.Image, int, tuple[UnreadableImage, ...]]:
        """Returns the first image that can be read, its index, and the unreadable files before it."""
        unreadable = []
        for index in indices:
            path = self.path(index)
            try:
                return read_image(path, self.channels), index, tuple(unreadable)
            except Exception as error:  # Pillow's decoders raise nearly every type on malformed files
                unreadable.append(UnreadableImage(path, f"{type(error).__name__}: {error}"))
        examples = "".join(f"\n  {path}: {reason}" for path, reason in unreadable[:3])
        raise ValueError(
            f"root: expected at least one readable image below {self.root!r}, got {len(unreadable)} unreadable ones, "
            f"the first of them:{examples}"
        )


def read_image(path: str | os.PathLike[str], channels: int = 3) -> Image.Image:
    """Decodes a file completely, upright by its EXIF orientation, to RGB (3 channels) or grayscale (1 channel).

    16-bit images keep their upper 8 bits. Transparency is dropped, as in the official code. Of an animation the first
    frame counts.

    Raises:
        Exception: Whatever Pillow raises where the file is missing, truncated, no image, or above its limit of pixels.
        ValueError: Pixels are wider than 16 bits or floats, whose range no file states.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = _to_8_bit(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert(MODES[channels])


def stream_seed(seed: int, purpose: str, *key: int) -> int:
    """Derives the 64-bit seed of an independent random stream per purpose and key, such as (epoch, index).

    Raises:
        ValueError: ``seed`` or an entry of ``key`` is negative.
    """
    if min(seed, *key, 0) < 0:
        raise ValueError(f"seed and key: expected no negative number, got {seed} and {key}")
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *key))
    return int(sequence.generate_state(1, np.uint64)[0])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's default CPU generator alone: torch.manual_seed would reset the GPUs' generators as well."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scales grayscale of 16 bits, which Pillow would clip at 255, to 8 bits."""
    from PIL import Image

    pixels = np.asarray(image)
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 0xFFFF:
        span = f"{pixels.min()} to {pixels.max()}"
        raise ValueError(f"expected pixels of 8 or 16 bits, got mode {image.mode} with values from {span}")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _list_images(root: str) -> list[str]:
    """Lists the images below ``root`` by their paths relative to it."""
    if not os.path.isdir(root):
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"root: expected a folder of images, got {root!r}, which {problem}")
    try:
        paths = [path[len(os.path.join(root, "")) :] for path in _walk(root, frozenset())]
    except OSError as error:
        raise ValueError(f"root: expected a folder that can be listed, got {root!r}: {error}") from error
    if not paths:
        raise ValueError(
            f"root: expected at least one image at any depth below {root!r} with one of the extensions "
            f"{' '.join(EXTENSIONS)}, got none"
        )
    return sorted(paths, key=lambda path: (path.partition(os.sep)[0], *os.path.split(path)))


def _walk(folder: str, parents: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yields the image files below ``folder``; follows links, but not back into one of the folder's own parents."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from _walk(entry.path, parents | {identity})
            elif entry.name.lower().endswith(EXTENSIONS):
                yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or to where one may not look: unreadable as an image is
        return False
