"""`make test-abi`: a wheel built against the torch at hand loads and computes under other versions, and the reverse.

Makes an environment for each version in a temporary folder (2.11.0 comes with gigabytes of CUDA) and takes minutes.
Other versions: `python -m tests.abi torch==2.12.1`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.metadata import requires
from pathlib import Path

from tests.source_tree import copy_sources

VERSIONS = ("torch==2.13.0", "torch==2.11.0")
BUILD_REQUIREMENTS = ("setuptools>=77", "ninja", "pybind11>=3")

CHECK = """
import torch
from simmim_fast import _native
from simmim_fast.ops import substitute_mask_tokens

assert _native.why_not("cpu") is None, _native.why_not("cpu")
assert _native.build_info()["cuda_reason"] or torch.version.cuda is None or _native.why_not("cuda") is None
x = torch.randn(2, 5, 3, 24).bfloat16()
mask = torch.rand(2, 5, 3) < 0.6
parameters = torch.randn(24), torch.randn(5, 3, 24)


def run(backend):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *parameters)]
    out = substitute_mask_tokens(leaves[0], mask, *leaves[1:], backend=backend)
    return out, *torch.autograd.grad(out.square().sum(), leaves)


for name, native, reference in zip(("out", "x", "mask_token", "pos_embed"), run("native"), run("reference")):
    torch.testing.assert_close(native, reference, msg=lambda message: f"{name}: {message}")
cuda = _native.why_not("cuda") or "loads"
print(f"ok: built against torch {_native.build_info()['torch']}, run under {torch.__version__}; CUDA library: {cuda}")
"""


def build_wheel(python: Path | str, folder: Path) -> Path:
    """The wheel that this interpreter's torch gives, built from a copy of the sources."""
    tree = folder / "tree"
    copy_sources(tree)
    pip(python, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(tree))
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, torch: str) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    package_requirements = [line for line in requires("simmim_fast") if "extra ==" not in line]
    pip(python, "install", torch, *package_requirements, *BUILD_REQUIREMENTS)
    return python


def pip(python: Path | str, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def check(python: Path | str, wheel: Path, folder: Path) -> None:
    """Runs the check on the wheel's own files, whatever is installed beside them."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{CHECK}"
    subprocess.run([str(python), "-c", program], cwd=folder, check=True)


def main(versions: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        wheel = build_wheel(sys.executable, work / "here")
        for torch in versions:
            print(f"== {torch}", flush=True)
            folder = work / torch
            python = make_environment(folder / "environment", torch)
            check(python, wheel, folder / "built here")
            check(sys.executable, build_wheel(python, folder / "there"), folder / "built there")
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:] or list(VERSIONS))
