"""The compiled libraries: what they need of PyTorch, and that building them again does nothing."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastlm.ops import _library

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [path for path in (ROOT / "fastlm" / "_cpu.so", ROOT / "fastlm" / "_cuda.so") if path.exists()]
# C names, those of the stable ABI; a mangled C++ name (_Z...) of torch or c10 binds a library to one PyTorch release.
STABLE = re.compile(r"(aoti_)?torch_\w+")


def undefined_symbols(library: Path) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    return [line.split()[-1].split("@")[0] for line in listing.splitlines()]


def build(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_cpu_library_is_built_and_loaded():
    assert _library.facts()["_cpu"].startswith(str(ROOT / "fastlm" / "_cpu.so")), _library.facts()["_cpu"]
    assert _library.is_loaded("cpu")


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_needs_nothing_of_pytorch_but_the_stable_abi(library):
    symbols = undefined_symbols(library)
    assert any(STABLE.fullmatch(symbol) for symbol in symbols), "nm shows no symbol of PyTorch: is this the library?"
    unstable = [symbol for symbol in symbols if re.match(r"_Z\w*(5torch|3c10|2at)", symbol)]
    assert not unstable, f"{library.name} needs C++ symbols of one PyTorch release: {unstable}"
    assert not [symbol for symbol in symbols if symbol.startswith("Py")], f"{library.name} is tied to one Python"


@pytest.mark.skipif(not (ROOT / "build" / "csrc" / ".ninja_log").exists(), reason="nothing was built in this checkout")
def test_second_build_compiles_nothing():
    done = build("build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    again = build("build_ext", "--inplace")
    assert "no work to do" in again.stdout, again.stdout[-2000:]


def test_build_without_a_compiler_is_one_clear_message(tmp_path):
    done = build("build_ext", "--inplace", PATH=str(tmp_path), CXX="", CUDA_HOME="", FASTLM_CUDA="0")
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr
    assert "Traceback" not in done.stderr


def test_license_is_written_as_every_setuptools_reads_it():
    """From 77 on a table is deprecated, before 77 a string is an error, as is license-files: setup.py gives it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not {"license", "license-files"} & set(project)
    assert "license" in project["dynamic"]
    assert build("--license").stdout.strip() == "Apache-2.0"


def test_build_refuses_an_unknown_wish():
    done = build("--version", FASTLM_CUDA="yes")
    assert done.returncode != 0
    assert "FASTLM_CUDA is 'yes', expected 0 or 1" in done.stderr
