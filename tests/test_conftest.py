"""The ground the tests stand on holds: memory is poisoned, kernels run where they were asked for and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm.ops._dispatch import use_triton
from fastlm.ops._triton import HAS_TRITON

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(100),
        lambda: torch.empty_like(torch.ones(100, dtype=torch.bfloat16)),
        lambda: torch.ones(1).new_empty(100),
        lambda: torch.empty_strided((10, 10), (10, 1), dtype=torch.float16),
        lambda: torch.ones(1).resize_(100)[1:],
    ],
)
def test_unwritten_memory_is_nan(allocate):
    assert allocate().isnan().all()


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("interpreted", [False, pytest.param(True, marks=pytest.mark.interpreted)])
def test_kernels_take_cpu_tensors_only_in_interpreted_tests(interpreted):
    assert use_triton(torch.ones(1)) == interpreted


@pytest.mark.interpreted
def test_kernels_never_take_meta_tensors():
    assert not use_triton(torch.ones(1, device="meta"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, its tests run")
def test_asking_for_gpu_tests_without_a_gpu_says_that_none_ran():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/nn/test_normalization.py", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "2 tests need a CUDA device and did NOT run: this machine has none" in done.stdout
