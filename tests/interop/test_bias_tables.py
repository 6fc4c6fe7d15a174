from __future__ import annotations

import pytest
import torch

from simmim_fast.interop import resize_relative_position_bias
from tests import golden_data


@pytest.mark.parametrize(("source", "target"), [(3, 6), (6, 7)], ids=["3 to 6", "6 to 7"])
def test_equals_official(source: int, target: int) -> None:
    tables, _ = golden_data.read_case("relative_position_bias_resize")
    case = f"swin_window{source}_to_{target}"
    resized = resize_relative_position_bias(tables[f"{case}.source"], source, target)
    torch.testing.assert_close(resized, tables[f"{case}.target"], rtol=1e-6, atol=1e-6)


def test_the_same_window_changes_nothing() -> None:
    table = torch.randn(13 * 13, 2)
    assert torch.equal(resize_relative_position_bias(table, 7, (7, 7)), table)


@pytest.mark.parametrize("target", [4, 8, (6, 9), (5, 12)], ids=str)
def test_constants_and_symmetry_are_kept(target: int | tuple[int, int]) -> None:
    constant = resize_relative_position_bias(torch.full((121, 1), 0.25), 6, target)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.25))
    table = torch.randn(121, 3, dtype=torch.float64)
    resized = resize_relative_position_bias(table, 6, target)
    # Row n - 1 - i holds the opposite offset of row i.
    torch.testing.assert_close(resize_relative_position_bias(table.flip(0), 6, target), resized.flip(0))


def test_axes_are_height_then_width() -> None:
    table = torch.arange(9.0).repeat(5).reshape(-1, 1)  # window (3, 5): the bias depends on the column alone
    taller = resize_relative_position_bias(table, (3, 5), (6, 5))
    torch.testing.assert_close(taller, torch.arange(9.0).repeat(11).reshape(-1, 1))
    transposed = table.reshape(5, 9).t().reshape(-1, 1)
    wide = resize_relative_position_bias(table, (3, 5), (6, 8)).reshape(11, 15)
    torch.testing.assert_close(resize_relative_position_bias(transposed, (5, 3), (8, 6)).reshape(15, 11), wide.t())


def test_class_token_rows_are_kept() -> None:
    table = torch.randn(25 + 3, 4)
    resized = resize_relative_position_bias(table, 3, 6)
    assert torch.equal(resized[:-3], resize_relative_position_bias(table[:25], 3, 6))
    assert torch.equal(resized[-3:], table[-3:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_kept_and_gradient_is_not(dtype: torch.dtype) -> None:
    table = torch.nn.Parameter(torch.randn(25, 2, dtype=dtype))
    resized = resize_relative_position_bias(table, 3, 5)
    assert (resized.shape, resized.dtype, resized.requires_grad) == ((81, 2), dtype, False)


@pytest.mark.parametrize(
    ("shape", "source", "target", "error", "message"),
    [
        ((25, 2), 4, 6, ValueError, r"table must be \(49, heads\), or \(52, heads\).*source_window 4, got \(25, 2\)"),
        ((25,), 3, 6, ValueError, r"got \(25,\)"),
        ((9, 2), 2, 6, ValueError, "source_window must be at least 3 on each side, got 2"),
        ((25, 2), 3, 0, ValueError, "target_window must be at least 1 on each side, got 0"),
        ((25, 2), 3.0, 6, TypeError, r"source_window .* got 3\.0"),
        ((25, 2), 3, (6, 6, 6), TypeError, r"target_window .* got \(6, 6, 6\)"),
    ],
    ids=["other window", "one dimension", "small source", "no target", "float", "triple"],
)
def test_bad_input(shape, source, target, error, message) -> None:
    with pytest.raises(error, match=message):
        resize_relative_position_bias(torch.zeros(shape), source, target)
