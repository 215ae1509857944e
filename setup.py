"""Builds the compiled libraries of fastlm; everything else about the package is in pyproject.toml.

    library               holds                                                     needs
    fastlm/_cpu.so        the CPU kernels, once for each instruction set            a C++20 compiler
    fastlm/_cuda.so       cross entropy on a GPU, from sm_75 to sm_120              and nvcc
    fastlm/_packing*.so   bin packing                                               and pybind11

FASTLM_CUDA=0 leaves _cuda out though there is an nvcc; FASTLM_CUDA=1 makes a missing nvcc an error.

_cpu and _cuda know PyTorch only by its stable ABI and Python not at all: one build serves every torch >= 2.11. The work
is done by ninja in build/csrc, so a second build compiles what changed and nothing else.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "csrc"

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of 2.11; a newer call is a compile error
CPU_KERNELS = sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*_cpu.cpp"))
CPU_OPS = sorted({f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cpp")} - {*CPU_KERNELS, "csrc/packing.cpp"})
BF16_KERNELS = ["csrc/bf16_gemm_cpu.cpp", "csrc/cross_entropy_cpu.cpp"]  # what AVX512-BF16 pays for, measured
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mprefer-vector-width=512"]
# What the files of each x86 instruction set are compiled with; they are chosen among at run time.
INSTRUCTION_SETS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
GPU_TARGETS = [
    "arch=compute_75,code=sm_75",  # T4, RTX 20; what CUDA 13 compiles for at all
    "arch=compute_80,code=sm_80",  # and sm_86, sm_89
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=[sm_100,compute_100]",  # and sm_103; the last is PTX, for what comes after
    "arch=compute_120,code=sm_120",  # RTX 50, and sm_121
]


def stop(missing: str, remedy: str) -> NoReturn:
    """End the build with one message."""
    raise SystemExit(f"\nfastlm: {missing}\n        {remedy}\n")


def find_cxx() -> str:
    """The C++ compiler: $CXX, or the first of the usual names."""
    for name in filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]):
        if shutil.which(name.split()[0]):
            return name
    stop(
        "no C++ compiler was found",
        "install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install) or set CXX",
    )


def find_nvcc() -> str | None:
    """CUDA's compiler, or None where it is missing or FASTLM_CUDA=0."""
    wanted = os.environ.get("FASTLM_CUDA", "")
    if wanted not in ("", "0", "1"):
        stop(f"FASTLM_CUDA is {wanted!r}, expected 0 or 1", "0 builds no CUDA library, 1 fails where nvcc is missing")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home)) or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        stop("FASTLM_CUDA=1, but nvcc was not found", "install the CUDA toolkit (12.9 or newer) or set CUDA_HOME to it")
    return nvcc


