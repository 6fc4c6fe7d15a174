"""Which backend "auto" takes on a GPU, where stored measurements of its architecture show one to be faster.

Keys are a compute capability and an op. An entry stands on rows under benchmarks/results/ and names them; without one,
"auto" keeps its order: Triton, native, reference. No GPU has been measured yet.
"""

from __future__ import annotations

FASTEST: dict[tuple[tuple[int, int], str], str] = {}
