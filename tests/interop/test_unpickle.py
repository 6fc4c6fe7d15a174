from __future__ import annotations

import argparse
import copyreg
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simmim_fast.interop import InertRecord, UnsafePickleError, read_checkpoint

HEAD = b"\x80\x02"  # protocol 2


class Node(dict):
    """Stands for yacs' CfgNode: a dict with attributes."""


class Listing(list):
    """A list with a class of its own."""


class Bomb:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class ArmedState:
    """Would create a file when restored by its own class."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["marker"]).touch()


def write_zip(path: Path, stream: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A file as torch.save lays it out, around a pickle of our own."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", stream)
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.LONG1 + b"\x09" + value.to_bytes(9, "little", signed=True)


def storage_code(key: str = "0", count: bytes = number(4)) -> bytes:
    """The instructions of a float32 storage, as torch.save writes it: by a persistent id."""
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + count + b"tQ"


def tensor_code(offset: int, size: int, stride: int, hooks: bytes = pickle.NONE) -> bytes:
    """The instructions of a one-dimensional tensor over a storage of 4 floats."""
    arguments = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85" + pickle.NEWFALSE + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage_code() + arguments + b"tR"


TENSORS = {
    "float32": torch.arange(6.0).reshape(2, 3),
    "bfloat16": torch.arange(6).to(torch.bfloat16),
    "int64": torch.arange(5),
    "bool": torch.tensor([True, False]),
    "complex64": torch.tensor([1 + 2j]),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "slice": torch.arange(10.0)[3:7:2],
    "expanded": torch.arange(3.0).expand(4, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back(tmp_path: Path, name: str, protocol: int) -> None:
    torch.save({"x": TENSORS[name]}, tmp_path / "file.pth", pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / "file.pth")["x"]
    assert type(read) is type(TENSORS[name])
    assert read.stride() == TENSORS[name].stride()
    assert read.requires_grad == TENSORS[name].requires_grad
    torch.testing.assert_close(read, TENSORS[name], rtol=0, atol=0)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    same = [1, 2]
    plain = {
        "numbers": [0, -1, 255, 256, 70_000, 2**40, -(2**40), 2**2100, 1.5, float("inf")],
        "text": ["", "é" * 300, None, True, False],
        "containers": [
            (),
            (1,),
            (1, 2),
            (1, 2, 3),
            (1, 2, 3, 4),
            [],
            {},
            {"a": {0: []}},
            {1, 2},
            set(),
            frozenset("ab"),
        ],
        "ordered": OrderedDict(a=1, b=2),
        "torch": [torch.Size([2, 3]), torch.device("cpu"), torch.float16],
        "twice": [same, same],
    }
    torch.save(plain, tmp_path / "file.pth", pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / "file.pth")
    assert read == plain
    assert read["twice"][0] is read["twice"][1]


def test_state_dict_keeps_its_metadata_and_a_training_checkpoint_its_parts(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file.pth")
    read = read_checkpoint(tmp_path / "file.pth")
    assert read["model"]._metadata == model.state_dict()._metadata
    torch.testing.assert_close(read["model"], model.state_dict(), rtol=0, atol=0)
    assert read["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    torch.testing.assert_close(read["optimizer"]["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


def test_shared_storage_stays_shared_and_the_file_untouched(tmp_path: Path) -> None:
    whole = torch.zeros(4)
    torch.save([whole, whole[2:]], tmp_path / "file.pth")
    written = (tmp_path / "file.pth").read_bytes()
    first, second = read_checkpoint(tmp_path / "file.pth")
    second.fill_(7)
    assert first.tolist() == [0, 0, 7, 7]
    assert (tmp_path / "file.pth").read_bytes() == written


@pytest.mark.parametrize("shift", range(4))
def test_records_may_lie_unaligned(tmp_path: Path, shift: int) -> None:
    content = struct.pack("<4f", 1, 2, 3, 4)
    path = write_zip(tmp_path / "file.pth", HEAD + tensor_code(0, 4, 1) + b".", {"x" * shift: b"", "data/0": content})
    read = read_checkpoint(path)
    assert read.tolist() == [1, 2, 3, 4]
    assert read.data_ptr() % 16 == 0


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_unknown_classes_become_inert_records(tmp_path: Path, protocol: int) -> None:
    node = Node(a=1, inner=Node(b=torch.ones(2)))
    node.frozen = True
    objects = {"node": node, "list": Listing([1, 2]), "args": argparse.Namespace(lr=0.1)}
    torch.save({**objects, "armed": ArmedState(tmp_path / "marker")}, tmp_path / "file.pth", pickle_protocol=protocol)
    read = read_checkpoint(tmp_path / "file.pth")
    assert {name: type(value) for name, value in read.items()} == dict.fromkeys(read, InertRecord)
    assert read["node"].class_name == f"{__name__}.Node"
    assert read["node"].state == {"frozen": True}
    assert dict(read["node"], inner=None) == {"a": 1, "inner": None}
    assert read["node"]["inner"]["b"].tolist() == [1, 1]
    assert read["list"].elements == [1, 2]
    assert (read["args"].class_name, read["args"].state) == ("argparse.Namespace", {"lr": 0.1})
    assert repr(read["list"]) == f"InertRecord('{__name__}.Listing', {{}})"
    assert not (tmp_path / "marker").exists()


def bombs(marker: Path) -> dict[str, tuple[Bomb, str]]:
    """Objects whose unpickling creates `marker`, and what they ask for."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Bomb(os.system, f"touch '{marker}'"), f"{os.name}.system"),
        "eval": (Bomb(eval, code), "builtins.eval"),
        "exec": (Bomb(exec, code), "builtins.exec"),
        "open": (Bomb(open, str(marker), "w"), "(io|_io).open"),
        "own class": (Bomb(Path.touch, marker), "(pathlib.*|builtins.getattr)"),
    }


