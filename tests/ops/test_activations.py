"""Activations against their formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastlm.ops.activations import bias_gelu, gelu, swiglu
from tests.accuracy import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gelu_formula(x, approximate):
    if approximate == "tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def compare(ours, peer, formula, tensors, dtype):
    """Output and gradients of ours against the formula in float64, by the error of PyTorch's peer."""
    upstream = torch.randn(formula(*tensors).shape).to(dtype)

    def run(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    tensors = [x.to(dtype) for x in tensors]
    for results in zip(run(ours, dtype), run(peer, dtype), run(formula, torch.float64), strict=True):
        assert_accurate(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_and_gradient_match_the_formula(approximate, dtype):
    compare(
        lambda x: gelu(x, approximate),
        lambda x: F.gelu(x, approximate=approximate),
        lambda x: gelu_formula(x, approximate),
        [3 * torch.randn(5, 17)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_and_gradients_match_the_formula(dtype):
    compare(
        swiglu,
        lambda gate, up: F.silu(gate) * up,
        lambda gate, up: gate * torch.sigmoid(gate) * up,
        [3 * torch.randn(5, 17), torch.randn(5, 17)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu_and_gradients_match_the_formula(approximate, dtype):
    compare(
        lambda x, bias: bias_gelu(x, bias, approximate),
        lambda x, bias: F.gelu(x + bias, approximate=approximate),
        lambda x, bias: gelu_formula(x + bias, approximate),
        [torch.randn(5, 17), torch.randn(17)],
        dtype,
    )


def test_activations_say_what_is_wrong():
    with pytest.raises(ValueError, match="gelu: approximate is 'fast'"):
        gelu(torch.zeros(2), "fast")
    with pytest.raises(ValueError, match=r"swiglu: gate has shape \(2,\) and up \(3,\)"):
        swiglu(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias_gelu: bias has shape \(3,\), expected \(2,\)"):
        bias_gelu(torch.zeros(4, 2), torch.zeros(3))
