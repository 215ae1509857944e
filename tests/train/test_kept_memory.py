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

def faults(mebibytes=64):
    # Pages that the system has to give, and to clear, for a tensor that is freed at once: the least of several, since
    # the heap grows anew where a small block has come to lie beside the place of the one before.
    return min(faults_of_one(mebibytes << 18) for _ in range(6))

def faults_of_one(numel):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(numel)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

print(faults())
for device, wanted in (("cpu", False), ("cuda", True)):
    with kept_memory(torch.device(device), wanted):
        print(faults())
with kept_memory(torch.device("cpu")):
    with kept_memory(torch.device("cpu")):
        print(faults())
    print(faults())
    within = resident()
print(within - resident())
print(faults(mebibytes=16))
"""


def test_freed_memory_is_kept_if_wanted_on_a_cpu_and_given_back_at_the_end():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    fresh, unwanted, elsewhere, kept, kept_beyond_one_inside, given_back, of_smaller_ones_later = map(
        int, done.stdout.split()
    )
    assert fresh >= 32  # even if each page has 2 MiB
    assert max(kept, kept_beyond_one_inside) < fresh / 4
    assert min(unwanted, elsewhere) > fresh / 2
    assert given_back > 32 << 20
    assert of_smaller_ones_later < fresh / 16  # those that glibc keeps by itself
