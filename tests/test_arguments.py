"""Checks of arguments: what fits an annotation, what an error says, and whose name it begins with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest

from simmim_fast._arguments import (
    check_at_least,
    check_choice,
    check_rate,
    check_types,
    did_you_mean,
    positive_int,
    renamed,
    size_pair,
)


def function(
    integer: int = 0,
    number: float | None = 0.0,
    flag: bool = False,
    text: str = "",
    choice: Literal["bf16", "fp32"] = "bf16",
    size: int | tuple[int, int] = 1,
    numbers: tuple[float, ...] = (),
    integers: Sequence[int] = (),
    mapping: dict[str, Any] | None = None,
    layer: Callable[[int], int] = abs,
    anything: object = None,
) -> None:
    """Something with annotations."""


@pytest.mark.parametrize(
    "values",
    [
        {"integer": np.int64(3), "number": 3, "flag": True, "text": "a", "choice": "fp32"},
        {"number": None, "size": (1, 2), "numbers": [1, 0.5], "integers": (1, 2), "mapping": {}},
        {"size": [1, 2], "integers": [], "layer": max, "anything": object(), "unannotated": 1},
    ],
)
def test_what_fits(values):
    check_types(function, values)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("integer", 1.0, TypeError, "integer must be an integer, got 1.0"),
        ("integer", True, TypeError, "integer must be an integer, got True"),
        ("number", "1", TypeError, "number must be a number or None, got '1'"),
        ("flag", 1, TypeError, "flag must be a boolean, got 1"),
        ("text", None, TypeError, "text must be a string, got None"),
        ("choice", "fp16", ValueError, r"choice must be one of bf16, fp32, got 'fp16'; did you mean 'bf16'\?"),
        ("choice", "double", ValueError, "choice must be one of bf16, fp32, got 'double'$"),
        ("size", (1, 2, 3), TypeError, r"size must be an integer or a pair of integers, got \(1, 2, 3\)"),
        ("numbers", 0.5, TypeError, "numbers must be a list of numbers, got 0.5"),
        ("integers", "12", TypeError, "integers must be a list of integers, got '12'"),
        ("integers", [1, None], TypeError, r"integers must be a list of integers, got \[1, None\]"),
        ("mapping", [], TypeError, r"mapping must be a mapping or None, got \[\]"),
        ("layer", 3, TypeError, "layer must be a Callable, got 3"),
    ],
)
def test_what_does_not_fit(name, value, error, message):
    with pytest.raises(error, match=message):
        check_types(function, {name: value})
    with pytest.raises(error, match=f"^group.{message}"):
        check_types(function, {name: value}, "group.")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: check_choice("head", "lin", {"linear": 1, "mlp": 2}),
            ValueError,
            "head must be one of linear, mlp, got",
        ),
        (lambda: check_at_least("n", math.nan, 0), ValueError, "n must be at least 0, got nan"),
        (lambda: check_rate("rate", 1.0), ValueError, "rate must be at least 0 and below 1, got 1.0"),
        (lambda: check_rate("rate", math.nan), ValueError, "rate must be .* got nan"),
        (lambda: positive_int("n", 2.0), TypeError, "n must be an integer, got 2.0"),
        (lambda: positive_int("n", 0), ValueError, "n must be at least 1, got 0"),
        (lambda: size_pair("size", "12"), TypeError, "size must be an integer or a pair .* got '12'"),
        (lambda: size_pair("size", (3, 2), 3), ValueError, r"size must be at least 3 on each side, got \(3, 2\)"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sizes():
    assert size_pair("size", 3) == size_pair("size", [3, 3]) == (3, 3)
    assert size_pair("size", (np.int64(2), 3)) == (2, 3)


def test_the_nearest_name():
    assert did_you_mean("epoch", ["epochs", "seed"]) == "; did you mean 'epochs'?"
    assert did_you_mean("xyz", ["epochs", "seed"]) == did_you_mean(None, ()) == ""


NAMES: Mapping[str, str] = {"root": "data"}


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (ValueError("root must be a folder, got root"), ValueError, "^data must be a folder, got root$"),
        (TypeError("root: expected a folder"), TypeError, "^data: expected a folder$"),
        (ValueError("roots must be folders"), ValueError, "^roots must be folders$"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "root"), UnicodeDecodeError, "root"),
        (OSError("root is gone"), OSError, "^root is gone$"),
    ],
)
def test_an_error_speaks_of_the_users_argument(raised, error, message):
    with pytest.raises(error, match=message), renamed(NAMES):
        raise raised
