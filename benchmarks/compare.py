"""Whether one commit is slower than another: their stored ratios to the same opponents, measured on the same machine.

    python -m benchmarks.compare main~1 main

Ratios, not times, are compared: contestants take turns in one process, so a ratio survives a slower day. Exits with 1
where one of ours fell by more than 5%, and with 2 where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, ROOT, read_rows
from benchmarks.tables import machine
from benchmarks.trainees import FAST

FILES = ("step", "ops")
OURS = (*FAST, "native", "triton")
SLACK = 0.05


def ratios(rows: Iterable[Mapping[str, Any]], commit: str) -> dict[tuple[str, ...], float]:
    """How many times faster than each opponent each of ours was at a commit, the last time that it was measured.

    Args:
        rows: Of any benchmarks; those without ratios are passed over.
        commit: The whole name, or its beginning.

    Returns:
        By what was measured and where, contestant and opponent.
    """
    found = {}
    for row in rows:
        if not str(row["conditions"]["commit"]).startswith(commit) or row.get("contestant") not in OURS:
            continue
        given = {name: row["arguments"][name] for name in ("model", "dtype", "batch") if name in row["arguments"]}
        what = json.dumps([row["benchmark"], row.get("op"), row.get("case"), given, machine(row)])
        for opponent, ratio in row.get("times_faster_than", {}).items():
            if opponent not in OURS:
                found[what, row["contestant"], opponent] = ratio
    return found


def lines(
    before: Mapping[tuple[str, ...], float], after: Mapping[tuple[str, ...], float]
) -> Iterator[tuple[float, str]]:
    """(ratio after over ratio before, text) of what both have."""
    for key in before.keys() & after.keys():
        what, contestant, opponent = key
        named = ", ".join(str(part) for part in json.loads(what) if part)
        change = after[key] / before[key]
        text = f"{change - 1:+7.1%}  {before[key]:.2f}x to {after[key]:.2f}x  {contestant} over {opponent}: {named}"
        yield change, text


def resolve(name: str) -> str:
    """The whole name of a commit; the name itself where git does not know it."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return name
    return done.stdout.strip() or name


def main(arguments: list[str] | None = None) -> int:
    """Print every ratio that both commits have, those that fell most first."""
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", metavar="A", help="commit, branch or tag that rows were measured at")
    parser.add_argument("after", metavar="B", help="the other one")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of the rows")
    parser.add_argument("--slack", type=float, default=SLACK, help="share by which a ratio may fall (default: 0.05)")
    options = parser.parse_args(arguments)
    if not 0 <= options.slack < 1:
        parser.error(f"--slack must be from 0 to below 1, got {options.slack}")
    rows = [row for name in FILES for row in read_rows(options.results / f"{name}.jsonl")]
    sides = {name: ratios(rows, resolve(name)) for name in (options.before, options.after)}
    for name, side in sides.items():
        if not side:
            parser.error(f"no row of ours was measured at {name}")
    compared = sorted(lines(sides[options.before], sides[options.after]))
    if not compared:
        parser.error(
            "the two commits have no measurement in common: run the same benchmark on the same machine at both"
        )
    print(*(text for _, text in compared), sep="\n")
    fallen = [text for change, text in compared if change < 1 - options.slack]
    print(f"{len(fallen)} of {len(compared)} ratios fell by more than {options.slack:.0%}")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
