"""Folders of images: what is found, in which order, what is decoded and how, and what happens to broken files."""

from __future__ import annotations

import io
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionImageFolder

from simmim_fast.data import (
    ImageFolder,
    SampleKey,
    build_loader,
    eval_transform,
    pretrain_transform,
    read_image,
    stream_seed,
)

ORIENTATION = 0x0112  # EXIF tag


def pixels(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0) -> bytes:
    return encode(Image.fromarray(pixels(seed=seed)), "JPEG")


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


BROKEN = {
    "truncated.jpg": encode(Image.fromarray(pixels(64, 64)), "JPEG")[:-900],
    "truncated.png": encode(Image.fromarray(pixels(64, 64)), "PNG")[:-900],
    "empty.jpg": b"",
    "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "float.tif": encode(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
    "wide.tif": encode(Image.fromarray(np.full((8, 8), 70_000, dtype=np.int32)), "TIFF"),
}
UNUSUAL = {
    "cmyk.jpg": encode(Image.fromarray(pixels()).convert("CMYK"), "JPEG"),
    "gray16.png": encode(Image.fromarray((pixels()[..., 0].astype(np.uint16) << 8) + 7), "PNG"),
    "gray32.tif": encode(Image.fromarray(pixels()[..., 0].astype(np.int32) << 8), "TIFF"),
    "moving.gif": encode(
        Image.fromarray(pixels()), "GIF", save_all=True, append_images=[Image.fromarray(pixels(seed=1))]
    ),
    "rotated.jpg": encode(Image.fromarray(pixels()), "JPEG", exif=exif(6)),
    "one.png": encode(Image.new("RGB", (1, 1), (10, 20, 30)), "PNG"),
    "palette.png": encode(Image.fromarray(pixels()).quantize(8), "PNG", transparency=bytes([0, 99])),
    "transparent.png": encode(Image.fromarray(pixels()).convert("RGBA"), "PNG"),
    "gray.png": encode(Image.fromarray(pixels()[..., 0]), "PNG"),
    "gray-alpha.png": encode(Image.fromarray(pixels()).convert("LA"), "PNG"),
    "bilevel.png": encode(Image.fromarray(pixels()).convert("1"), "PNG"),
    "photo.webp": encode(Image.fromarray(pixels()), "WEBP"),
    "misnamed.jpg": encode(Image.fromarray(pixels()), "PNG"),
}


def test_lists_any_depth_and_case_and_nothing_else(tmp_path):
    found = ["a.JPG", "b/c/d/e.Png", "b/f.tIFF", "g.jpeg", "h i/ü.webp"]
    ignored = ["notes.txt", "b/jpg", ".hidden.jpg", ".cache/a.jpg", "b/._f.jpg", "archive.jpg.zip"]
    write(tmp_path, {name: jpeg() for name in found + ignored})
    dataset = ImageFolder(tmp_path, to_tensor)
    assert sorted(os.path.relpath(dataset.path(i), tmp_path) for i in range(len(dataset))) == sorted(found)


def test_order_and_labels_are_those_of_torchvision(tmp_path):
    names = ["b/2.jpg", "b/10.jpg", "b/x/1.jpg", "b/x-y/1.jpg", "b-c/1.jpg", "a/z.jpg", "a/Z.jpg", "a/x y/1.jpg"]
    write(tmp_path, {name: jpeg(seed) for seed, name in enumerate(names)})
    ours, theirs = ImageFolder(tmp_path, to_tensor), TorchvisionImageFolder(str(tmp_path))
    assert [ours.path(i) for i in range(len(ours))] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets
    assert list(ours.classes) == theirs.classes
    assert [sample.label for sample in ours] == theirs.targets


def test_files_without_a_class_are_labelled_minus_one(tmp_path):
    dataset = ImageFolder(write(tmp_path, {"b.jpg": jpeg(), "c/a.jpg": jpeg()}), to_tensor)
    assert dataset.classes == ("c",)
    assert [(sample.label, sample.index) for sample in dataset] == [(-1, 0), (0, 1)]