WAYS_IN: dict[str, Callable[[Bomb], Any]] = {
    "whole": lambda bomb: bomb,
    "config": lambda bomb: {"model": {}, "config": bomb},
    "inside config": lambda bomb: {"config": Node(MODEL=Node(TYPE=bomb))},
    "state of config": lambda bomb: {"config": argparse.Namespace(lr=bomb)},
    "optimizer": lambda bomb: {"optimizer": {"state": {0: {"step": bomb}}}},
    "list": lambda bomb: [Listing([bomb])],
    "key": lambda bomb: {bomb: 1},
    "tensor": lambda bomb: Bomb(torch._utils._rebuild_tensor_v2, bomb, 0, (1,), (1,), False, OrderedDict()),
}


@pytest.mark.parametrize("name", bombs(Path()))
def test_the_bombs_are_live(tmp_path: Path, name: str) -> None:
    bomb, _ = bombs(tmp_path / "marker")[name]
    pickle.loads(pickle.dumps(bomb, protocol=2))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("name", bombs(Path()))
def test_calls_are_refused_by_name_and_not_made(tmp_path: Path, name: str, way: str, protocol: int) -> None:
    bomb, asked = bombs(tmp_path / "marker")[name]
    torch.save(WAYS_IN[way](bomb), tmp_path / "file.pth", pickle_protocol=protocol)
    with pytest.raises(UnsafePickleError, match=rf"file\.pth: the pickle asks for {asked} to be called"):
        read_checkpoint(tmp_path / "file.pth")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("value", [os.system, len, Node], ids=lambda value: value.__name__)
def test_a_function_or_class_is_no_value(tmp_path: Path, value: Any) -> None:
    torch.save({"model": {}, "hook": (value,)}, tmp_path / "file.pth")
    with pytest.raises(UnsafePickleError, match=rf"asks for {value.__module__}\.{value.__name__} as a value"):
        read_checkpoint(tmp_path / "file.pth")


RAW_BOMBS = {
    "INST": (b"(X\x04\x00\x00\x00truei%b\nsystem\n.", "instruction INST"),
    "OBJ": (b"(c%b\nsystem\nX\x04\x00\x00\x00trueo.", "instruction OBJ"),
    "EXT1": (b"\x80\x02\x82\xf0X\x04\x00\x00\x00true\x85R.", "instruction EXT1"),
    "PERSID": (b"Ptrue\n.", "instruction PERSID"),
    "REDUCE of an object": (
        b"\x80\x02c%b\nsystem\n)\x81X\x04\x00\x00\x00true\x85R.",
        "asks for a value of type InertRecord to be called",
    ),
    "REDUCE of text": (b"\x80\x02X\x04\x00\x00\x00true)R.", "asks for a value of type str to be called"),
    "storage of another kind": (
        b"\x80\x02(X\x06\x00\x00\x00moduleccollections\nOrderedDict\nNNNtQ.",
        "asks for 'module' of collections.OrderedDict",
    ),
    "storage of another type": (
        b"\x80\x02(X\x07\x00\x00\x00storagec%b\nsystem\nNNNtQ.",
        r"asks for 'storage' of \w+\.system",
    ),
}


@pytest.mark.parametrize("name", RAW_BOMBS)
def test_instructions_that_could_call_are_refused(tmp_path: Path, name: str) -> None:
    stream, message = RAW_BOMBS[name]
    with pytest.raises(UnsafePickleError, match=message):
        read_checkpoint(write_zip(tmp_path / "file.pth", stream.replace(b"%b", os.name.encode())))


