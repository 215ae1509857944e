"""The rule that says which tensors run Triton kernels, and how large a grid these may have."""

import operator
import subprocess
import sys

import pytest
import torch

from fastlm import ops
from fastlm.ops._triton import cdiv, next_power_of_2

triton = pytest.importorskip("triton", reason="there is no rule to test without triton")

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


LIMITS_OF_GRID = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, compute capabilities
BEYOND = 65537


def many(*shape):
    """Memory that is mapped, and touched by nobody."""
    return torch.zeros(shape, requires_grad=True)


def attend_documents(count, num_heads):
    q, slopes = many(count, num_heads, 1), many(count, num_heads)
    return ops.attention(q, q, q, alibi_slopes=slopes, cu_seqlens_q=torch.arange(count + 1))


LARGE = {
    "attention of many batch rows and heads": lambda: ops.attention(*[many(8193, 1, 8, 1)] * 3),
    "attention of many tokens": lambda: ops.attention(*[many(1, 64 * BEYOND, 1, 1)] * 3, window=(1, 0), dropout_p=0.1),
    "attention of many documents": lambda: attend_documents(BEYOND, 1),
    "attention of many heads in documents": lambda: attend_documents(2, BEYOND),
    "layer_norm of many rows": lambda: ops.layer_norm(many(BEYOND, 2), (2,), many(2), many(2)),
    "add_rms_norm of many rows": lambda: ops.add_rms_norm(many(BEYOND, 2), many(BEYOND, 2), (2,), many(2))[0],
    "softmax of many rows": lambda: ops.softmax(many(16 * BEYOND, 2), -1),
    "softmax of a long row": lambda: ops.softmax(many(2, 2**22), -1),
    "bias_gelu of many rows": lambda: ops.bias_gelu(many(BEYOND, 16), many(16)),
    "swiglu of a long row": lambda: ops.swiglu(many(2, 2**22), many(2, 2**22)),
    "apply_rotary of many tokens": lambda: ops.apply_rotary(many(BEYOND, 2, 1, 2), None, *[many(2, 1).detach()] * 2)[0],
    "apply_rotary of many heads": lambda: ops.apply_rotary(many(1, 2, BEYOND, 2), None, *[many(2, 1).detach()] * 2)[0],
}


@pytest.mark.interpreted
@pytest.mark.parametrize("call", LARGE)
def test_launchers_keep_within_the_limits_of_a_grid(call, monkeypatch):
    grids = []

    def note(kernel, *args, grid, **options):
        grids.append((kernel.__name__, grid))

    monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.run", note)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing is computed, and memory is not touched
    out = LARGE[call]()
    out.backward(torch.zeros(out.shape))
    assert len(grids) > 1
    assert not [(name, grid) for name, grid in grids if any(map(operator.gt, grid, LIMITS_OF_GRID))]


@pytest.mark.parametrize("x", [1, 2, 3, 63, 64, 65, 4097, 2**31 + 1])
def test_integer_functions_of_the_host_are_those_of_triton(x):
    assert next_power_of_2(x) == triton.next_power_of_2(x)
    assert all(cdiv(x, y) == triton.cdiv(x, y) for y in (1, 2, 7, 64, 4096))
