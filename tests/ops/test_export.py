"""torch.export: a program made from any op takes every size, and its gradients are those of the op."""

import pytest
import torch

from fastlm import ops
from fastlm.ops import _dispatch
from tests.support.accuracy import assert_accurate

C, V = 12, 20
ANGLES = torch.randn(2, 5000, 2, generator=torch.Generator().manual_seed(0))
CALLS = {  # of x (N, C) and a parameter w (V, C)
    "layer_norm": lambda x, w: ops.layer_norm(x, (C,), w[0], w[1]),
    "rms_norm": lambda x, w: ops.rms_norm(x, (C,), w[0]),
    "add_layer_norm": lambda x, w: ops.add_layer_norm(x, 2 * x, (C,), w[0])[0],
    "add_rms_norm": lambda x, w: ops.add_rms_norm(x, 2 * x, (C,), w[0])[0],
    "softmax": lambda x, w: ops.softmax(x * w[0], -1, mask=w[1]),
    "log_softmax": lambda x, w: ops.log_softmax(x * w[0], -1),
    "gelu": lambda x, w: ops.gelu(x * w[0], "tanh"),
    "bias_gelu": lambda x, w: ops.bias_gelu(x, w[0]),
    "swiglu": lambda x, w: ops.swiglu(x, x * w[0]),
    "geglu": lambda x, w: ops.geglu(x, x * w[0]),
    "apply_rotary": lambda x, w: ops.apply_rotary((x * w[0]).view(1, -1, 3, 4), None, *ANGLES.to(x.dtype))[0],
    "cross_entropy": lambda x, w: ops.cross_entropy(x @ w.T, torch.arange(x.shape[0]) % V),
    "cross_entropy with z_loss": lambda x, w: ops.cross_entropy(x @ w.T, torch.arange(x.shape[0]) % V, z_loss=0.1),
    "linear_cross_entropy": lambda x, w: ops.linear_cross_entropy(x, w, torch.arange(x.shape[0]) % V),
    "linear_logprobs": lambda x, w: ops.linear_logprobs(x, w, torch.arange(x.shape[0]) % V, entropy=True)[1],
    "attention": lambda x, w: ops.attention(*[(x * w[i]).view(1, -1, 3, 4) for i in range(3)], window=(2, 1)),
}


class Call(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.w = name, torch.nn.Parameter(torch.randn(V, C) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return CALLS[self.name](x, self.w)


def results(module: torch.nn.Module, w: torch.Tensor, x: torch.Tensor, upstream: torch.Tensor | None):
    x = x.requires_grad_()
    out = module(x)
    upstream = torch.randn(out.shape) if upstream is None else upstream
    return upstream, (out, *torch.autograd.grad(out, (x, w), upstream.to(out.dtype)))


@pytest.mark.parametrize("name", CALLS)
def test_exported_op_takes_any_size_and_has_its_gradients(name, monkeypatch):
    monkeypatch.setattr(
        _dispatch, "CPU_MIN_NUMEL", dict.fromkeys(_dispatch.CPU_MIN_NUMEL, 100)
    )  # between the two sizes below
    op, x = Call(name), torch.randn(50, C)
    rows = {"x": {0: torch.export.Dim("N", min=2, max=4096)}}
    program = torch.export.export(op, (torch.randn(5, C),), dynamic_shapes=rows).module()
    upstream, exported = results(program, program.w, x, None)
    truth = results(op.double(), op.w, x.double(), upstream)[1]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    by_torch = results(op.float(), op.w, x, upstream)[1]
    for what, ours, theirs, true in zip(("out", "dx", "dw"), exported, by_torch, truth, strict=True):
        assert_accurate(ours, theirs, true, what)