def test_an_object_of_a_function_is_only_recorded(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    command = f"touch '{marker}'".encode()
    stream = b"\x80\x02c%b\nsystem\nX%b%b\x85\x81." % (os.name.encode(), struct.pack("<I", len(command)), command)
    record = read_checkpoint(write_zip(tmp_path / "file.pth", stream))
    assert (type(record), record.arguments) == (InertRecord, (command.decode(),))
    assert not marker.exists()


def test_a_registered_extension_is_refused_too(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 0xF0)
    try:
        with pytest.raises(UnsafePickleError, match="EXT1"):
            read_checkpoint(write_zip(tmp_path / "file.pth", RAW_BOMBS["EXT1"][0]))
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.parametrize("key", ["../../../../etc/hostname", "/etc/hostname", "0/../1", "..", "", "-1", "0.bin"])
def test_storage_names_are_numbers(tmp_path: Path, key: str) -> None:
    path = write_zip(tmp_path / "file.pth", HEAD + storage_code(key) + b".", {f"data/{key}": bytes(16)})
    with pytest.raises(ValueError, match="a storage is named by a number"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("count", "size"), [(4, 15), (4, 17), (5, 16), (3, 16), (2**62, 16), (-4, 16), (0, 16), (4, 0)], ids=str
)
def test_storage_must_have_its_size(tmp_path: Path, count: int, size: int) -> None:
    path = write_zip(tmp_path / "file.pth", HEAD + storage_code(count=number(count)) + b".", {"data/0": bytes(size)})
    with pytest.raises(
        ValueError, match=rf"storage 0 should hold {count} x torch.float32, its record has {size} bytes"
    ):
        read_checkpoint(path)


def test_storage_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the record data/0 is missing"):
        read_checkpoint(write_zip(tmp_path / "file.pth", HEAD + storage_code() + b"."))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, 5, 1), (1, 4, 1), (0, 2, 4), (-1, 2, 1), (0, -2, 1), (3, 2, -1), (2**31 - 1, 1, 1)],
    ids=str,
)
def test_a_tensor_stays_inside_its_storage(tmp_path: Path, offset: int, size: int, stride: int) -> None:
    path = write_zip(tmp_path / "file.pth", HEAD + tensor_code(offset, size, stride) + b".", {"data/0": bytes(16)})
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        read_checkpoint(path)


def test_a_tensor_has_no_hooks(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file.pth", HEAD + tensor_code(0, 4, 1, hooks=number(1)) + b".", {"data/0": bytes(16)})
    with pytest.raises(UnsafePickleError, match="hooks"):
        read_checkpoint(path)


@pytest.fixture(scope="module")
def whole_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": OrderedDict(w=torch.arange(40.0)), "config": Node(a=1)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.999])
def test_truncated_files(tmp_path: Path, whole_file: bytes, kept: float) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(whole_file[: int(kept * len(whole_file))])
    with pytest.raises(ValueError, match=r"file\.pth: not a readable checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("length", range(0, 180, 7))
def test_truncated_pickles(tmp_path: Path, whole_file: bytes, length: int) -> None:
    stream = pickle_of(whole_file)[:length]
    with pytest.raises(ValueError, match=r"file\.pth: "):
        read_checkpoint(write_zip(tmp_path / "file.pth", stream, {"data/0": bytes(160)}))


def pickle_of(file: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=400, deadline=None, derandomize=True)
@given(changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_files_load_or_raise_value_error(
    whole_file: bytes, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]]
) -> None:
    damaged = bytearray(whole_file)
    stream = pickle_of(whole_file)
    start = whole_file.index(stream)
    for place, byte in changes:
        damaged[start + int(place * len(stream))] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    path.write_bytes(damaged)
    try:
        read_checkpoint(path)
    except ValueError as error:
        assert "damaged.pth: " in str(error)  # noqa: PT017


def test_files_of_another_kind(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pth").write_text("model: none")
    for name in ("legacy.pth", "text.pth"):
        with pytest.raises(ValueError, match=rf"{name}: .* not the zip that torch.save writes since torch 1.6"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "missing.pth")


def test_zips_of_another_kind(tmp_path: Path) -> None:
    compressed = write_zip(tmp_path / "deflated.pth", HEAD + b"N.", compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"data\.pkl is compressed"):
        read_checkpoint(compressed)
    swapped = write_zip(tmp_path / "swapped.pth", HEAD + b"N.", {"byteorder": b"big"})
    with pytest.raises(ValueError, match="little-endian"):
        read_checkpoint(swapped)
    pickles = {"none.pth": ["a/b.pkl"], "deep.pth": ["a/b/data.pkl"], "two.pth": ["a/data.pkl", "b/data.pkl"]}
    for name, entries in pickles.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for entry in entries:
                archive.writestr(entry, HEAD + b"N.")
        with pytest.raises(ValueError, match=r"torch.save writes one data\.pkl, this zip has [02]"):
            read_checkpoint(tmp_path / name)


DOUBLING = number(1) + b"".join(b"q%ch%c\x86" % (i, i) for i in range(200))  # ((((1, 1), (1, 1)), ...)): 2^200 ones
ENDLESS = {
    "key": (b"}" + DOUBLING + b"Ns.", "a key of type tuple"),
    "set": (b"c__builtin__\nset\n" + DOUBLING + b"\x85R.", "a key of type tuple"),
    "called": (DOUBLING + b")R.", "a value of type tuple to be called"),
    "stored": (b"(" + DOUBLING + b"ctorch\nFloatStorage\nNNNtQ.", "of torch.FloatStorage"),
    "count": (storage_code(count=DOUBLING) + b".", "named by a number and has a count"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_values_that_take_for_ever_to_hash_or_print(tmp_path: Path, name: str) -> None:
    stream, message = ENDLESS[name]
    with pytest.raises(ValueError, match=message):
        read_checkpoint(write_zip(tmp_path / "file.pth", HEAD + stream))
