"""PyTorch's own samples of the modules: computed as torch.nn's in every mode, copied, saved and converted."""

import copy
import functools
import io
import pickle

import pytest
import torch

import fastlm.nn
from tests.support.sample_checks import (
    CHECKS,
    REFUSALS,
    Report,
    are_same,
    call_of_module,
    copied,
    described,
    made,
    outcome,
    outcome_of_wrong_call,
    tensors_in,
    wrong_calls,
)
from tests.support.sample_exceptions import FLOATS, WRONG, excuses_of
from tests.support.samples import MODULES, torch_module_error_samples, torch_module_samples

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]

NAMES = [name for name in MODULES if hasattr(torch.nn, name.split(".")[-1])]  # torch 2.11 has no LinearCrossEntropyLoss
# As layer_device of tests/conftest.py, on a CPU. The compiled code is looked at in the tests of the ops; of the losses
# there are no Triton kernels.
CASES = [pytest.param(name, "cpu", "default", id=f"{name}-default") for name in NAMES]
CASES += [
    pytest.param(name, "cpu", "interpreted", id=f"{name}-interpreted", marks=pytest.mark.interpreted)
    for name in NAMES
    if "Loss" not in name
]


def classes(name):
    return (getattr(of, name.split(".")[-1]) for of in (fastlm.nn, torch.nn))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("name", "layer_device", "implementation"), CASES, indirect=["layer_device"])
def test_modules_equal_torchs_on_all_samples_of_torch(name, dtype, layer_device, implementation, record_property):
    report = Report(excuses_of(name, dtype, implementation))
    for sample in torch_module_samples(name, dtype):
        call = call_of_module(*classes(name), sample, dtype)
        for check in CHECKS:
            report.add(check, call.name, functools.partial(outcome, call, check))
        for wrong in wrong_calls(call):
            report.add(WRONG, wrong.name, functools.partial(outcome_of_wrong_call, wrong))
        evaluated = call_of_module(*classes(name), sample, dtype, training=False)
        report.add("evaluation", call.name, functools.partial(outcome, evaluated, "no_grad"))
    report.conclude(record_property)


# What a module may go through and still be the same. The first argument is our class, the second torch's.


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def with_class(module, cls):
    module.__class__ = cls
    return module


def with_state(module, state_dict):
    module.load_state_dict(state_dict)
    return module


SAME_AS_OURS = {
    "deepcopy": lambda ours, theirs, fresh: copy.deepcopy(ours),
    "pickle": lambda ours, theirs, fresh: pickled(ours),
    "torch.save": lambda ours, theirs, fresh: saved_and_loaded(ours),
    "torch's state": lambda ours, theirs, fresh: with_state(fresh, theirs.state_dict()),
    "torch's by its class": lambda ours, theirs, fresh: with_class(copy.deepcopy(theirs), type(ours)),
    "torch's unpickled, by its class": lambda ours, theirs, fresh: with_class(pickled(theirs), type(ours)),
    "torch's by its class, pickled": lambda ours, theirs, fresh: pickled(with_class(copy.deepcopy(theirs), type(ours))),
    "to torch's class and back": lambda ours, theirs, fresh: with_class(
        with_class(copy.deepcopy(ours), type(theirs)), type(ours)
    ),
}
SAME_AS_TORCHS = {
    "our state": lambda ours, theirs, fresh: with_state(fresh, ours.state_dict()),
    "ours by its class": lambda ours, theirs, fresh: with_class(copy.deepcopy(ours), type(theirs)),
    "ours unpickled, by its class": lambda ours, theirs, fresh: with_class(pickled(ours), type(theirs)),
}


def results(module, sample, dtype):
    """All that comes of a call and of the backward pass behind it."""
    torch.manual_seed(0)
    args, kwargs = copied((sample.args, sample.kwargs), dtype)
    outputs = tensors_in(module(*args, **kwargs))
    wanted = [x for x in (*tensors_in((args, kwargs)), *module.parameters()) if x.requires_grad]
    upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, wanted, upstream, materialize_grads=True, allow_unused=True)]


def assert_converts(convert, into, ours, theirs, sample, dtype):
    converted = convert(ours, theirs, made(type(into), sample, dtype))
    assert type(converted) is type(into)
    assert repr(converted) == repr(into)
    assert are_same(results(converted, sample, dtype), results(into, sample, dtype)), "the results differ"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_modules_survive_copies_files_and_changes_of_class(name, dtype, record_property):
    report = Report([])
    for sample in torch_module_samples(name, dtype):
        ours, theirs = (made(cls, sample, dtype) for cls in classes(name))
        for conversions, into in ((SAME_AS_OURS, ours), (SAME_AS_TORCHS, theirs)):
            for conversion, convert in conversions.items():
                report.ask(
                    conversion,
                    described(sample),
                    functools.partial(assert_converts, convert, into, ours, theirs, sample, dtype),
                )
    report.conclude(record_property)


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_made_as_torchs(name, record_property):
    report = Report([])

    def same_words():
        assert repr(ours) == repr(theirs)

    def same_state():
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert are_same(tensors_in(ours.state_dict()), tensors_in(theirs.state_dict()))
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]

    def same_in_double():
        double = copy.deepcopy(ours).double()
        again = with_state(made(type(ours), sample, torch.float64), double.state_dict())
        assert are_same(results(double, sample, torch.float64), results(again, sample, torch.float64))

    for sample in torch_module_samples(name, torch.float32):
        ours, theirs = (made(cls, sample, torch.float32, drawn=False) for cls in classes(name))
        for question in (same_words, same_state, same_in_double):
            report.ask(question.__name__, described(sample), question)
    report.conclude(record_property)


@pytest.mark.parametrize("name", NAMES)
def test_modules_refuse_what_torch_says_it_refuses(name, record_property):
    samples = torch_module_error_samples(name)
    for sample in samples:
        for cls in classes(name):
            with pytest.raises(REFUSALS):
                made(cls, sample, torch.float32)(*sample.args, **sample.kwargs)
    record_property("refused by both", len(samples))
