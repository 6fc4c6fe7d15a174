"""Builds what is compiled: `_C` (pybind11), `lib/ops_cpu.so` and, where nvcc is found, `lib/ops_cuda.so`.

The ops use LibTorch's stable ABI alone, so one build loads in every torch >= 2.11. torch is searched, never imported,
and no build requirement: an isolated build would download gigabytes of it. Without torch or a compiler the package is
installed as pure Python and `simmim_fast/lib/not_built.txt` keeps the reason; a compiler that fails is an error.

Environment: CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST ("8.0;9.0a;10.0+PTX"), MAX_JOBS, SIMMIM_FAST_CUDA (0: without CUDA, 1:
fail where nvcc is missing), SIMMIM_FAST_REQUIRE_EXT (1: fail instead of installing pure Python).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.build import build
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WORK = ROOT / "build" / "native"
TORCH_TARGET = "0x020b000000000000"  # 2.11, as LibTorch encodes versions
ARCHITECTURES = "8.0;9.0a;10.0+PTX"
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
AVX512_FLAGS = "-mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized"  # g++ 12 warns of its intrinsics
# csrc/cpu/*_kernels.cpp are compiled once for each; csrc/cpu/simd.h says what they are.
X86_LEVELS = {
    "baseline": "",
    "avx2": "-march=x86-64-v3",
    "avx512": f"-march=x86-64-v4 {AVX512_FLAGS}",
    "avx512_bf16": f"-march=x86-64-v4 -mavx512bf16 {AVX512_FLAGS}",
}
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -DUSE_CUDA"


class Missing(Exception):
    """A part of the toolchain is not there; the message is the reason that users read."""


@dataclass(frozen=True)
class Toolchain:
    compiler: list[str]
    torch: Path
    torch_version: str


@functools.cache
def find_toolchain() -> Toolchain | Missing:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    try:
        if sys.platform != "linux":
            raise Missing(f"the compiled parts are built on Linux, this is {sys.platform}")
        if shutil.which(compiler[0]) is None:
            raise Missing(f"no C++ compiler ({compiler[0]}); name one with CXX=...")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise Missing(f"Python's headers are not in {sysconfig.get_path('include')}")
        return Toolchain(compiler, *find_torch())
    except Missing as reason:
        return reason


def find_torch() -> tuple[Path, str]:
    """Folder and version of the installed torch, without importing it.

    pip's isolated builds hide the environment's packages from `import`, but sysconfig still names their folder.
    """
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else Path(sysconfig.get_path("purelib"), "torch")
    if not (folder / "version.py").exists():
        raise Missing(f"no torch in {folder.parent}; install torch first, then this package again")
    version = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())[1]
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 11):
        raise Missing(f"torch {version} is too old; 2.11 is the oldest that works")
    return folder, version


def find_nvcc() -> str:
    wish, home = os.environ.get("SIMMIM_FAST_CUDA"), os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if wish == "0":
        raise Missing("SIMMIM_FAST_CUDA=0")
    if nvcc is None:
        reason = "no nvcc in CUDA_HOME or on PATH"
        raise PlatformError(f"simmim_fast: SIMMIM_FAST_CUDA=1, but {reason}") if wish == "1" else Missing(reason)
    return nvcc


def cuda_architectures(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or those of the default architectures that this nvcc knows."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST")
    architectures = re.split(r"[;, ]+", (wish or ARCHITECTURES).strip())
    if not all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture) for architecture in architectures):
        raise PlatformError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as {ARCHITECTURES}, got {wish}")
    known = output_of([nvcc, "--list-gpu-code"]).split()
    chosen = [one for one in architectures if wish or "sm_" + re.sub(r"\D", "", one) in known]
    if not chosen:
        raise Missing(f"{nvcc} knows none of the architectures {ARCHITECTURES}; name others in TORCH_CUDA_ARCH_LIST")
    return chosen


def code_flag(architecture: str) -> str:
    """nvcc's flag for machine code, and for PTX too, which later GPUs compile, where "+PTX" asks for it."""
    number, _, ptx = architecture.replace(".", "").partition("+")
    return f"-gencode=arch=compute_{number},code=" + (f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}")


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def quote(*arguments: str | Path) -> str:
    """For a shell command inside build.ninja."""
    return shlex.join(map(str, arguments)).replace("$", "$$")


