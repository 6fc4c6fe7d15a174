"""Whether one commit is slower than another: their stored ratios to the same opponents, measured on the same machine.

    python -m benchmarks.compare main~1 main

Ratios, not times, are compared: contestants take turns in one process, so a ratio survives a slower day. Exits with 1
where one of ours fell by more than 5%, or was lost: A has it, and B raced the case without it. Exits with 2 where there
is nothing to compare. Rows of a tree whose files differed from its commit are not that commit's, and are left out.
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

Key = tuple[str, str, str]  # what was measured and where, contestant, opponent


def measured_at(rows: Iterable[Mapping[str, Any]], commit: str) -> tuple[list[Mapping[str, Any]], int]:
    """The rows of a commit as it is, and how many there are of it with changed files.

    Args:
        rows: Of any benchmarks.
        commit: The whole name, or its beginning.
    """
    found = [row for row in rows if str(row["conditions"]["commit"]).startswith(commit)]
    kept = [row for row in found if not row["conditions"]["dirty"]]
    return kept, len(found) - len(kept)


def ratios(rows: Iterable[Mapping[str, Any]]) -> dict[Key, float]:
    """How many times faster than each opponent each of ours was, the last time that it was measured."""
    found = {}
    for row in rows:
        if row.get("contestant") in OURS:
            for opponent, ratio in row.get("times_faster_than", {}).items():
                if opponent not in OURS:
                    found[_what(row), row["contestant"], opponent] = ratio
    return found


def lost(before: Mapping[Key, float], after: Mapping[Key, float], raced: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each ratio that only `before` has, of what `raced`, the rows of `after`, have at all."""
    cases = {_what(row) for row in raced}
    for key in sorted(before.keys() - after.keys()):
        if key[0] in cases:
            yield f"   lost  {before[key]:.2f}x to -  {_named(key)}"


def _what(row: Mapping[str, Any]) -> str:
    given = {name: row["arguments"][name] for name in ("model", "dtype", "batch") if name in row["arguments"]}
    return json.dumps([row["benchmark"], row.get("op"), row.get("case"), given, machine(row)])


def _named(key: Key) -> str:
    what, contestant, opponent = key
    return f"{contestant} over {opponent}: {', '.join(str(part) for part in json.loads(what) if part)}"


def lines(before: Mapping[Key, float], after: Mapping[Key, float]) -> Iterator[tuple[float, str]]:
    """(ratio after over ratio before, text) of what both have."""
    for key in before.keys() & after.keys():
        change = after[key] / before[key]
        yield change, f"{change - 1:+7.1%}  {before[key]:.2f}x to {after[key]:.2f}x  {_named(key)}"


def resolve(name: str) -> str:
    """The whole name of a commit; the name itself where git does not know it."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return name
    return done.stdout.strip() or name


def main(arguments: list[str] | None = None) -> int:
    """Print every ratio that was lost, and every one that both commits have, those that fell most first."""
    parser = argparse.ArgumentParser("python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", metavar="A", help="commit, branch or tag that rows were measured at")
    parser.add_argument("after", metavar="B", help="the other one")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of the rows")
    parser.add_argument("--slack", type=float, default=SLACK, help="share by which a ratio may fall (default: 0.05)")
    options = parser.parse_args(arguments)
    if not 0 <= options.slack < 1:
        parser.error(f"--slack must be from 0 to below 1, got {options.slack}")
    rows = [row for name in FILES for row in read_rows(options.results / f"{name}.jsonl")]
    sides = []
    for name in (options.before, options.after):
        kept, dirty = measured_at(rows, resolve(name))
        if not kept:
            why = f"; {dirty} were with changed files, which are not that commit" if dirty else ""
            parser.error(f"no row was measured at {name}{why}")
        if dirty:
            print(f"left out: {dirty} rows of {name}, measured with changed files")
        sides.append(kept)
    before, after = map(ratios, sides)
    gone, compared = list(lost(before, after, sides[1])), sorted(lines(before, after))
    if not compared and not gone:
        parser.error(
            "the two commits have no measurement in common: run the same benchmark on the same machine at both"
        )
    print(*gone, *(text for _, text in compared), sep="\n")
    fallen = [text for change, text in compared if change < 1 - options.slack]
    print(f"{len(fallen)} of {len(compared)} ratios fell by more than {options.slack:.0%}, {len(gone)} were lost")
    return 1 if fallen or gone else 0


if __name__ == "__main__":
    sys.exit(main())
