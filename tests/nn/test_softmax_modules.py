"""Softmax and LogSoftmax are torch.nn's modules in everything but the code that runs, and take the op's extras."""

import copy
import pickle
import warnings

import pytest
import torch

from fastlm.nn.softmax import LogSoftmax, Softmax
from fastlm.ops import log_softmax, softmax

PAIRS = [(Softmax, torch.nn.Softmax, softmax), (LogSoftmax, torch.nn.LogSoftmax, log_softmax)]
every_pair = pytest.mark.parametrize(("ours", "torchs", "function"), PAIRS)


@every_pair
def test_softmax_module_gives_the_values_and_the_text_of_torchs(ours, torchs, function):
    x = torch.randn(3, 4, 5)
    for dim in (0, 1, -1):
        mine, theirs = ours(dim), torchs(dim=dim)
        assert isinstance(mine, torchs)
        assert repr(mine) == repr(theirs)
        assert mine.state_dict() == theirs.state_dict() == {}
        assert torch.equal(mine(x), theirs(x))


@every_pair
def test_softmax_module_without_a_dim_warns_as_torchs_does(ours, torchs, function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine, theirs = ours()(torch.ones(2, 3)), torchs()(torch.ones(2, 3))
    assert torch.equal(mine, theirs)
    first, second = caught
    assert (str(first.message), first.filename, first.lineno) == (str(second.message), second.filename, second.lineno)


@every_pair
def test_softmax_module_passes_its_extras_to_the_op(ours, torchs, function):
    x, mask = torch.randn(2, 4, 4), torch.rand(4, 4) < 0.7
    module = ours(-1, scale=0.5, causal=True)
    assert torch.equal(module(x, mask=mask), function(x, -1, scale=0.5, causal=True, mask=mask))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), copy.deepcopy(module)(x))
    assert repr(module) == f"{ours.__name__}(dim=-1, scale=0.5, causal=True)"
    with pytest.raises(TypeError, match="positional"):
        ours(-1, 0.5)


@every_pair
def test_softmax_module_runs_the_kernels(ours, torchs, function, layer_device):
    x = torch.randn(2, 8, device=layer_device, requires_grad=True)
    assert type(ours(-1)(x).grad_fn).__name__ == "SoftmaxFunctionBackward"
