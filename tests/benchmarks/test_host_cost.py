"""The host's cost of a call is measured on the stand-in for the driver, with the number of kernels that it launches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm.ops._triton import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton, whose launches are measured, is not installed", allow_module_level=True)

from benchmarks import host_cost

ROOT = Path(__file__).resolve().parents[2]
FOUND = {"function": "gelu", "what": "forward", "us": 31.0, "torch_us": 10.0, "ratio": 3.1, "bar": 3.0, "launches": 1}
RECORD = {
    "machine": {"device": "some CPU", "threads": 1, "cpu_capability": "AVX2"},
    "versions": {"torch": "2.13.0"},
    "run": {"commit": "0123456789abcdef", "dirty": False, "date": "2026-11-30", "command": "python -m ..."},
}


def test_host_cost_measures_both_and_counts_launches(tmp_path):
    names = ["layer_norm", "gelu", "attention"]
    command = [sys.executable, "-m", "benchmarks.host_cost", *names, "--rounds=1", f"--json={tmp_path / 'found.json'}"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    record = json.loads((tmp_path / "found.json").read_text())
    assert printed == (tmp_path / "found.txt").read_text() == host_cost.text(record) + "\n"
    launches = {(found["function"], found["what"]): found["launches"] for found in record["results"]}
    assert launches == {
        ("layer_norm", "forward"): 1,
        ("layer_norm", "forward and backward"): 3,  # backward, and the sum of the partial gradients
        ("gelu", "forward"): 1,
        ("gelu", "forward and backward"): 2,
        ("attention", "forward"): 1,
        ("attention", "forward and backward"): 4,  # delta, dk and dv, dq
    }
    for found in record["results"]:
        assert 0 < found["torch_us"] < 5000
        assert 0 < found["us"] < 5000


@pytest.mark.parametrize(("ratio", "mark"), [(3.0, ""), (3.1, "over the bar")])
def test_host_cost_marks_what_is_over_its_bar(ratio, mark):
    *_, line = host_cost.text(RECORD | {"results": [FOUND | {"ratio": ratio}]}).splitlines()
    assert line.endswith(mark or "1")
