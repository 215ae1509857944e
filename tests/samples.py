"""PyTorch's own sample inputs for an op: the calls that its test-suite holds its kernels to."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# In a process of its own: PyTorch's test code, once imported, forbids any change of a backend's flags, and imports a
# package for the base class of its tests alone.
COLLECT = """
import sys, types, unittest, torch
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=False))
from torch.testing._internal.common_methods_invocations import op_db
samples = [
    (sample.input.detach(), sample.args, sample.kwargs)
    for op in op_db if op.name == sys.argv[1]
    for sample in op.sample_inputs("cpu", torch.float32)
]
torch.save(samples, sys.argv[2])
"""


class Sample(NamedTuple):
    """One call of the op: what it gets in float32 on the CPU."""

    input: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@functools.cache
def torch_samples(name: str) -> list[Sample]:
    """All samples of an op, named as in torch; there is at least one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.pt"
        done = subprocess.run([sys.executable, "-c", COLLECT, name, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        samples = [Sample(*fields) for fields in torch.load(path, weights_only=False)]
    assert samples, f"torch has no samples of {name}"
    return samples
