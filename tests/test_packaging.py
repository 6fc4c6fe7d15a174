"""What is installed from the sources: compiled where it can be, pure Python with a reason where it cannot.

Every case builds a copy of the tree, with the environment's own setuptools unless it says otherwise.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from simmim_fast import _native
from simmim_fast.testing.offline import TOOLS
from tests.source_tree import ROOT, copy_sources

PACKAGE = ROOT / "simmim_fast"
BUILD_REQUIREMENTS = ("setuptools", "ninja", "pybind11")
BUILD_VARIABLES = (
    "CXX",
    "CUDA_HOME",
    "MAX_JOBS",
    "TORCH_CUDA_ARCH_LIST",
    "SIMMIM_FAST_CUDA",
    "SIMMIM_FAST_REQUIRE_EXT",
)


@pytest.fixture
def tree(tmp_path) -> Path:
    """The sources alone, in a folder whose name has a space."""
    tree = tmp_path / "a copy"
    copy_sources(tree)
    return tree


def run(
    tree: Path, *arguments: str, python: Path | str = sys.executable, **variables: str
) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=tree, env=environment | variables, capture_output=True, text=True)


def build_wheel(tree: Path, python: Path | str = sys.executable, **variables: str) -> tuple[Path, list[str], str]:
    """The wheel, the files of the package in it, and what the build said."""
    result = run(tree, "setup.py", "--quiet", "bdist_wheel", python=python, **variables)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel, archive.namelist(), result.stderr


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()


def assert_pure(tree: Path, reason: str, python: Path | str = sys.executable, **variables: str) -> None:
    wheel, files, said = build_wheel(tree, python, **variables)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in files if name.endswith(".so")]
    assert reason in read(wheel, "simmim_fast/lib/not_built.txt")
    assert [line for line in said.splitlines() if "installed as pure Python" in line and reason in line]


@pytest.fixture
def bare_python(tmp_path) -> Path:
    """An interpreter that finds the build requirements, and no torch."""
    environment = tmp_path / "bare"
    venv.create(environment, symlinks=True)
    site = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for requirement in BUILD_REQUIREMENTS:
        for file in distribution(requirement).files:
            top = file.parts[0]
            if top != ".." and not (site / top).exists():
                (site / top).symlink_to(distribution(requirement).locate_file(top))
    return environment / "bin" / "python"


def test_without_a_compiler_it_is_pure_python(tree):
    assert_pure(tree, "no C++ compiler (/nonexistent/g++)", CXX="/nonexistent/g++")


def test_without_torch_it_is_pure_python(tree, bare_python):
    assert_pure(tree, "no torch in ", python=bare_python)


def test_with_an_old_torch_it_is_pure_python(tree, bare_python):
    old = (
        bare_python.parent.parent / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages/torch"
    )
    old.mkdir()
    (old / "__init__.py").touch()
    (old / "version.py").write_text("__version__ = '2.9.1+cu128'\n")
    assert_pure(tree, "torch 2.9.1+cu128 is too old", python=bare_python)


def test_a_compiled_install_can_be_required(tree):
    result = run(tree, "setup.py", "bdist_wheel", CXX="/nonexistent/g++", SIMMIM_FAST_REQUIRE_EXT="1")
    assert result.returncode != 0
    assert "SIMMIM_FAST_REQUIRE_EXT=1 forbids a pure-Python install" in result.stderr
    assert not list(tree.glob("dist/*.whl"))


@pytest.mark.parametrize("how", ["on PATH", "in CUDA_HOME"])
def test_cuda_can_be_required(tree, how):
    nowhere = {"CUDA_HOME": "/nonexistent"} if how == "in CUDA_HOME" else {"PATH": path_without_nvcc()}
    result = run(tree, "setup.py", "bdist_wheel", SIMMIM_FAST_CUDA="1", **nowhere)
    assert result.returncode != 0
    assert "SIMMIM_FAST_CUDA=1, but no nvcc in CUDA_HOME or on PATH" in result.stderr


def test_refuses_architectures_that_are_no_numbers(tree):
    if shutil.which("nvcc") is None:
        pytest.skip("not run: no nvcc on PATH")
    result = run(tree, "setup.py", "bdist_wheel", TORCH_CUDA_ARCH_LIST="Hopper")
    assert result.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: expected numbers such as" in result.stderr


def test_the_source_distribution_holds_the_sources(tree):
    result = run(tree, "setup.py", "--quiet", "sdist")
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {Path(*Path(name).parts[1:]) for name in files.getnames()}
    sources = {path.relative_to(tree) for path in (tree / "csrc").rglob("*") if path.is_file()}
    modules = {path.relative_to(tree) for path in (tree / "simmim_fast").rglob("*.py")}
    assert len(sources) > 5
    assert len(modules) > 5
    assert sources | modules | {Path("setup.py"), Path("pyproject.toml"), Path("LICENSE")} <= names


def test_the_cuda_library_spills_no_registers():
    """Local memory and stack are where spilled registers go."""
    if (reason := _native.build_info()["cuda_reason"]) != "":
        pytest.skip(f"not run: the CUDA kernels are not compiled: {reason}")
    command = [TOOLS / "cuobjdump", "-res-usage", PACKAGE / "lib" / "ops_cuda.so"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    architectures = re.sub(r"\.|\+PTX", "", _native.build_info()["cuda_architectures"]).split(";")
    assert set(re.findall(r"arch = sm_(\w+)", usage)) == set(architectures)
    kernels = [line for line in usage.splitlines() if "REG:" in line]
    assert len(kernels) >= len(architectures)
    assert [line for line in kernels if " STACK:0 " not in line or " LOCAL:0 " not in line] == []


def test_the_cuda_library_needs_torch_and_no_cuda_runtime():
    if (reason := _native.build_info()["cuda_reason"]) != "":
        pytest.skip(f"not run: the CUDA kernels are not compiled: {reason}")
    needed = subprocess.run(["readelf", "-d", PACKAGE / "lib" / "ops_cuda.so"], capture_output=True, text=True).stdout
    assert "[libtorch_cuda.so]" in needed
    assert "libcudart" not in needed


def path_without_nvcc() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not Path(folder, "nvcc").exists())


@pytest.mark.slow
def test_an_isolated_install_without_nvcc_compiles_the_cpu_part(tree, tmp_path):
    """pip hides the installed packages from the build, and torch is no build requirement, yet it is found."""
    result = run(tree, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(tmp_path), ".", PATH=path_without_nvcc())
    assert result.returncode == 0, result.stderr
    printed = result.stdout + result.stderr  # pip's versions differ in where they put what a build prints
    assert "built without CUDA kernels: no nvcc in CUDA_HOME or on PATH" in printed
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "simmim_fast"
    assert [path.name for path in package.glob("lib/*")] == ["ops_cpu.so"]
    program = "from simmim_fast import _native as n; print(n.__file__, n.why_not('cpu'), n.why_not('cuda'), sep='|')"
    result = run(tmp_path, "-c", program, PYTHONPATH=str(package.parent))
    file, cpu, cuda = result.stdout.strip().split("|")
    assert Path(file).is_relative_to(package)
    assert (cpu, cuda) == ("None", "built without CUDA kernels: no nvcc in CUDA_HOME or on PATH")