def find_ninja() -> str:
    """Ninja: that of the Python package, else the one on PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        return found or stop("ninja was not found", "install it with: pip install ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def torch_includes() -> list[str]:
    """The headers of the torch that is installed."""
    try:
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        stop(
            "torch is not installed, and its headers are needed",
            "pip install 'torch>=2.11', or leave out --no-build-isolation",
        )
    return [f"-isystem{path}" for path in include_paths()]


def pybind_includes() -> list[str]:
    """The headers of pybind11 and of this Python."""
    try:
        import pybind11
    except ImportError:
        stop(
            "pybind11 is not installed, and its headers are needed",
            "pip install pybind11, or leave out --no-build-isolation",
        )
    return [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]


class NinjaFile:
    """The text of build.ninja, grown object by object."""

    def __init__(self) -> None:
        self.lines = [
            "rule compile",
            "  command = $compiler -MD -MF $out.d $flags -c $in -o $out",
            "  description = compile $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $compiler $in -o $out $flags",
            "  description = link $out",
        ]
        self.libraries: list[str] = []

    def compile(self, compiler: str, source: str, flags: list[str], variant: str = "") -> str:
        """Add one object file, and return its name."""
        target = f"{Path(source).name}{variant and '.'}{variant}.o"
        self._add(target, "compile", [str(ROOT / source)], compiler, flags)
        return target

    def link(self, compiler: str, library: str, objects: list[str], flags: list[str]) -> None:
        """Add one library made of objects."""
        self._add(library, "link", objects, compiler, flags)
        self.libraries.append(library)

    def _add(self, target: str, rule: str, inputs: list[str], compiler: str, flags: list[str]) -> None:
        escaped = " ".join(path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:") for path in inputs)
        self.lines += [f"build {target}: {rule} {escaped}", f"  compiler = {compiler}", f"  flags = {' '.join(flags)}"]

    def write(self, path: Path) -> None:
        """Write the file, unless it is there already and the same."""
        text = "\n".join([*self.lines, ""])
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def link_flags() -> list[str]:
    """How a library is linked whose missing symbols the running process holds."""
    return ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


def torch_link_flags() -> list[str]:
    """Names libtorch.so, which import torch has loaded by then, and which leads to libtorch_cpu and libtorch_cuda.

    Without the name the stable ABI's symbols are not found: Python loads torch's libraries privately.
    """
    if sys.platform == "darwin":
        return []
    from torch.utils.cpp_extension import library_paths

    return [*(f"-L{path}" for path in library_paths()), "-Xlinker", "--no-as-needed", "-ltorch"]


def add_cpu(ninja: NinjaFile, cxx: str, library: str) -> None:
    """_cpu: the ops, and the kernels once per instruction set."""
    flags = [*CXX_FLAGS, TORCH_TARGET, *torch_includes()]
    objects = [ninja.compile(cxx, source, flags, "cpu") for source in CPU_OPS]
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    for name, instructions in INSTRUCTION_SETS.items() if is_x86 else [("portable", [])]:
        own = [*flags, *instructions, f"-DFASTLM_INSTRUCTION_SET={name}"]
        kernels = BF16_KERNELS if name == "avx512_bf16" else CPU_KERNELS
        objects += [ninja.compile(cxx, source, own, name) for source in kernels]
    ninja.link(cxx, library, objects, [*link_flags(), *torch_link_flags()])


def add_cuda(ninja: NinjaFile, cxx: str, nvcc: str, library: str) -> None:
    """_cuda: the same ops over the CUDA kernels, with a CUDA runtime of its own, whichever torch was built with."""
    toolkit = f"-isystem{Path(nvcc).resolve().parent.parent / 'include'}"
    flags = [*CXX_FLAGS, TORCH_TARGET, "-DFASTLM_CUDA", "-DUSE_CUDA", *torch_includes(), toolkit]
    targets = [f"-gencode={target}" for target in GPU_TARGETS]
    options = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    objects = [
        ninja.compile(cxx, "csrc/cross_entropy.cpp", flags, "cuda"),
        ninja.compile(nvcc, "csrc/cross_entropy_cuda.cu", [*options, *targets]),
    ]
    ninja.link(nvcc, library, objects, ["-shared", "-cudart=static", *targets, *torch_link_flags()])


def add_packing(ninja: NinjaFile, cxx: str, library: str) -> None:
    """_packing: an ordinary Python module."""
    flags = [*CXX_FLAGS, *pybind_includes()]
    ninja.link(cxx, library, [ninja.compile(cxx, "csrc/packing.cpp", flags)], link_flags())


class BuildWithNinja(build_ext):
    """Writes build/csrc/build.ninja, runs it, and puts the libraries where setuptools wants them."""

    def get_ext_filename(self, fullname: str) -> str:
        """A Python module is named after its Python; the other libraries serve every Python."""
        if fullname.endswith("_packing"):
            return super().get_ext_filename(fullname)
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        """Build all extensions in one run of ninja, in parallel."""
        BUILD.mkdir(parents=True, exist_ok=True)
        ninja, cxx = NinjaFile(), find_cxx()
        names = {ext.name: Path(self.get_ext_fullpath(ext.name)).name for ext in self.extensions}
        add_cpu(ninja, cxx, names["fastlm._cpu"])
        if "fastlm._cuda" in names:
            add_cuda(ninja, cxx, find_nvcc(), names["fastlm._cuda"])
        if "fastlm._packing" in names:
            add_packing(ninja, cxx, names["fastlm._packing"])
        ninja.write(BUILD / "build.ninja")
        if subprocess.run([find_ninja(), "-C", str(BUILD), *ninja.libraries]).returncode != 0:
            stop("the compiled libraries could not be built", "the compiler's message is above")
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(BUILD / names[ext.name]), str(target))


def extensions() -> list[Extension]:
    """What is built on this machine. On Windows nothing: the ops run PyTorch's code there."""
    if sys.platform == "win32":
        return []
    everything = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir())  # for a source distribution
    found = [Extension("fastlm._cpu", [*CPU_OPS, *CPU_KERNELS], depends=everything)]
    if find_nvcc():
        sources = ["csrc/cross_entropy.cpp", "csrc/cross_entropy_cuda.cu"]
        found.append(Extension("fastlm._cuda", sources))
    if (ROOT / "csrc" / "packing.cpp").exists():
        found.append(Extension("fastlm._packing", ["csrc/packing.cpp"]))
    return found


setup(license="Apache-2.0", ext_modules=extensions(), cmdclass={"build_ext": BuildWithNinja})
