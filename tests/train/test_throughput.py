import time

import pytest
import torch

from fastlm.train.throughput import Stopwatch, peak_flops, peak_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "tf32", 495),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla T4", "fp32", 8.1),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("cpu with 2 threads", "fp32", None),
    ],
)
def test_peak_flops_knows_a_device_by_its_whole_words(device, precision, teraflops):
    assert peak_flops(device, precision) == (None if teraflops is None else teraflops * 1e12)


def test_stopwatch_leaves_out_pauses():
    watch = Stopwatch(CPU)
    began = time.perf_counter()
    with watch.paused():
        time.sleep(0.05)
    assert watch.elapsed() <= time.perf_counter() - began - 0.05


def test_peak_memory_counts_what_this_process_holds():
    before = peak_memory(CPU)
    held = torch.ones(2**26)
    assert peak_memory(CPU) >= before
    assert peak_memory(CPU) > held.nbytes
