"""The rows of queries in the references."""

from __future__ import annotations

import pytest
import torch

from simmim_fast.ops._checks import check_indices
from simmim_fast.ops._queries import query_rows

OUT = torch.arange(12.0).view(2, 3, 2)  # B, N, C


def test_takes_rows() -> None:
    rows = query_rows(OUT, torch.tensor([[2, 0], [1, 2]]))
    assert rows.tolist() == [[[4, 5], [0, 1]], [[8, 9], [10, 11]]]
    assert query_rows(OUT[:, :0], torch.empty(2, 0).int()).shape == (2, 0, 2)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (-1, "queries must be tokens from 0 to 2; got -1"),
        (3, "queries must be tokens from 0 to 2; got 3"),
        (2, "queries must be distinct tokens; got 2 twice in an image"),
    ],
)
def test_refuses_wrong_queries_on_the_cpu(query: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        query_rows(OUT, torch.tensor([[0, 1], [2, query]]))


def test_answers_wrong_queries_by_nan_where_they_are_not_read() -> None:
    """As on a GPU: a compiled graph reads no data either."""
    torch._dynamo.reset()
    out, queries = OUT.clone().requires_grad_(), torch.tensor([[0, -1], [3, 2]])
    rows = torch.compile(query_rows, backend="eager", fullgraph=True)(out, queries)
    assert rows.isnan().all(dim=2).tolist() == [[False, True], [True, False]]
    torch.nan_to_num(rows).sum().backward()
    assert out.grad[..., 0].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_indices_that_int32_cannot_hold_stay_out_of_range() -> None:
    indices = torch.tensor([[2**32 + 1, -(2**32) + 1, 2]])
    assert check_indices("queries", indices, 1, 3, "N").tolist() == [[2**31 - 1, -1, 2]]