def jobs() -> int:
    """MAX_JOBS, or as many as there are cores and 4 GB of memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    return int(os.environ.get("MAX_JOBS") or max(1, min(len(os.sched_getaffinity(0)), memory // 4)))


@dataclass(frozen=True)
class Library:
    """A shared library: its place in the package, and what it is made of."""

    path: str
    sources: list[Path]
    compiler: str
    flags: str
    link_flags: str = ""
    levels: dict[str, str] = field(default_factory=dict)  # SIMD level -> its flags

    @property
    def objects(self) -> list[tuple[Path, Path, str]]:
        """Source, object and flags of each compilation. The levels come from the lowest to the highest: of an inline
        function that several have emitted the linker keeps the first."""
        kernels = [source for source in self.sources if source.stem.endswith("_kernels") and self.levels]
        plain = [(source, "", "") for source in self.sources if source not in kernels]
        levels = [
            (source, f".{level}", f" -DSIMMIM_FAST_LEVEL={level} {flags}")
            for level, flags in self.levels.items()
            for source in kernels
        ]
        return [
            (source, WORK / f"{source.relative_to(CSRC)}{suffix}.o", self.flags + flags)
            for source, suffix, flags in plain + levels
        ]

    @property
    def built(self) -> Path:
        return WORK / Path(self.path).name


def build_requirement(name: str) -> ModuleType:
    """A package of pyproject's build requirements; missing only where pip was told not to isolate the build."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise PlatformError(f"simmim_fast: --no-build-isolation needs {name}: pip install {name}") from error


def cpu_libraries(toolchain: Toolchain) -> list[Library]:
    pybind11 = build_requirement("pybind11")
    compiler = quote(*toolchain.compiler)
    python = quote("-I", pybind11.get_include(), "-I", sysconfig.get_path("include"), "-I", WORK, "-I", CSRC)
    link_flags = quote("-L", toolchain.torch / "lib", "-ltorch_cpu", "-Wl,-z,defs")
    module, sources = "_C" + sysconfig.get_config_var("EXT_SUFFIX"), sorted(CSRC.glob("cpu/*.cpp"))
    levels = simd_levels(toolchain)
    flags = CXX_FLAGS + (" -DSIMMIM_FAST_X86_LEVELS" if len(levels) > 1 else "")
    return [
        Library(module, [CSRC / "host.cpp"], compiler, f"{flags} {python}"),
        Library("lib/ops_cpu.so", sources, compiler, f"{flags} {stable_abi(toolchain)}", link_flags, levels),
    ]


def simd_levels(toolchain: Toolchain) -> dict[str, str]:
    """SIMD levels that this compiler builds, with their flags: all by g++ 12 or newer for x86-64, else the base."""
    macros = output_of([*toolchain.compiler, "-dM", "-E", "-x", "c++", os.devnull])
    version = re.search(r"#define __GNUC__ (\d+)", macros)
    has_all = "#define __x86_64__ " in macros and "__clang__" not in macros and version and int(version[1]) >= 12
    return X86_LEVELS if has_all else {"baseline": ""}


def cuda_library(toolchain: Toolchain, nvcc: str, architectures: list[str]) -> Library:
    """nvcc links cudart statically. An empty libtorch_cuda.so on the link line records the dependency, so that a CPU
    build of torch is enough to compile against."""
    stub = WORK / "stub" / "libtorch_cuda.so"
    stub.parent.mkdir(parents=True, exist_ok=True)
    output_of([*toolchain.compiler, "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c", os.devnull, "-o", str(stub)])
    codes = quote(*map(code_flag, architectures))
    host = quote("-ccbin", toolchain.compiler[0], *(f"-Xcompiler={flag}" for flag in toolchain.compiler[1:]))
    flags = f"{NVCC_FLAGS} {host} {codes} {stable_abi(toolchain)}"
    folders = quote(f"-L{stub.parent}", f"-L{toolchain.torch}/lib")
    link_flags = f"{codes} -Xlinker=--no-as-needed {folders} -ltorch_cuda -ltorch_cpu"
    return Library("lib/ops_cuda.so", sorted(CSRC.glob("cuda/*.cu")), quote(nvcc), flags, link_flags)


