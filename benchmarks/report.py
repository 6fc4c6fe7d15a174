"""Tables and pictures of the rows under benchmarks/results, in the documents; and the backends that "auto" takes.

python -m benchmarks.report            # write what has changed
python -m benchmarks.report --check    # exit with 1 where a file is not what the rows make it
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import aims, measured, op_page, plots, profiles, tables, traffic_page
from benchmarks.results import RESULTS, ROOT, read_rows
from benchmarks.tables import Row

FILES = ("step", "ops", "parity", "loader", "traffic")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
FIGURES = Path("docs/figures")
_SECTION = "<!-- {name}: made by python -m benchmarks.report -->\n{text}<!-- end of {name} -->"


def pages(rows: Sequence[Row], documents: Mapping[str, str]) -> dict[str, str]:
    """What every file is to hold.

    Args:
        rows: All rows, in order.
        documents: Texts of the files with sections that are made, by path from the root of the checkout.

    Returns:
        Texts by path: those documents, docs/ops.md, docs/traffic.md, simmim_fast/_measured.py and the pictures.

    Raises:
        ValueError: A document names a section that is not made here, or does not end one.
    """
    pictures = figures(rows)
    made = sections(rows, pictures)
    texts = {path: fill(text, made, path) for path, text in documents.items()}
    texts["docs/ops.md"] = op_page.render(rows)
    texts["docs/traffic.md"] = traffic_page.render(rows)
    texts["simmim_fast/_measured.py"] = measured.render(rows)
    return {**texts, **{str(FIGURES / f"{name}.svg"): text for name, text in pictures.items()}}


def figures(rows: Sequence[Row]) -> dict[str, str]:
    """The pictures that there are rows for, by name."""
    makers = {"step": plots.step_plot, "parity": plots.parity_plot, "roofline": plots.roofline_plot}
    drawn = {f"{name}_{device}": make(rows, device) for name, make in makers.items() for device in DEVICES}
    return {name: text for name, text in drawn.items() if text is not None}


def sections(rows: Sequence[Row], pictures: Iterable[str]) -> dict[str, str]:
    """The text of every section, by name."""
    made = {
        "step": _by_device(rows, tables.step_tables, "step", pictures),
        "other methods": _by_device(rows, tables.other_methods),
        "parity": _by_device(rows, tables.parity_table, "parity", pictures),
        "first screen": _by_device(rows, tables.first_screen),
        "loader": list(tables.loader_table(rows)),
        "aims": list(aims.aims_table(rows)),
        "profile": _by_device(rows, profiles.profile_table),
        "roofline": [
            line
            for device, title in DEVICES.items()
            for line in _picture(f"roofline_{device}", title, pictures) or (f"{title}: not measured yet.", "")
        ],
    }
    return {name: "\n".join(["", *lines]) + "\n" for name, lines in made.items()}


def _by_device(
    rows: Sequence[Row],
    make: Callable[[Sequence[Row], str], Iterable[str]],
    picture: str | None = None,
    pictures: Iterable[str] = (),
) -> list[str]:
    lines = []
    for device, title in DEVICES.items():
        lines += [f"On the {title}:", "", *make(rows, device)]
        if picture is not None:
            lines += _picture(f"{picture}_{device}", title, pictures)
    return lines


def _picture(name: str, title: str, pictures: Iterable[str]) -> tuple[str, ...]:
    return (f"![{title}](figures/{name}.svg)", "") if name in pictures else ()


def fill(text: str, made: Mapping[str, str], path: str) -> str:
    """The text with its sections as they are made.

    Raises:
        ValueError: A section is unknown or has no end.
    """
    names = re.findall(r"<!-- ([a-z ]+): made by python -m benchmarks\.report -->", text)
    for name in names:
        pattern = (
            re.escape(_SECTION.partition("\n")[0].format(name=name)) + ".*?" + re.escape(f"<!-- end of {name} -->")
        )
        if name not in made:
            raise ValueError(f"{path}: the section {name!r} is none of {', '.join(made)}")
        section = _SECTION.format(name=name, text=made[name])
        text, count = re.subn(pattern, lambda _, section=section: section, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{path}: the section {name!r} must begin and end once, got {count} of it")
    return text


def current(results: Path = RESULTS) -> dict[str, str]:
    """What every file is to hold by the rows that are stored."""
    rows = [row for name in FILES for row in read_rows(results / f"{name}.jsonl")]
    documents = {path: (ROOT / path).read_text("utf-8") for path in ("docs/benchmarks.md", "README.md")}
    return pages(rows, documents)


def stale(texts: Mapping[str, str]) -> list[str]:
    """The files that hold something else."""
    files = {path: ROOT / path for path in texts}
    return [path for path, file in files.items() if not file.is_file() or file.read_text("utf-8") != texts[path]]


def main(arguments: list[str] | None = None) -> None:
    """Write or check."""
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file would change")
    options = parser.parse_args(arguments)
    texts = current()
    changed = stale(texts)
    if options.check and changed:
        sys.exit(f"not what the rows make them: {', '.join(changed)}; run python -m benchmarks.report")
    for path in changed:
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_text(texts[path], encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
