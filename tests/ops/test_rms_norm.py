"""RMS normalisation against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastlm.ops.rms_norm import rms_norm, rms_norm_reference
from tests.accuracy import assert_accurate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 17), (0, 8), (3, 1), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_and_gradients_match_the_formula(eps, shape, dtype):
    normalized = shape[-2:] if len(shape) == 4 else shape[-1:]
    x, weight, upstream = torch.randn(shape).to(dtype), torch.randn(normalized).to(dtype), torch.randn(shape).to(dtype)

    def run(function, dtype):
        inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        out = function(inputs[0], normalized, inputs[1], eps)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    truth = run(rms_norm_reference, torch.float64)
    for results in zip(run(rms_norm, dtype), run(F.rms_norm, dtype), truth, strict=True):
        assert_accurate(*results)


def test_rms_norm_reference_is_the_formula():
    x = torch.tensor([[0.0, 2.0]])
    assert torch.equal(rms_norm_reference(x, (2,), None, 2.0), x / 2)  # mean square 2, and as much eps


def test_rms_norm_default_eps_is_that_of_torch():
    x = 1e-4 * torch.randn(3, 8)
    truth = rms_norm_reference(x.double(), (8,), None, torch.finfo(torch.float32).eps)
    assert_accurate(rms_norm(x, (8,)), F.rms_norm(x, (8,)), truth)


def test_rms_norm_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(3,\), expected \(4,\)"):
        rms_norm(torch.zeros(2, 4), (4,), torch.ones(3))
    with pytest.raises(ValueError, match=r"rms_norm: input has shape \(2, 4\), expected it to end in \(3,\)"):
        rms_norm(torch.zeros(2, 4), (3,))