def stable_abi(toolchain: Toolchain) -> str:
    return f"-DTORCH_TARGET_VERSION={TORCH_TARGET} " + quote("-I", CSRC, "-isystem", toolchain.torch / "include")


def compile_libraries(toolchain: Toolchain) -> list[Library]:
    """Compiles with ninja what has changed since the last time."""
    libraries = cpu_libraries(toolchain)
    compiler = output_of([*toolchain.compiler, "--version"]).splitlines()[0]
    info = {"compiler": compiler, "flags": CXX_FLAGS, "torch": toolchain.torch_version, "torch_target": TORCH_TARGET}
    info |= dict.fromkeys(("cuda_compiler", "cuda_flags", "cuda_architectures", "cuda_reason"), "")
    try:
        nvcc = find_nvcc()
        architectures = cuda_architectures(nvcc)
        libraries.append(cuda_library(toolchain, nvcc, architectures))
        info["cuda_compiler"] = re.search(r"release.*", output_of([nvcc, "--version"]))[0]
        info |= {"cuda_flags": NVCC_FLAGS, "cuda_architectures": ";".join(architectures)}
    except Missing as reason:
        info["cuda_reason"] = str(reason)
        print(f"simmim_fast: built without CUDA kernels: {reason}", file=sys.stderr)
    entries = "".join(f'    {{"{key}", R"({value})"}},\n' for key, value in info.items())
    (WORK / "build_info.h").write_text(f"static const char* const BUILD_INFO[][2] = {{\n{entries}}};\n")
    run_ninja(libraries)
    return libraries


def run_ninja(libraries: list[Library]) -> None:
    ninja = build_requirement("ninja")
    syntax = build_requirement("ninja.ninja_syntax")
    with open(WORK / "build.ninja", "w") as file:
        writer = syntax.Writer(file, width=120)
        writer.rule("compile", "$compiler $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        writer.rule("link", "$compiler -shared $in -o $out $flags")
        for library in libraries:
            variables = {"compiler": library.compiler}
            for source, target, flags in library.objects:
                writer.build(str(target), "compile", str(source), variables=variables | {"flags": flags})
            objects = [str(target) for _, target, _ in library.objects]
            writer.build(str(library.built), "link", objects, variables=variables | {"flags": library.link_flags})
    subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", WORK, "-j", str(jobs())], check=True)


class BuildNative(Command):
    """The step of `build` that compiles, or records why nothing was compiled."""

    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "simmim_fast"
        toolchain = find_toolchain()
        missing = isinstance(toolchain, Missing)
        if missing and os.environ.get("SIMMIM_FAST_REQUIRE_EXT") == "1":
            raise PlatformError(f"simmim_fast: {toolchain} (SIMMIM_FAST_REQUIRE_EXT=1 forbids a pure-Python install)")
        WORK.mkdir(parents=True, exist_ok=True)
        libraries = [] if missing else compile_libraries(toolchain)
        (package / "lib").mkdir(parents=True, exist_ok=True)
        for stale in [*package.glob("_C.*"), *package.glob("lib/*")]:
            stale.unlink()
        for library in libraries:
            shutil.copy2(library.built, package / library.path)
        if missing:
            (package / "lib" / "not_built.txt").write_text(f"{toolchain}\n")
            print(f"simmim_fast: installed as pure Python: {toolchain}", file=sys.stderr)

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()]


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class PlatformDistribution(Distribution):
    """Tagged for this platform exactly when something is compiled."""

    def has_ext_modules(self) -> bool:
        return not isinstance(find_toolchain(), Missing)


setup(distclass=PlatformDistribution, cmdclass={"build": Build, "build_native": BuildNative})
