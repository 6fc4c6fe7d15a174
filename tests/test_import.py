"""What `import simmim_fast` costs and pulls in."""

from __future__ import annotations

import json
import subprocess
import sys

# Everything else that an import pulls in costs every user's start.
ALLOWED = {"simmim_fast"}
PROBE = """
import json, sys, torch
before = set(sys.modules)
import simmim_fast
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_import_pulls_in_nothing_beyond_torch_and_the_standard_library():
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    imported = set(json.loads(result.stdout))
    assert "simmim_fast" in imported
    assert imported - sys.stdlib_module_names <= ALLOWED


def test_public_names_exist():
    import simmim_fast

    assert all(hasattr(simmim_fast, name) for name in simmim_fast.__all__)
