"""What all figures share: no global matplotlib state, no half-written files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

DOTS_PER_INCH = 150
INK = "#222222"
MUTED = "#777777"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of `width` x `height` inches that no backend shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG, replacing an older one only once the new one is complete."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", suffix=".png", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            figure.savefig(file, format="png")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
