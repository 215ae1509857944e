"""PyTorch's own samples of the ops that bear a name of PyTorch's, in every mode of autograd, vmap and autocast."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.ops import _dispatch
from fastlm.ops._dispatch import DTYPES
from fastlm.ops.rotary import apply_rotary_reference
from tests.support.sample_checks import CHECKS, Report, call_of_op, copied, outcome, outcome_of_wrong_call, wrong_calls
from tests.support.sample_exceptions import FLOATS, WRONG, excuses_of
from tests.support.samples import OPS, Sample, torch_error_samples, torch_samples

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]

NAMES = [name for name in OPS if hasattr(F, name.split(".")[-1])]  # torch 2.11 has no linear_cross_entropy
IMPLEMENTATIONS = {  # as layer_device of tests/conftest.py, on a CPU
    "default": pytest.param("cpu", "default", id="default"),
    "interpreted": pytest.param("cpu", "interpreted", id="interpreted", marks=pytest.mark.interpreted),
    "compiled": pytest.param("compiled", "compiled", id="compiled"),
    "portable": pytest.param("portable", "portable", id="portable"),
}
BY_DEFAULT_TOO = {  # what runs no other code than by default
    "nn.functional.cross_entropy": {"interpreted"},
    "nn.functional.linear_cross_entropy": {"interpreted", "compiled"},
    "nn.functional.scaled_dot_product_attention": {"compiled", "portable"},
}
CASES = [
    pytest.param(name, *parameters.values, id=f"{name}-{parameters.id}", marks=parameters.marks)
    for name in NAMES
    for implementation, parameters in IMPLEMENTATIONS.items()
    if implementation not in BY_DEFAULT_TOO.get(name, ())
]


@pytest.fixture(autouse=True)
def small_calls_of_cross_entropy_too(request, monkeypatch):
    if "layer_device" in request.fixturenames and request.getfixturevalue("implementation") in ("compiled", "portable"):
        monkeypatch.setattr(_dispatch, "CROSS_ENTROPY_FEW_LOGITS", -1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("name", "layer_device", "implementation"), CASES, indirect=["layer_device"])
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


def causal_attention(q, k, v):
    """By PyTorch's only code that can be differentiated twice, or forward."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def normalised_sum(norm):
    """The norm of a sum, and the sum."""
    return lambda x, residual, *parameters: (norm(x + residual, (x.shape[-1],), *parameters), x + residual)


def own_ops():
    """(ours, plain PyTorch, the tensors of both) of each op that PyTorch has no name for."""

    def draw(*shape):
        return torch.randn(shape, requires_grad=True)

    x, other, row, angles = draw(3, 5, 8), draw(3, 5, 8), draw(8), torch.linspace(-3, 3, 20).view(5, 4)
    heads = [draw(2, 5, 4, 8) for _ in range(3)]
    return {
        "swiglu": (ops.swiglu, lambda gate, up: F.silu(gate) * up, [x, other]),
        "geglu": (ops.geglu, lambda gate, up: F.gelu(gate) * up, [x, other]),
        "bias_gelu": (ops.bias_gelu, lambda x, bias: F.gelu(x + bias, approximate="tanh"), [x, row]),
        "add_layer_norm": (
            lambda x, residual, *parameters: ops.add_layer_norm(x, residual, (8,), *parameters),
            normalised_sum(F.layer_norm),
            [x, other, row, row * 2],
        ),
        "add_rms_norm": (
            lambda x, residual, weight: ops.add_rms_norm(x, residual, (8,), weight),
            normalised_sum(F.rms_norm),
            [x, other, row],
        ),
        "apply_rotary": (
            lambda x, cos, sin: ops.apply_rotary(x, None, cos, sin),
            lambda x, cos, sin: apply_rotary_reference(x, cos[:, None], sin[:, None]),
            [heads[0], angles.cos(), angles.sin()],
        ),
        "attention": (lambda q, k, v: ops.attention(q, k, v, causal=True), causal_attention, heads),
    }


@pytest.mark.parametrize(
    "name", ["swiglu", "geglu", "bias_gelu", "add_layer_norm", "add_rms_norm", "apply_rotary", "attention"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layer_device", "implementation"), IMPLEMENTATIONS.values(), indirect=["layer_device"])
def test_ops_of_our_own_equal_plain_pytorch_in_every_mode(name, dtype, layer_device, implementation, record_property):
    ours, plain, (first, *others) = own_ops()[name]
    report = Report(excuses_of(name, dtype, implementation))
    call = call_of_op(ours, plain, Sample(*copied((first, tuple(others), {}), dtype)))
    for check in CHECKS:
        report.add(check, call.name, functools.partial(outcome, call, check))
    report.conclude(record_property)
