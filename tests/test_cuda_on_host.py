"""The CUDA kernels of cross entropy, run thread by thread on a CPU: every barrier, offset and cut of a row."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "csrc" / "cuda_on_host.cpp"
FLAGS = ["-std=c++20", "-O1", "-fsanitize=alignment", "-fno-sanitize-recover=all", "-fno-extern-tls-init", "-pthread"]
CUDA_HEADERS = ("cooperative_groups.h", "cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h")  # SOURCE stands in for them


pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_host")
    for header in CUDA_HEADERS:
        (folder / header).touch()
    program = folder / "cuda_on_host"
    subprocess.run(["g++", *FLAGS, f"-I{folder}", str(SOURCE), "-o", str(program)], check=True)
    return program


def test_cross_entropy_cuda_matches_plain_loops(program):
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cross_entropy_cuda_refuses_a_target_out_of_bounds(program):
    for target, refused in [("0", False), ("6", False), ("7", True), ("-1", True), ("-100", False)]:
        done = subprocess.run([program, target], capture_output=True, text=True)
        assert ("a target is out of bounds" in done.stderr) == refused, f"target {target}: {done.stderr}"
        assert (done.returncode != 0) == refused
