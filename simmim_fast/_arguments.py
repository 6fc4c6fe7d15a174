"""Checks of arguments, for all rooms. An error begins with the argument's name, says what it must be, and what came."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_ONE = {int: "an integer", float: "a number", bool: "a boolean", str: "a string", dict: "a mapping", NoneType: "None"}
_MANY = {int: "integers", float: "numbers"}


def check_types(annotated: Callable[..., object], values: Mapping[str, object], prefix: str = "") -> None:
    """Refuses values that do not fit the annotations of a function's arguments, or of a dataclass's fields.

    An integer serves as a number, a list as a tuple; a bool is neither an integer nor a number.

    Args:
        annotated: The function or the dataclass.
        values: By name; names without an annotation are passed over.
        prefix: Put before the names in errors, such as "optimizer.".

    Raises:
        ValueError: none of the choices of a Literal; the message lists them and the nearest.
        TypeError: a value of another type.
    """
    for name, hint in get_type_hints(annotated).items():
        if name in values and not _fits(values[name], hint):
            raise mismatch(f"{prefix}{name}", values[name], hint)


def mismatch(name: str, value: object, hint: Any) -> ValueError | TypeError:
    """The error of a value that does not fit an annotation."""
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    error = ValueError if choices else TypeError
    return error(f"{name} must be {_described(hint)}, got {value!r}{did_you_mean(value, choices)}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuses what is none of the choices.

    Raises:
        ValueError: the message lists the choices and the nearest.
    """
    if value not in choices:
        raise mismatch(name, value, Literal[tuple(choices)])


def check_at_least(name: str, value: float, least: float) -> None:
    """Refuses a number below `least`, and NaN.

    Raises:
        ValueError: it is one.
    """
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_rate(name: str, value: float) -> None:
    """Refuses a number below 0, or of 1 and above.

    Raises:
        ValueError: it is one.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")


def positive_int(name: str, value: int) -> int:
    """The value as an int.

    Raises:
        TypeError: it is no integer. ValueError: it is not positive.
    """
    if not _fits(value, int):
        raise mismatch(name, value, int)
    check_at_least(name, value, 1)
    return int(value)


def size_pair(name: str, value: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    """An integer or a pair of them as (height, width).

    Raises:
        TypeError: it is neither. ValueError: a side is below `least`.
    """
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if not _fits(sides, tuple[int, int]):
        raise TypeError(f"{name} must be an integer or a pair (height, width) of integers, got {value!r}")
    if min(sides) < least:
        raise ValueError(f"{name} must be at least {least} on each side, got {value!r}")
    return int(sides[0]), int(sides[1])


def did_you_mean(name: object, names: Collection[str]) -> str:
    """The end of an error about an unknown name: the nearest of the known ones, or nothing where none is near."""
    nearest = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Lets errors that are raised in this block speak of the user's arguments.

    Args:
        names: By the name that such an error begins with, the one to put there.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        name = re.match(r"[\w.]*", message)[0]
        if name not in names:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(names[name] + message[len(name) :]) from error


def _fits(value: object, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Any, object):
        return True
    if kind is Literal:
        return value in inner
    if kind in (Union, UnionType):
        return any(_fits(value, alternative) for alternative in inner)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind in (tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        hints = inner if kind is tuple and ... not in inner else inner[:1] * len(value)
        return len(hints) == len(value) and all(map(_fits, value, hints))
    return isinstance(value, kind)


def _described(hint: Any) -> str:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind in (Union, UnionType):
        return " or ".join(map(_described, inner))
    if kind in (tuple, Sequence):
        count = "a pair" if kind is tuple and ... not in inner else "a list"
        return f"{count} of {_MANY[inner[0]]}"
    return _ONE.get(kind) or f"a {kind.__name__}"
