"""`make test-triton`: the kernels under other versions of triton than the one at hand, interpreted and compiled.

Installs each version, and what it needs of other packages, into a temporary folder, which goes before the environment's
own, and runs what `make test` runs of kernels: the interpreter, and the fast offline compilations. A version takes
minutes. Other versions: `python -m tests.triton_versions 3.7.1`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.6.0", "3.9.0")
BESIDE = {"3.6.0": ("numpy<2.4",)}  # whose interpreter takes no newer one
RUNS = (["tests/ops/test_triton_interpreter.py", "-m", "not slow"], ["tests/ops", "-m", "compiles and not slow"])
PYTEST = ("-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def install(version: str, folder: Path) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder))
    packages = (f"triton=={version}", *BESIDE.get(version, ()))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *packages], check=True)


def passes(options: list[str], triton: Path) -> bool:
    """Whether pytest passes where this triton is found first, with a cache of its own."""
    environment = os.environ | {"PYTHONPATH": str(triton), "TRITON_CACHE_DIR": str(triton / "cache")}
    environment.setdefault("OMP_NUM_THREADS", "1")
    return subprocess.run([sys.executable, *PYTEST, *options], cwd=ROOT, env=environment, check=False).returncode == 0


def main(versions: list[str]) -> None:
    failed = []
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            print(f"== triton {version}", flush=True)
            install(version, Path(folder))
            if not all([passes(options, Path(folder)) for options in RUNS]):  # a list, so that both are run
                failed.append(version)
    if failed:
        sys.exit(f"failed under triton {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(VERSIONS))
