"""Memory that is freed and asked for again: kept by glibc within kept_memory, else the system's to clear each time."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of Linux")

# In a process of its own: after a failed allocation, as other tests provoke, glibc takes another heap than the main.
FAULTS = """
import resource
import torch
from fastlm.train.kept_memory import kept_memory

def faults():
    # Pages that the system has to give, and to clear, for a tensor of 64 MiB that is freed at once: the least of
    # several, since the heap grows anew where a small block has come to lie beside the place of the one before.
    return min(faults_of_one() for _ in range(6))

def faults_of_one():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
for device, wanted in (("cpu", True), ("cpu", False), ("cuda", True)):
    with kept_memory(torch.device(device), wanted):
        print(faults())
    print(faults())
"""


def test_freed_memory_is_kept_if_wanted_on_a_cpu_and_given_back_at_the_end():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    fresh, kept, *others = map(int, done.stdout.split())
    assert fresh >= 32  # even if each page has 2 MiB
    assert kept < fresh / 4
    assert len(others) == 5
    assert min(others) > fresh / 2
