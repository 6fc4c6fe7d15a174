"""What `import simmim_fast` costs and pulls in."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torchvision", "timm", "transformers", "matplotlib", "triton", "scipy", "PIL", "rich", "jsonargparse", "yaml")
PROBE = """
import json, sys, torch
before = set(sys.modules)
import simmim_fast
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


@pytest.fixture(scope="module")
def imported() -> list[str]:
    """Top-level modules that the package imports beyond those of torch, in a fresh process."""
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("module", HEAVY)
def test_import_leaves_out(module, imported):
    assert module not in imported


def test_public_names_exist():
    import simmim_fast

    assert all(hasattr(simmim_fast, name) for name in simmim_fast.__all__)
