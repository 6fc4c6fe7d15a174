"""What the compiled parts say of themselves, and why they are off where they are."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from simmim_fast import _native
from simmim_fast.ops._registration import OPS

HAS_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key


@pytest.fixture
def libraries(tmp_path, monkeypatch) -> Path:
    """An empty folder in the place of simmim_fast/lib."""
    monkeypatch.setattr(_native, "_LIBRARIES", tmp_path)
    return tmp_path


def test_the_cpu_library_is_loaded():
    assert _native.why_not("cpu") is None


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if "native" in op.implementations])
@pytest.mark.parametrize("suffix", ["", "_backward"], ids=["forward", "backward"])
def test_every_native_op_has_a_cpu_kernel(op, suffix):
    assert HAS_KERNEL(f"simmim_fast::{op}_native{suffix}", "CPU")


def test_cuda_kernels_are_registered_or_there_is_a_reason():
    registered = HAS_KERNEL("simmim_fast::substitute_mask_tokens_native", "CUDA")
    assert registered == (_native.why_not("cuda") is None)
    assert registered or len(_native.why_not("cuda").splitlines()) == 1


def test_build_info_is_complete():
    info = _native.build_info()
    assert info["reason"] is None
    assert "g++" in info["compiler"] or "clang" in info["compiler"] or "gcc" in info["compiler"]
    assert int(info["torch_target"], 16) >> 48 == 0x020B
    assert "-std=c++" in info["flags"]
    assert bool(info["cuda_architectures"]) != bool(info["cuda_reason"])
    assert bool(info["cuda_compiler"]) == bool(info["cuda_flags"]) == bool(info["cuda_architectures"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are those of x86-64")
def test_simd_level_is_that_of_the_processor():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    expected = "baseline"
    if {"avx2", "fma", "f16c", "bmi2", "movbe"} <= set(flags):
        expected = "avx2"
        if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= set(flags):
            expected = "avx512_bf16" if "avx512_bf16" in flags else "avx512"
    assert _native.simd_level() == expected


def test_says_why_nothing_was_compiled(libraries, monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    (libraries / "not_built.txt").write_text("no C++ compiler (g++); name one with CXX=...\n")
    reason = "installed as pure Python: no C++ compiler (g++); name one with CXX=..."
    assert (_native._load_cpu(), _native._load_cuda()) == (reason, reason)
    assert _native.build_info() == {"reason": reason}
    assert _native.simd_level() is None


def test_says_that_the_module_is_for_another_python(monkeypatch, tmp_path):
    (tmp_path / "_C.cpython-999-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_IMPORT_ERROR", ImportError("no module named _C"))
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    monkeypatch.setattr(_native, "_LIBRARIES", tmp_path / "lib")
    assert _native._load_cpu() == "_C.cpython-999-x86_64-linux-gnu.so does not load: no module named _C"


def test_says_that_a_source_tree_is_not_compiled(libraries, monkeypatch):
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "__file__", str(libraries / "_native.py"))
    assert _native._load_cpu() == "not compiled: install the package with pip, which compiles it"


def test_says_that_a_library_is_missing(libraries):
    assert _native._load_cpu() == f"{libraries / 'ops_cpu.so'} is missing: install the package again"


def test_says_that_a_library_does_not_load(libraries):
    (libraries / "ops_cpu.so").write_text("not a library")
    assert _native._load_cpu().startswith(f"ops_cpu.so does not load in torch {torch.__version__}: ")


def test_says_that_torch_has_no_cuda(monkeypatch):
    monkeypatch.setattr(_native, "_C", SimpleNamespace(build_info=lambda: {"cuda_reason": ""}))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _native._load_cuda() == f"torch {torch.__version__} is built without CUDA"


def test_says_that_cuda_was_not_compiled(monkeypatch):
    monkeypatch.setattr(_native, "_C", SimpleNamespace(build_info=lambda: {"cuda_reason": "no nvcc on PATH"}))
    assert _native._load_cuda() == "built without CUDA kernels: no nvcc on PATH"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0;9.0a;10.0+PTX", (8, 0), True),
        ("8.0;9.0a;10.0+PTX", (8, 9), True),
        ("8.0;9.0a;10.0+PTX", (9, 0), True),
        ("8.0;9.0a;10.0+PTX", (12, 0), True),
        ("8.0;9.0a;10.0+PTX", (7, 5), False),
        ("9.0a", (8, 0), False),
        ("9.0a", (10, 0), False),
        ("8.6", (8, 0), False),
        ("", (9, 0), False),
    ],
)
def test_knows_which_gpus_it_has_code_for(
    monkeypatch: pytest.MonkeyPatch, architectures: str, capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(_native, "_C", SimpleNamespace(build_info=lambda: {"cuda_architectures": architectures}))
    monkeypatch.setattr(_native, "_ARCHITECTURES", _native._architectures())
    assert _native.runs_on(capability) is runs
