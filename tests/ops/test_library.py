"""The compiled libraries in a PyTorch that is built for CUDA, on a machine that need not have a GPU.

`make test-oldest` runs these: the PyTorch that it installs is such a build.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm import ops
from fastlm.ops import _library

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA"),
    pytest.mark.skipif(not (_library.PACKAGE / "_cuda.so").exists(), reason="_cuda.so is not built"),
]
# Registered for CUDA by C++ alone: Python's code for them is for any device.
OPS = ("cross_entropy", "cross_entropy_", "cross_entropy_again_", "cross_entropy_part", "scale_rows_")
BF16 = torch.bfloat16


def test_cuda_library_is_loaded():
    assert _library.is_loaded("cuda"), _library.facts()["_cuda"]


@pytest.mark.parametrize("name", OPS)
def test_cuda_library_registers_its_kernels(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlm::{name}", "CUDA")


def fake(*shape: int, dtype: torch.dtype = BF16, requires_grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=requires_grad)


CALLS = {
    "layer_norm": lambda x, q, target: ops.layer_norm(x, (64,)),
    "add_rms_norm": lambda x, q, target: ops.add_rms_norm(x, x, (64,))[0],
    "softmax": lambda x, q, target: ops.softmax(x, -1, causal=True),
    "gelu": lambda x, q, target: ops.gelu(x),
    "swiglu": lambda x, q, target: ops.swiglu(x, x),
    "geglu": lambda x, q, target: ops.geglu(x, x),
    "attention": lambda x, q, target: ops.attention(q, q, q, causal=True, softcap=20.0),
    "scaled_dot_product_attention": lambda x, q, target: ops.scaled_dot_product_attention(q, q, q),
    "cross_entropy": lambda x, q, target: ops.cross_entropy(x, target),
    "linear_cross_entropy": lambda x, q, target: ops.linear_cross_entropy(x, x, target),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_on_cuda_tensors_is_traced_to_our_ops_without_a_gpu(name):
    graphs = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(" ".join(str(node.target) for part in modules_of(graph) for node in part.graph.nodes))
        return graph

    torch._dynamo.reset()
    with FakeTensorMode():
        x, q = fake(128, 64), fake(1, 128, 2, 64)
        target = fake(128, dtype=torch.int64, requires_grad=False)
        out = torch.compile(CALLS[name], fullgraph=True, backend=note)(x, q, target)
        assert out.device.type == "cuda"
    (graph,) = graphs
    assert "fastlm." in graph, graph


def modules_of(graph: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    return [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]


def test_loss_of_fake_cuda_tensors_has_the_shapes_that_the_kernel_writes():
    with FakeTensorMode():
        logits, target = fake(8, 100), fake(8, dtype=torch.int64, requires_grad=False)
        options = -100, 100, 0, 100, 0.0, 0.0, 0.0
        losses, gradient = torch.ops.fastlm.cross_entropy(logits, target, None, None, None, *options, True)
    assert (losses.device.type, losses.dtype, losses.shape) == ("cuda", torch.float32, (8,))
    assert (gradient.device.type, gradient.dtype, gradient.shape) == ("cuda", BF16, (8, 100))
