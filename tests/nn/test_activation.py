"""GELU is torch.nn's module in everything but the code that runs."""

import pytest
import torch

from fastlm.nn.activation import GELU


@pytest.mark.parametrize("arguments", [{}, {"approximate": "tanh"}], ids=str)
def test_gelu_module_is_torchs_in_name_and_value(arguments):
    ours, theirs = GELU(**arguments), torch.nn.GELU(**arguments)
    x = torch.randn(5, 8)
    assert repr(ours) == repr(theirs)
    assert ours.state_dict() == theirs.state_dict() == {}
    assert torch.equal(ours(x), theirs(x))


def test_gelu_module_runs_the_kernels(layer_device):
    y = GELU("tanh")(torch.randn(2, 8, device=layer_device, requires_grad=True))
    assert type(y.grad_fn).__name__ == "GeluFunctionBackward"
