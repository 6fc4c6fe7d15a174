"""`simmim_fast/_measured.py`, which "auto" reads on a GPU, made of the rows of the ops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

KERNELS = ("triton", "native")
_HEADER = '''\
"""Which backend "auto" takes on a GPU, where stored measurements of its architecture show one to be faster.

Written by `python -m benchmarks.report` from benchmarks/results/ops.jsonl; not by hand. Keys are a compute capability
and an op; the value is the backend whose forward and backward took less time over all cases that both were timed on, by
the geometric mean of the ratios. Without an entry "auto" keeps its order: Triton, native, reference.
"""

from __future__ import annotations

FASTEST: dict[tuple[tuple[int, int], str], str] = {'''

Row = Mapping[str, Any]
Key = tuple[tuple[int, int], str]


def fastest(rows: Iterable[Row]) -> dict[Key, tuple[str, float, int, str]]:
    """The faster kernels by compute capability and op.

    Rows of a tree whose files differed from its commit choose nothing, as nobody can measure them again.

    Returns:
        Backend, how many times faster than the other it is, over how many cases, and the GPU's name.
    """
    times: dict[Key, dict[tuple[str, str], dict[str, float]]] = {}
    names = {}
    for row in rows:
        if row["benchmark"] != "op" or row["arguments"]["device"] != "cuda" or row["conditions"]["dirty"]:
            continue
        if "absent" in row:
            continue
        if row["contestant"] in KERNELS:
            gpu = row["conditions"]["gpus"][0]
            major, minor = (int(part) for part in str(gpu["capability"]).split("."))
            key, case = ((major, minor), row["op"]), (row["case"], row["arguments"]["dtype"])
            times.setdefault(key, {}).setdefault(case, {})[row["contestant"]] = row["us"]
            names[key] = gpu["name"]
    chosen = {}
    for key, cases in sorted(times.items()):
        ratios = [math.log(us["native"] / us["triton"]) for us in cases.values() if len(us) == len(KERNELS)]
        if ratios:
            mean = sum(ratios) / len(ratios)
            chosen[key] = ("triton" if mean >= 0 else "native", math.exp(abs(mean)), len(ratios), names[key])
    return chosen


def render(rows: Iterable[Row]) -> str:
    """The module's text."""
    return _HEADER + "".join(_entries(fastest(rows))) + "}\n"


def _entries(chosen: Mapping[Key, tuple[str, float, int, str]]) -> Iterator[str]:
    if chosen:
        yield "\n"
    for (capability, op), (backend, ratio, cases, gpu) in chosen.items():
        yield f'    ({capability}, "{op}"): "{backend}",  # {ratio:.2f}x over {cases} cases on {gpu}\n'
