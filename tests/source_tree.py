"""The sources of this package as a user has them: without what was compiled from them."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def copy_sources(tree: Path) -> None:
    """Copy what a build needs into a new folder."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "lib")
    for name in ("csrc", "simmim_fast"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