def test_a_link_that_leads_to_itself_is_an_unreadable_image(tmp_path):
    write(tmp_path, {"a.jpg": jpeg()})
    for name in ("loop", "loop.jpg"):
        (tmp_path / name).symlink_to(tmp_path / name)
    dataset = ImageFolder(tmp_path, to_tensor)
    assert [os.path.basename(dataset.path(index)) for index in range(len(dataset))] == ["a.jpg", "loop.jpg"]
    sample = dataset[1]
    assert sample.index == 0
    assert [os.path.basename(image.path) for image in sample.unreadable] == ["loop.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = write(tmp_path / "root", {"a/1.jpg": jpeg()})
    outside = write(tmp_path / "outside", {"2.jpg": jpeg(), "deep/3.jpg": jpeg()})
    (root / "linked").symlink_to(outside)
    (root / "a" / "up").symlink_to(root)
    (outside / "deep" / "back").symlink_to(outside)
    dataset = ImageFolder(root, to_tensor)
    names = [os.path.relpath(dataset.path(i), root) for i in range(len(dataset))]
    assert names == ["a/1.jpg", "linked/2.jpg", "linked/deep/3.jpg"]


def test_a_name_that_is_no_text_is_read(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff\xfe.jpg")
    Path(os.fsdecode(path)).write_bytes(jpeg())
    assert os.fsencode(ImageFolder(tmp_path, to_tensor).path(0)) == path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_files_are_decoded(tmp_path, name, channels):
    image = read_image(write(tmp_path, UNUSUAL) / name, channels)
    width, height = {"rotated.jpg": (12, 16), "one.png": (1, 1)}.get(name, (16, 12))
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    assert image.size == (width, height)


@pytest.mark.parametrize("name", ["gray16.png", "gray32.tif"])
def test_16_bits_keep_the_upper_8(tmp_path, name):
    image = read_image(write(tmp_path, UNUSUAL) / name)
    for channel in range(3):
        assert np.array_equal(np.array(image)[..., channel], pixels()[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(tmp_path, orientation):
    upright = pixels(8, 8)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    content = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif(orientation))
    assert np.array_equal(np.array(read_image(write(tmp_path, {"a.png": content}) / "a.png")), upright)


def test_transparency_is_dropped_not_blended(tmp_path):
    image = Image.fromarray(np.dstack([pixels(), np.zeros((12, 16), dtype=np.uint8)]))
    root = write(tmp_path, {"a.png": encode(image, "PNG")})
    assert np.array_equal(np.array(read_image(root / "a.png")), pixels())


def test_the_first_frame_of_an_animation_counts(tmp_path):
    still = encode(Image.fromarray(pixels()), "GIF")
    root = write(tmp_path, {"still.gif": still, "moving.gif": UNUSUAL["moving.gif"]})
    assert np.array_equal(np.array(read_image(root / "moving.gif")), np.array(read_image(root / "still.gif")))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_replaced_and_reported(tmp_path, name):
    write(tmp_path, {name: BROKEN[name], "good.png": UNUSUAL["photo.webp"]})
    dataset = ImageFolder(tmp_path, to_tensor)
    bad = [dataset.path(0), dataset.path(1)].index(str(tmp_path / name))
    sample = dataset[bad]
    assert sample.index == 1 - bad
    assert torch.equal(sample.image, dataset[1 - bad].image)
    assert [image.path for image in sample.unreadable] == [str(tmp_path / name)]
    assert all(image.reason for image in sample.unreadable)
    assert dataset[1 - bad].unreadable == ()


def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 // 3)
    bomb = encode(Image.new("L", (40, 40)), "PNG")
    dataset = ImageFolder(write(tmp_path, {"bomb.png": bomb, "good.jpg": jpeg()}), to_tensor)
    assert dataset[0].unreadable[0].reason.startswith("DecompressionBombError")


def test_a_broken_link_and_a_vanished_file_are_unreadable(tmp_path):
    write(tmp_path, {"a.jpg": jpeg(), "b.jpg": jpeg()})
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    dataset = ImageFolder(tmp_path, to_tensor)
    (tmp_path / "b.jpg").unlink()
    for index in (1, 2):
        sample = dataset[index]
        assert sample.index == 0
        assert dict(sample.unreadable)[dataset.path(index)].startswith("FileNotFoundError")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_unreadable_file_is_counted_exactly(tmp_path, num_workers):
    broken = {f"{copy}-{name}": content for name, content in BROKEN.items() for copy in range(2)}
    files = {f"{number:03}.jpg": jpeg(number) for number in range(200 - len(UNUSUAL))} | UNUSUAL | broken
    dataset = ImageFolder(write(tmp_path, files), pretrain_transform(8))
    loader = build_loader(dataset, 16, epochs=2, drop_last=False, num_workers=num_workers)
    met = Counter(image.path for batch in loader for image in batch.unreadable)
    assert set(met) == {str(tmp_path / name) for name in broken}
    assert min(met.values()) >= 2  # once in every epoch, and again where it was drawn as a replacement


def test_the_replacement_follows_the_key_and_spreads_over_the_folder(tmp_path):
    root = write(tmp_path, {"0.jpg": b""} | {f"{number}.jpg": jpeg(number) for number in range(1, 6)})
    dataset = ImageFolder(root, to_tensor)
    keys = [SampleKey(0, epoch, seed) for epoch in range(20) for seed in range(2)]
    replacements = [dataset[key].index for key in keys]
    assert replacements == [dataset[key].index for key in keys]
    assert set(replacements) == {1, 2, 3, 4, 5}


def test_augmentation_depends_on_seed_epoch_and_index_alone(tmp_path):
    photograph = encode(Image.fromarray(pixels(96, 128)), "PNG")
    dataset = ImageFolder(write(tmp_path, {f"{number}.png": photograph for number in range(3)}), pretrain_transform(8))
    keys = [SampleKey(index, epoch, seed) for index in range(3) for epoch in range(2) for seed in range(2)]
    images = {key: dataset[key].image for key in keys}
    torch.manual_seed(99)
    for key in reversed(keys):
        assert torch.equal(dataset[key].image, images[key])
    assert len({image.numpy().tobytes() for image in images.values()}) == len(keys)


def test_the_default_generator_is_left_alone(tmp_path):
    dataset = ImageFolder(write(tmp_path, {"a.jpg": jpeg()}), pretrain_transform(8))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    next(iter(build_loader(dataset, 1)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("build", [pretrain_transform, eval_transform], ids=["pretrain", "eval"])
def test_a_folder_travels_to_workers_that_are_not_forked(tmp_path, build):
    dataset = ImageFolder(write(tmp_path, {"a.jpg": jpeg()}), build(8))
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0].image, dataset[0].image)


def test_stream_seeds_differ_by_purpose_and_key():
    keys = [("a",), ("a", 0), ("a", 0, 0), ("a", 1), ("b", 0), ("a", 0, 1), ("a", 1, 0)]
    seeds = [stream_seed(seed, *key) for key in keys for seed in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [stream_seed(seed, *key) for key in keys for seed in (0, 1)]
    with pytest.raises(ValueError, match="no negative number, got -1"):
        stream_seed(-1, "a", 0)


def test_an_index_out_of_range_is_refused(tmp_path):
    dataset = ImageFolder(write(tmp_path, {"a.jpg": jpeg()}), to_tensor)
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"index: expected 0 to 0, got {index}"):
            dataset[index]


def test_an_error_of_the_transform_is_not_taken_for_an_unreadable_image(tmp_path):
    def fails(image):
        raise RuntimeError("mine")

    dataset = ImageFolder(write(tmp_path, {"a.jpg": jpeg(), "b.jpg": jpeg()}), fails)
    with pytest.raises(RuntimeError, match="mine"):
        dataset[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("missing", r"root: .*/missing', which does not exist", id="missing"),
        pytest.param("file.jpg", r"root: .*/file\.jpg', which is not a folder", id="a-file"),
        pytest.param("empty", r"root: .*/empty' with one of the extensions .*\.jpeg \.jpg .*got none", id="empty"),
        pytest.param("texts", r"root: .*/texts' with one of the extensions .*got none", id="no-image"),
        pytest.param(
            "broken", r"root: .*readable.*/broken', got 6 unreadable ones.*\n.*empty\.jpg: Unidentified", id="broken"
        ),
    ],
)
def test_a_folder_without_images_is_refused(tmp_path, name, message):
    write(tmp_path, {"file.jpg": jpeg(), "texts/a.txt": b"a"} | {f"broken/{key}": BROKEN[key] for key in BROKEN})
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path / name, to_tensor)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": jpeg(), "closed/b.jpg": jpeg()})
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ValueError, match=r"root: expected a folder that can be listed.*Permission denied.*closed"):
        ImageFolder(tmp_path, to_tensor)


@pytest.mark.parametrize("channels", [0, 2, 4, "3"])
def test_channels_that_a_photograph_lacks_are_refused(tmp_path, channels):
    with pytest.raises(ValueError, match=r"channels: expected 3 \(RGB\) or 1 \(grayscale\)"):
        ImageFolder(write(tmp_path, {"a.jpg": jpeg()}), to_tensor, channels=channels)
