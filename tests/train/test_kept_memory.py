"""Memory that is freed and asked for again: kept by glibc within kept_memory, else the system's to clear each time."""

import resource
import sys

import pytest
import torch

from fastlm.train.kept_memory import kept_memory

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of Linux")
NUMEL = 1 << 24  # 64 MiB, more than glibc ever keeps unless told to


def faults_of_a_tensor():
    """Pages that the system has to give a process, and to clear, when it makes a large tensor and frees it again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(NUMEL)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept_for_the_next_step_and_given_back_at_the_end():
    faults_of_a_tensor()
    fresh = faults_of_a_tensor()
    assert fresh >= NUMEL * 4 >> 21  # even if each page has 2 MiB
    with kept_memory(CPU):
        faults_of_a_tensor()
        assert max(faults_of_a_tensor() for _ in range(3)) < fresh / 4
    assert faults_of_a_tensor() > fresh / 2


@pytest.mark.parametrize(("device", "wanted"), [(CPU, False), (torch.device("cuda"), True)])
def test_memory_is_not_kept_unless_wanted_and_of_use(device, wanted):
    fresh = faults_of_a_tensor()
    with kept_memory(device, wanted):
        faults_of_a_tensor()
        assert faults_of_a_tensor() > fresh / 2
