"""Images a second of the input pipeline: where they lie, what decodes them, how many processes load them.

    python -m benchmarks.loader --sources full resized --decoders pillow torchvision --workers 0 2

The tests of the data pipeline run first. Settings take turns, a stretch of batches each, so that drift hits all of
them; the start of the workers is outside the clock. An image is read, decoded, augmented as SimMIM's are, and stacked.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.measure import Absent
from benchmarks.photographs import write_jpegs
from benchmarks.results import RESULTS, begin, write_row
from simmim_fast.data import ImageFolder, UnreadableImage, build_loader, pretrain_transform

SOURCES: dict[str, int | None] = {"full": None, "resized": 256}  # shorter side in pixels
FILES = 112  # of each source
PREFETCHED = 2  # batches of a worker, as torch's loader has it


def _torchvision(path: str, side: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image, read_file

    return decode_image(read_file(path), ImageReadMode.RGB, apply_exif_orientation=True)


def _pillow_draft(path: str, side: int) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        image.draft("RGB", (2 * side, 2 * side))  # the decoder shrinks by a power of two, at least to this
        return image.convert("RGB")


# (path, side of the model's images) -> image; None is the package's own, Pillow.
DECODERS: dict[str, Callable[[str, int], Any] | None] = {
    "pillow": None,
    "pillow_draft": _pillow_draft,
    "torchvision": _torchvision,
}


class DecodedFolder(ImageFolder):
    """A folder whose images another decoder reads.

    Args:
        root: The folder.
        img_size: Side of the model's images in pixels.
        decode: (path, img_size) -> what the transform takes.
    """

    def __init__(self, root: Path, img_size: int, decode: Callable[[str, int], Any]) -> None:
        self.img_size = img_size
        self.decode = decode
        super().__init__(root, pretrain_transform(img_size))

    def _first_readable(self, indices: Iterable[int]) -> tuple[Any, int, tuple[UnreadableImage, ...]]:
        index = next(iter(indices))
        return self.decode(self.path(index), self.img_size), index, ()


@dataclass
class Pipeline:
    """A setting of the loader, and what it reached.

    Attributes:
        source: Key of `SOURCES`, or a folder of the user's.
        decoder: Key of `DECODERS`.
        workers: Processes; 0 loads in the caller's own.
        seconds: Of each stretch.
    """

    source: str
    decoder: str
    workers: int
    seconds: list[float] = field(default_factory=list)


def measure(
    pipelines: Sequence[Pipeline], folders: Mapping[str, Path], img_size: int, batch: int, batches: int, rounds: int
) -> None:
    """Time stretches of `batches` batches of every pipeline in turn, `rounds` times, in place."""
    for turn in range(rounds):
        for one in pipelines[:: 1 if turn % 2 == 0 else -1]:
            decode = DECODERS[one.decoder]
            root = folders[one.source]
            folder = (
                ImageFolder(root, pretrain_transform(img_size))
                if decode is None
                else DecodedFolder(root, img_size, decode)
            )
            one.seconds.append(_stretch(folder, batch, batches, one.workers, seed=turn))


def _stretch(folder: ImageFolder, batch: int, batches: int, workers: int, seed: int) -> float:
    """Seconds of so many batches, while the workers go on: what was ready when the clock starts is owed at its end."""
    warm_up = 1 + PREFETCHED * workers
    epochs = 1 + batch * (2 * warm_up + batches) // len(folder)
    loader = iter(build_loader(folder, batch, epochs=epochs + 1, seed=seed, num_workers=workers))
    for _ in range(warm_up):
        next(loader)
    begin = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return time.perf_counter() - begin


def results(pipelines: Sequence[Pipeline], given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row a pipeline."""
    images = given["batch"] * given["batches"]
    for one in pipelines:
        rates = [images / seconds for seconds in one.seconds]
        setting = {"source": one.source, "decoder": one.decoder, "workers": one.workers}
        rate = {"median": statistics.median(rates), "least": min(rates), "most": max(rates)}
        yield {"benchmark": "loader", "arguments": {**given, **setting}, "images_per_second": rate}


def line(row: Mapping[str, Any]) -> str:
    """A row as a line of text."""
    given, rate = row["arguments"], row["images_per_second"]
    return (
        f"{given['source']:<10} {given['decoder']:<13} {given['workers']:>2} workers"
        f" {rate['median']:>9.1f} images/s ({rate['least']:.1f} to {rate['most']:.1f})"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser("python -m benchmarks.loader", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="images of yours, instead of photographs that packages carry")
    add(
        "--sources", nargs="+", choices=SOURCES, default=list(SOURCES), help="JPEGs at their own size, or shrunk to 256"
    )
    add("--decoders", nargs="+", choices=DECODERS, default=list(DECODERS), help="default: all")
    add("--workers", nargs="+", type=int, default=sorted({0, cores}), help="default: none, and one a core")
    add("--img-size", type=int, default=192, help="side of the model's images in pixels (default: %(default)s)")
    add("--batch", type=int, default=32, help="default: %(default)s")
    add("--batches", type=int, default=4, help="of a stretch (default: %(default)s)")
    add("--rounds", type=int, default=5, help="stretches of each setting (default: %(default)s)")
    add("--results", type=Path, default=RESULTS / "loader.jsonl", metavar="FILE", help="rows are appended here")
    gate.add_option(parser)
    options = parser.parse_args(arguments)
    for name, least in (("img_size", 1), ("batch", 1), ("batches", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if min(options.workers) < 0:
        parser.error(f"--workers must not be negative, got {min(options.workers)}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data must be a folder of images, got {options.data}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Test, write the photographs, load, print and write rows."""
    options = parse(arguments)
    begin()
    gate.require(gate.DATA, "cpu", options.tests)
    torch.set_num_threads(1)  # processes share the cores
    with tempfile.TemporaryDirectory() as root:
        try:
            folders = {"data": options.data} if options.data else _written(Path(root), options.sources)
        except Absent as reason:
            sys.exit(f"nothing is loaded: {reason}")
        settings = itertools.product(folders, options.decoders, options.workers)
        pipelines = [Pipeline(*setting) for setting in settings]
        try:
            measure(pipelines, folders, options.img_size, options.batch, options.batches, options.rounds)
        except ValueError as error:
            sys.exit(f"nothing is loaded: {error}")
    for row in results(pipelines, given(options)):
        print(line(write_row(options.results, row)), flush=True)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Every argument of all settings, as their rows have them: "data" is the user's folder, by which sources differ."""
    named = {name: getattr(options, name) for name in ("img_size", "batch", "batches", "rounds", "tests")}
    return {**named, "data": None if options.data is None else str(options.data)}


def _written(root: Path, sources: Sequence[str]) -> dict[str, Path]:
    folders = {source: root / source for source in sources}
    for source, folder in folders.items():
        folder.mkdir()
        write_jpegs(folder, FILES, SOURCES[source])
    return folders


if __name__ == "__main__":
    main()
