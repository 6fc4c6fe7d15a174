"""Reading files of ``torch.save`` without running anything that their pickles ask for.

A pickle is a program for a stack machine, and its REDUCE instruction calls any function that it can name. This machine
imports nothing and calls only the few constructors of `_CONSTRUCTORS`. An object of any other class becomes an
`InertRecord`; any other call is refused by name.
"""

from __future__ import annotations

import mmap
import os
import pickletools
import re
import reprlib
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

_STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGE_DTYPES.values()}
_PYTHON_2_MODULES = {"__builtin__": "builtins"}  # pickle protocol 2 writes the old name

# What reading malformed bytes can raise on its way through zipfile, struct, pickletools and the machine below.
_MALFORMED = (
    *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    *(struct.error, zipfile.BadZipFile),
)


class UnsafePickleError(ValueError):
    """A pickle asks for a function or a value that is not known to be harmless; it was not run."""


class InertRecord(dict[Any, Any]):
    """What a pickle holds of an object whose class is unknown: the dict's items are the object's own, if it has any.

    Attributes:
        class_name: Full name of the class, never imported.
        arguments: What the class would have been called with.
        elements: What would have been appended to the object.
        state: What the object would have been restored from, usually its attributes; None if nothing.
    """

    def __init__(self, class_name: str, arguments: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.class_name = class_name
        self.arguments = arguments
        self.elements: list[Any] = []
        self.state: Any = None

    def __repr__(self) -> str:
        return f"InertRecord({self.class_name!r}, {super().__repr__()})"


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Reads a file written by ``torch.save`` (the zip format, torch 1.6 and later).

    Returns plain containers, numbers, text, CPU tensors and `InertRecord`. The tensors lie in a private mapping of the
    file: what is never read is never loaded, and writing to them does not write to the file, which must not be
    truncated while they live.

    Raises:
        UnsafePickleError: the pickle asks for a function, or a value, beyond those that tensors and plain containers
            need; the message names it.
        ValueError: not such a file, a truncated one, or one whose parts disagree.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            archive = _Archive(file)
            return _PickleMachine(archive).run(archive.pickle)
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{os.fspath(path)}: {error}") from None
        except _MALFORMED as error:
            raise ValueError(f"{os.fspath(path)}: not a readable checkpoint: {error}") from error


class _Archive:
    """The records of a ``torch.save`` zip: one pickle, and one uncompressed record of bytes per storage."""

    def __init__(self, file: BinaryIO) -> None:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("not the zip that torch.save writes since torch 1.6 (an older file must be saved again)")
        zipped = zipfile.ZipFile(file)
        self._records = {record.filename: record for record in zipped.infolist()}
        pickles = [name for name in self._records if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ValueError(f"torch.save writes one data.pkl, this zip has {len(pickles)}")
        self._root = pickles[0].removesuffix("data.pkl")
        self._mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        self._storages: dict[str, Tensor] = {}
        self.pickle = bytes(self._bytes("data.pkl"))
        if f"{self._root}byteorder" in self._records and bytes(self._bytes("byteorder")) != sys.byteorder.encode():
            raise ValueError(f"its bytes are not in the {sys.byteorder}-endian order of this machine")

    def _bytes(self, name: str) -> memoryview:
        """The mapped bytes of one record; a name is only ever looked up in the zip's own directory."""
        record = self._records.get(self._root + name)
        if record is None:
            raise ValueError(f"the record {name} is missing")
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the record {name} is compressed, which torch.save never does")
        header = self._mapped[record.header_offset : record.header_offset + 30]
        signature, name_size, extra_size = struct.unpack("<4s22xHH", header)
        start = record.header_offset + 30 + name_size + extra_size
        content = self._mapped[start : start + record.file_size]
        if signature != b"PK\x03\x04" or len(content) != record.file_size:
            raise ValueError(f"the record {name} is damaged or truncated")
        return content

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """The storage `key` as a flat tensor (count,) of `dtype`; equal keys share memory."""
        if not key.isdecimal() or type(count) is not int:
            raise ValueError(f"a storage is named by a number and has a count, got {reprlib.repr((key, count))}")
        if key not in self._storages:
            content = self._bytes(f"data/{key}")
            flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            # torch.save aligns to 64 bytes; kernels may rely on the natural alignment of the elements.
            self._storages[key] = flat if flat.data_ptr() % 16 == 0 else flat.clone()
        flat = self._storages[key]
        if flat.numel() != count * dtype.itemsize:
            raise ValueError(f"storage {key} should hold {count} x {dtype}, its record has {flat.numel()} bytes")
        return flat.view(dtype)


@dataclass(frozen=True)
class _Global:
    """A function or class that the pickle refers to: a name, never looked up."""

    name: str


class _PickleMachine:
    """Runs the instructions of a pickle that build data, and no others."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each open mark
        self._memo: dict[int, Any] = {}
        self._mentioned: dict[str, None] = {}
        self._used: set[str] = set()

    def run(self, stream: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in _VALUES:
                self.push(_VALUES[opcode.name](argument))
            elif opcode.name in _INSTRUCTIONS:
                _INSTRUCTIONS[opcode.name](self, argument)
            else:
                raise UnsafePickleError(f"the pickle asks for the instruction {opcode.name}, which no checkpoint needs")
        for name in self._mentioned:
            if name not in self._used:
                raise UnsafePickleError(f"the pickle asks for {name} as a value")
        return self.pop()

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def pops(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self._stack.pop() for _ in range(count)]))

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def pops_to_mark(self) -> tuple[Any, ...]:
        values, self._stack = self._stack, self._marked.pop()
        return tuple(values)

    def remember(self, index: int | None = None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    def set_items(self, pairs: tuple[Any, ...]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict, InertRecord):
            raise ValueError(f"items set on a {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[_plain(key)] = value

    def extend(self, values: tuple[Any, ...]) -> None:
        target = self._stack[-1]
        if type(target) is InertRecord:
            target.elements.extend(values)
        elif type(target) is set:
            target.update(map(_plain, values))
        elif type(target) is list:
            target.extend(values)
        else:
            raise ValueError(f"elements appended to a {type(target).__name__}")

    def refer(self, module: str, name: str) -> None:
        full_name = f"{_PYTHON_2_MODULES.get(module, module)}.{name}"
        if full_name in _DTYPES:
            self.push(_DTYPES[full_name])
        else:
            self._mentioned[full_name] = None
            self.push(_Global(full_name))

    def call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        """REDUCE: where other unpicklers run code."""
        name = function.name if isinstance(function, _Global) else f"a value of type {type(function).__name__}"
        if name not in _CONSTRUCTORS:
            raise UnsafePickleError(f"the pickle asks for {name} to be called")
        self._used.add(name)
        self.push(_CONSTRUCTORS[name](*arguments))

    def create(self, cls: _Global, arguments: tuple[Any, ...]) -> None:
        """NEWOBJ: an object of a class, whichever it is, is only recorded."""
        self._used.add(cls.name)
        self.push(InertRecord(cls.name, arguments))

    def build(self, state: Any) -> None:
        target = self._stack[-1]
        if type(target) is InertRecord:
            target.state = state
        elif type(target) is OrderedDict and type(state) is dict and list(state) == ["_metadata"]:
            vars(target).update(state)  # module versions, which a state_dict carries as an attribute
        else:
            raise ValueError(f"a state set on a {type(target).__name__}")

    def storage(self, kind: str, storage_type: _Global, key: str, device: str, count: int) -> None:
        """BINPERSID: the only thing that torch.save stores outside the pickle; always read to the CPU."""
        if kind != "storage" or storage_type.name not in _STORAGE_DTYPES:
            raise UnsafePickleError(f"the pickle asks for {reprlib.repr(kind)} of {storage_type.name}")
        self._used.add(storage_type.name)
        self.push(self._archive.storage(key, _STORAGE_DTYPES[storage_type.name], count))


def _tensor(
    storage: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    metadata: Any = None,
) -> Tensor:
    if hooks or metadata:
        raise UnsafePickleError("the pickle asks for a tensor with hooks or metadata")
    return storage.as_strided(size, stride, offset).requires_grad_(requires_grad)


def _parameter(data: Tensor, requires_grad: bool, hooks: Any) -> torch.nn.Parameter:
    if hooks:
        raise UnsafePickleError("the pickle asks for a parameter with hooks")
    return torch.nn.Parameter(data, requires_grad)


def _plain(key: Any) -> Any:
    """Refuses keys whose hash can be made to take for ever, such as tuples of tuples of tuples."""
    if not isinstance(key, (str, bytes, int, float, type(None))):
        raise ValueError(f"a key of type {type(key).__name__}")
    return key


_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: OrderedDict(),
    "builtins.set": lambda values=(): set(map(_plain, values)),
    "builtins.frozenset": lambda values=(): frozenset(map(_plain, values)),
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}

_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_LITERALS += ("BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_VALUES: dict[str, Callable[[Any], Any]] = {
    **{name: lambda argument: argument for name in _LITERALS},
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: set(),
    "EMPTY_TUPLE": lambda _: (),
}
_INSTRUCTIONS: dict[str, Callable[[_PickleMachine, Any], None]] = {
    "PROTO": lambda machine, version: None,
    "FRAME": lambda machine, size: None,
    "STOP": lambda machine, _: None,
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.push(machine.pops_to_mark()),
    "TUPLE1": lambda machine, _: machine.push(machine.pops(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pops(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pops(3)),
    "MEMOIZE": lambda machine, _: machine.remember(),
    "BINPUT": lambda machine, index: machine.remember(index),
    "LONG_BINPUT": lambda machine, index: machine.remember(index),
    "BINGET": lambda machine, index: machine.recall(index),
    "LONG_BINGET": lambda machine, index: machine.recall(index),
    "SETITEM": lambda machine, _: machine.set_items(machine.pops(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pops_to_mark()),
    "APPEND": lambda machine, _: machine.extend(machine.pops(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pops_to_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.pops_to_mark()),
    "FROZENSET": lambda machine, _: machine.push(frozenset(map(_plain, machine.pops_to_mark()))),
    "GLOBAL": lambda machine, names: machine.refer(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.refer(*machine.pops(2)),
    "NEWOBJ": lambda machine, _: machine.create(*machine.pops(2)),
    "REDUCE": lambda machine, _: machine.call(*machine.pops(2)),
    "BUILD": lambda machine, _: machine.build(machine.pop()),
    "BINPERSID": lambda machine, _: machine.storage(*machine.pop()),
}
