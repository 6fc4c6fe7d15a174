"""The loader benchmark on a few small files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.results import read_rows
from simmim_fast.data import pretrain_transform

CALL = ["--img-size", "32", "--batch", "2", "--batches", "1", "--rounds", "2", "--tests", "passed"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image", reason="not run: pillow is not installed")
    path = tmp_path / "photographs"
    path.mkdir()
    for number in range(4):
        image.effect_mandelbrot((80, 60), (-2, -1, 1, 1 + number), 9).convert("RGB").save(path / f"{number}.jpg")
    return path


def test_every_setting_has_a_row_and_a_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "rows.jsonl"
    loader.main([*CALL, "--data", str(folder), "--workers", "0", "1", "--results", str(results)])
    rows = read_rows(results)
    settings = [(row["arguments"]["decoder"], row["arguments"]["workers"]) for row in rows]
    assert settings == [(decoder, workers) for decoder in loader.DECODERS for workers in (0, 1)]
    fixed = {"img_size": 32, "batch": 2, "batches": 1, "rounds": 2, "tests": "passed", "data": str(folder)}
    first = {"source": "data", "decoder": "pillow", "workers": 0}
    assert rows[0]["arguments"] == {**fixed, **first}
    for row in rows:
        rate = row["images_per_second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["most"]
    assert capsys.readouterr().out.count("images/s") == len(rows)


def test_the_photographs_of_packages_are_no_folder() -> None:
    assert loader.given(loader.parse([]))["data"] is None


@pytest.mark.parametrize("decoder", [name for name, decode in loader.DECODERS.items() if decode])
def test_decoders_see_the_same_picture(folder: Path, decoder: str) -> None:
    own = loader.ImageFolder(folder, pretrain_transform(32))
    other = loader.DecodedFolder(folder, 32, loader.DECODERS[decoder])
    for index in range(4):
        assert (own[index].image - other[index].image).abs().mean() < 0.2


def test_photographs_of_both_sizes(tmp_path: Path) -> None:
    from PIL import Image

    for source, side in loader.SOURCES.items():
        (tmp_path / source).mkdir()
        loader.write_jpegs(tmp_path / source, 2, side)
        sizes = [Image.open(path).size for path in sorted((tmp_path / source).iterdir())]
        assert len(sizes) == 2
        assert all(min(size) == side if side else min(size) > 256 for size in sizes)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param(["--workers", "-1"], "--workers must not be negative, got -1", id="workers"),
        pytest.param(["--img-size", "0"], "--img-size must be at least 1, got 0", id="img_size"),
        pytest.param(["--data", "/nowhere"], "--data must be a folder of images, got /nowhere", id="data"),
    ],
)
def test_bad_options_are_named(options: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loader.parse(options)
    assert error in capsys.readouterr().err
