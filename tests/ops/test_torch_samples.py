"""PyTorch's own samples of the ops that bear a name of PyTorch's, in every mode of autograd, vmap and autocast."""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F

import fastlm.ops
from tests.sample_checks import CHECKS, Report, call_of_op, outcome, outcome_of_wrong_call, wrong_calls
from tests.sample_exceptions import FLOATS, WRONG, excuses_of
from tests.samples import OPS, torch_error_samples, torch_samples

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
    ours, theirs = (getattr(of, name.split(".")[-1]) for of in (fastlm.ops, F))
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
    ours, theirs = (getattr(of, name.split(".")[-1]) for of in (fastlm.ops, F))
    samples = torch_error_samples(name)
    results = [outcome_of_wrong_call(call_of_op(ours, theirs, sample)) for sample in samples]
    record_property("refused by both", len(results))
    assert results == ["refused by both"] * len(samples)
