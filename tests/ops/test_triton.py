"""The rule that says which tensors run Triton kernels."""

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="there is no rule to test without triton")

# In a process of its own: the fixtures of the tests set the knob, and then nobody looks the environment up any more.
COMPILED = """
import torch
from fastlm.ops import layer_norm
x = torch.arange(12.0).view(3, 4)
compiled = torch.compile(lambda x: layer_norm(x, (4,)), fullgraph=True, backend="eager")
assert torch.equal(compiled(x), torch.nn.functional.layer_norm(x, (4,)))
"""


def test_runs_kernels_compiles_where_the_knob_comes_from_the_environment():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
