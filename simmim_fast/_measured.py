"""Which backend "auto" takes on a GPU, where stored measurements of its architecture show one to be faster.

Written by `python -m benchmarks.report` from benchmarks/results/ops.jsonl; not by hand. Keys are a compute capability
and an op; the value is the backend whose forward and backward took less time over all cases that both were timed on, by
the geometric mean of the ratios. Without an entry "auto" keeps its order: Triton, native, reference.
"""

from __future__ import annotations

FASTEST: dict[tuple[tuple[int, int], str], str] = {}
