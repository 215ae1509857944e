"""torch.fx leaves every public function in its graph as one call."""

import pickle

import pytest
import torch
from torch import fx

from fastlm import ops

SHAPE = (8,)
CLASSES = torch.tensor([[0, 3, -100, 7]])
CALLS = {
    "add_layer_norm": lambda x: ops.add_layer_norm(x, x * 2, SHAPE)[0],
    "add_rms_norm": lambda x: ops.add_rms_norm(x, residual=x * 2, normalized_shape=SHAPE)[1],
    "apply_rotary": lambda x: ops.apply_rotary(x, None, torch.ones(4, 2), torch.zeros(4, 2), interleaved=True)[0],
    "attention": lambda x: ops.attention(x, x, x, causal=True, window=(1, None)),
    "bias_gelu": lambda x: ops.bias_gelu(x, torch.ones(8)),
    "cross_entropy": lambda x: ops.cross_entropy(x[0, 0], CLASSES[0, :1].expand(2), reduction="sum", z_loss=0.1),
    "flash_attn_func": lambda x: ops.flash_attn_func(x, x, x, causal=True, return_attn_probs=True)[1],
    "flash_attn_varlen_func": lambda x: ops.flash_attn_varlen_func(*documents(x), causal=True),
    "gelu": lambda x: ops.gelu(input=x, approximate="tanh"),
    "layer_norm": lambda x: ops.layer_norm(x, x.shape[-1:], eps=1e-3),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x[:, :, 0], torch.eye(9, 8), CLASSES, shift=True),
    "linear_logprobs": lambda x: ops.linear_logprobs(x[:, :, 0], torch.eye(9, 8), CLASSES, temperature=0.5).logprobs,
    "log_softmax": lambda x: ops.log_softmax(x, -1, causal=True),
    "rms_norm": lambda x: ops.rms_norm(x, SHAPE, None, 1e-3),
    "scaled_dot_product_attention": lambda x: ops.scaled_dot_product_attention(x, x, x, is_causal=True),
    "softmax": lambda x: ops.softmax(x, dim=-1, mask=x > 0),
    "swiglu": lambda x: ops.swiglu(x, x * 2),
    "geglu": lambda x: ops.geglu(x, x * 2),
}
PACKED = {
    "flash_attn_qkvpacked_func": lambda x: ops.flash_attn_qkvpacked_func(torch.stack([x, x, x], 2), causal=True),
    "flash_attn_kvpacked_func": lambda x: ops.flash_attn_kvpacked_func(x, torch.stack([x, x], 2), 0.0, 0.3),
    "flash_attn_varlen_qkvpacked_func": lambda x: ops.flash_attn_varlen_qkvpacked_func(
        torch.stack([x[0], x[0], x[0]], 1), torch.tensor([0, 1, 4]), 3
    ),
    "flash_attn_varlen_kvpacked_func": lambda x: ops.flash_attn_varlen_kvpacked_func(
        x[0], torch.stack([x[0], x[0]], 1), *[torch.tensor([0, 1, 4])] * 2, 3, 3, causal=True
    ),
}


def documents(x):
    bounds = torch.tensor([0, 1, 4])
    return x[0], x[0], x[0], bounds, bounds, 3, 3


def test_every_public_function_is_traced_here():
    without_tensors = "AttentionSchedules", "explain"
    assert sorted([*CALLS, *PACKED, *without_tensors]) == ops.__all__


@pytest.mark.parametrize("name", CALLS | PACKED)
def test_symbolic_trace_records_the_function_as_one_call(name):
    x = torch.linspace(-2, 3, 64).view(1, 4, 2, 8)
    call = (CALLS | PACKED)[name]
    traced = fx.symbolic_trace(call)
    targets = [node.target for node in traced.graph.nodes]
    recorded = [target for target in targets if getattr(target, "__module__", "").startswith("fastlm")]
    assert recorded == [getattr(ops, name.replace("qkvpacked_", "").replace("kvpacked_", ""))]
    for graph in (traced, pickle.loads(pickle.dumps(traced)), fx.Transformer(traced).transform()):
        assert torch.equal(graph(x), call(x))


LATER = {  # calls whose first tensor is none of the traced ones
    "add_layer_norm": lambda x: ops.add_layer_norm(ROWS, x, SHAPE)[0],
    "apply_rotary": lambda x: ops.apply_rotary(ROWS.view(1, 4, 1, 8), x.view(1, 4, 1, 8), *torch.ones(2, 4, 4))[1],
    "attention": lambda x: ops.attention(ROWS.view(1, 4, 1, 8), x.view(1, 4, 1, 8), x.view(1, 4, 1, 8)),
    "bias_gelu": lambda x: ops.bias_gelu(ROWS, x[0]),
    "cross_entropy": lambda x: ops.cross_entropy(ROWS, x.argmax(-1)),
    "layer_norm": lambda x: ops.layer_norm(ROWS, SHAPE, x[0]),
    "linear_logprobs": lambda x: ops.linear_logprobs(ROWS, x, CLASSES[0] % 4, entropy=True)[1],
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(ROWS, x, CLASSES[0] % 4),
    "scaled_dot_product_attention": lambda x: ops.scaled_dot_product_attention(ROWS, x, x),
    "softmax": lambda x: ops.softmax(ROWS, -1, mask=x > 0),
    "swiglu": lambda x: ops.swiglu(ROWS, x),
    "geglu": lambda x: ops.geglu(ROWS, x),
}
ROWS = torch.linspace(-1, 2, 32).view(4, 8)


@pytest.mark.parametrize("name", LATER)
def test_a_function_is_traced_by_any_of_its_tensors(name):
    x, traced = torch.linspace(-2, 3, 32).view(4, 8), fx.symbolic_trace(LATER[name])
    assert getattr(ops, name) in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(x), LATER[name](x))


def test_a_traced_function_writes_down_what_was_given_in_torchs_order():
    traced = fx.symbolic_trace(lambda x: ops.layer_norm(x, normalized_shape=SHAPE, eps=1e-3))
    (node,) = traced.graph.find_nodes(op="call_function", target=ops.layer_norm)
    assert (node.args[1:], node.kwargs) == ((SHAPE,), {"eps": 1e-3})


def test_traced_functions_have_their_gradients():
    def norm(x, w):
        return ops.rms_norm(ops.layer_norm(x, SHAPE, w), SHAPE, w)

    x, w = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    of = [torch.autograd.grad(f(x, w).sin().sum(), (x, w)) for f in (norm, fx.symbolic_trace(norm))]
    assert all(map(torch.equal, *of))
