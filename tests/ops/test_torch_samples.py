"""PyTorch's own samples of the ops that bear a name of PyTorch's, in every mode of autograd, vmap and autocast."""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops.activations import gelu_reference, swiglu_reference
from fastlm.ops.attention_reference import UNLIMITED, Inputs, Options, attention_reference
from fastlm.ops.layer_norm import add_layer_norm_reference
from fastlm.ops.rms_norm import add_rms_norm_reference
from fastlm.ops.rotary import apply_rotary_reference
from tests.sample_checks import CHECKS, Report, call_of_op, copied, outcome, outcome_of_wrong_call, wrong_calls
from tests.sample_exceptions import FLOATS, WRONG, excuses_of
from tests.samples import OPS, Sample, torch_error_samples, torch_samples

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]

NAMES = [name for name in OPS if hasattr(F, name.split(".")[-1])]  # torch 2.11 has no linear_cross_entropy
IMPLEMENTATIONS = [  # as layer_device of tests/conftest.py, on a CPU
    pytest.param("cpu", "default", id="default"),
    pytest.param("cpu", "interpreted", id="interpreted", marks=pytest.mark.interpreted),
    pytest.param("compiled", "compiled", id="compiled"),
    pytest.param("portable", "portable", id="portable"),
]


@pytest.fixture(autouse=True)
def small_calls_of_cross_entropy_too(request, monkeypatch):
    if request.getfixturevalue("implementation") in ("compiled", "portable"):
        monkeypatch.setattr(importlib.import_module("fastlm.ops.cross_entropy"), "SMALL", -1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("layer_device", "implementation"), IMPLEMENTATIONS, indirect=["layer_device"])
def test_ops_equal_torchs_on_all_samples_of_torch(name, dtype, layer_device, implementation, record_property):
    ours, theirs = (getattr(of, name.split(".")[-1]) for of in (ops, F))
    report = Report(excuses_of(name, dtype, implementation))
    for sample in torch_samples(name, dtype):
        call = call_of_op(ours, theirs, sample)
        for check in CHECKS:
            report.add(check, call.name, functools.partial(outcome, call, check))
        for wrong in wrong_calls(call):
            report.add(WRONG, wrong.name, functools.partial(outcome_of_wrong_call, wrong))
    report.conclude(record_property)


@pytest.mark.parametrize("name", NAMES)
def test_ops_refuse_what_torch_says_it_refuses(name, record_property):
    ours, theirs = (getattr(of, name.split(".")[-1]) for of in (ops, F))
    samples = torch_error_samples(name)
    results = [outcome_of_wrong_call(call_of_op(ours, theirs, sample)) for sample in samples]
    record_property("refused by both", len(results))
    assert results == ["refused by both"] * len(samples)


def own_ops():
    """(ours, plain PyTorch, a sample of both) of each op that PyTorch has no name for."""

    def draw(*shape):
        return torch.randn(shape, requires_grad=True)

    x, other, row, angles = draw(3, 5, 8), draw(3, 5, 8), draw(8), torch.linspace(-3, 3, 20).view(5, 4)
    heads, plain = [draw(2, 5, 4, 8) for _ in range(3)], Options(True, 8**-0.5, UNLIMITED, UNLIMITED, 0.0, 0.0)
    rotary = Sample(heads[0], (angles.cos(), angles.sin()), {})
    return {
        "swiglu": (ops.swiglu, swiglu_reference, Sample(x, (other,), {})),
        "bias_gelu": (ops.bias_gelu, gelu_reference, Sample(x, (row,), {"approximate": "tanh"})),
        "add_layer_norm": (ops.add_layer_norm, add_layer_norm_reference, Sample(x, (other, (8,), row, row * 2), {})),
        "add_rms_norm": (ops.add_rms_norm, add_rms_norm_reference, Sample(x, (other, (8,), row), {})),
        "apply_rotary": (
            lambda x, cos, sin: ops.apply_rotary(x, None, cos, sin),
            lambda x, cos, sin: apply_rotary_reference(x, cos[:, None], sin[:, None]),
            rotary,
        ),
        "attention": (
            lambda q, k, v: ops.attention(q, k, v, causal=True),
            lambda q, k, v: attention_reference(Inputs(q, k, v), plain)[0],
            Sample(heads[0], tuple(heads[1:]), {}),
        ),
    }


@pytest.mark.parametrize("name", ["swiglu", "bias_gelu", "add_layer_norm", "add_rms_norm", "apply_rotary", "attention"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("layer_device", "implementation"), IMPLEMENTATIONS, indirect=["layer_device"])
def test_ops_of_our_own_equal_plain_pytorch_in_every_mode(name, dtype, layer_device, implementation, record_property):
    ours, reference, sample = own_ops()[name]
    report = Report(excuses_of(name, dtype, implementation))
    call = call_of_op(ours, reference, Sample(*copied(tuple(sample), dtype)))
    for check in CHECKS:
        report.add(check, call.name, functools.partial(outcome, call, check))
    report.conclude(record_property)
