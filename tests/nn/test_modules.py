"""What all eight modules share with torch.nn's: signatures, text, conversion, copies, and the tools that trace them."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import fx
from torch.func import functional_call

import fastlm.nn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

X, CLASSES = torch.linspace(-2, 3, 60).view(3, 5, 4), torch.arange(15).view(3, 5) % 6
ROWS = X.flatten(0, 1)
MODULES = {
    "CrossEntropyLoss": (((torch.linspace(0.5, 1, 4),), {"label_smoothing": 0.1}), (ROWS, CLASSES.flatten() % 4)),
    "GELU": ((("tanh",), {}), (X,)),
    "LayerNorm": (((4,), {"eps": 1e-3}), (X,)),
    "LinearCrossEntropyLoss": (((4, 6), {"bias": True, "reduction": "sum"}), (ROWS, CLASSES.flatten())),
    "LogSoftmax": (((0,), {}), (X,)),
    "MultiheadAttention": (((4, 2), {"batch_first": True}), (X, X, X)),
    "RMSNorm": ((((5, 4),), {}), (X,)),
    "Softmax": (((-1,), {}), (X,)),
}
every_module = pytest.mark.parametrize("name", sorted(MODULES))
OF_TORCH = [name for name in sorted(MODULES) if hasattr(torch.nn, name)]  # before 2.13 not LinearCrossEntropyLoss
every_module_of_torch = pytest.mark.parametrize("name", OF_TORCH)


class Model(torch.nn.Module):
    """The module under a name, with something before it, as in a model."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*inputs)


class ModelOfOne(Model):
    def forward(self, x):
        return self.layer(x)


class ModelOfTwo(Model):
    def forward(self, x, target):
        return self.layer(x, target)


class ModelOfThree(Model):
    def forward(self, query, key, value):
        return self.layer(query, key, value)


def made(owner, name):
    (arguments, keywords), inputs = MODULES[name]
    torch.manual_seed(0)
    return getattr(owner, name)(*arguments, **keywords).eval(), inputs


def in_a_model(name):
    """(a model that holds our module, its inputs)."""
    module, inputs = made(fastlm.nn, name)
    return (ModelOfOne, ModelOfTwo, ModelOfThree)[len(inputs) - 1](module), inputs


def values(module, inputs):
    """All tensors of the result."""
    out = module(*inputs)
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]


def are_equal(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_every_module_is_here():
    assert sorted(MODULES) == sorted(fastlm.nn.__all__)


def parameters(function):
    """(positional, keyword-only) of a function, each as pairs of a name and its default."""
    found = inspect.signature(function).parameters.values()
    pairs = [(p.name, p.default) for p in found if p.kind == p.POSITIONAL_OR_KEYWORD]
    return pairs, {p.name: p.default for p in found if p.kind == p.KEYWORD_ONLY}


@every_module_of_torch
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_of_modules_begin_with_torchs(name, method):
    ours, theirs = (parameters(getattr(getattr(owner, name), method)) for owner in (fastlm.nn, torch.nn))
    assert ours[0][: len(theirs[0])] == theirs[0]
    assert ours[1].items() >= theirs[1].items()
    assert method == "forward" or len(ours[0]) == len(theirs[0]), "what torch's does not have is keyword-only"


@every_module_of_torch
def test_modules_are_torchs_in_class_and_text(name):
    (ours, _), (theirs, _) = made(fastlm.nn, name), made(torch.nn, name)
    assert isinstance(ours, getattr(torch.nn, name))
    assert repr(ours) == repr(theirs)


@every_module_of_torch
def test_modules_become_each_others_by_their_class(name):
    (theirs, inputs), (ours, _) = made(torch.nn, name), made(fastlm.nn, name)
    converted, back = copy.deepcopy(theirs), copy.deepcopy(ours)
    converted.__class__, back.__class__ = type(ours), type(theirs)
    assert are_equal(values(converted, inputs), values(ours, inputs))
    assert are_equal(values(back, inputs), values(theirs, inputs))
    assert repr(converted) == repr(theirs)
    copies = [pickle.loads(pickle.dumps(converted)), copy.deepcopy(converted)]
    assert all(are_equal(values(copied, inputs), values(ours, inputs)) for copied in copies)


class TorchsAreOurs(pickle.Unpickler):
    """Finds our class wherever the file names PyTorch's."""

    def find_class(self, module, name):
        is_ours = module.startswith("torch.nn.modules") and name in fastlm.nn.__all__
        return getattr(fastlm.nn, name) if is_ours else super().find_class(module, name)


@every_module_of_torch
def test_a_pickle_of_torchs_module_loads_as_ours(name):
    theirs, inputs = made(torch.nn, name)
    loaded = TorchsAreOurs(io.BytesIO(pickle.dumps(theirs))).load()
    assert type(loaded) is getattr(fastlm.nn, name)
    assert are_equal(values(loaded, inputs), values(made(fastlm.nn, name)[0], inputs))


@every_module
def test_copies_of_modules_give_the_same_values(name):
    module, inputs = made(fastlm.nn, name)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)
    assert all(are_equal(values(copied, inputs), values(module, inputs)) for copied in copies)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert are_equal(values(lambda *x: functional_call(module, state, x), inputs), values(module, inputs))


@every_module
def test_models_with_our_modules_are_traced_by_fx(name):
    model, inputs = in_a_model(name)
    traced = fx.symbolic_trace(model)
    for graph in (traced, pickle.loads(pickle.dumps(traced))):
        assert are_equal(values(graph, inputs), values(model, inputs))


class Doubled(fastlm.nn.MultiheadAttention):
    def forward(self, query, key, value):
        return 2 * super().forward(query, key, value)[0], None


@pytest.mark.parametrize("layer", [fastlm.nn.MultiheadAttention, Doubled])
def test_fx_counts_what_hooks_and_subclasses_add_once(layer):
    model = ModelOfThree(layer(4, 2)).eval()
    model.layer.register_forward_hook(lambda module, inputs, out: (out[0] + 1, None))
    assert are_equal(values(fx.symbolic_trace(model), (X, X, X)), values(model, (X, X, X)))


SCRIPTED = [name for name in sorted(MODULES) if name != "LinearCrossEntropyLoss"]  # nor is torch's compiled


@pytest.mark.parametrize("name", SCRIPTED)
def test_models_with_our_modules_are_compiled_by_torchscript(name):
    model, inputs = in_a_model(name)
    converted, _ = made(torch.nn, name)
    converted.__class__ = getattr(fastlm.nn, name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    for scripted in (torch.jit.load(file), torch.jit.script(converted)):
        assert are_equal(values(scripted, inputs), values(model, inputs))


EXTRAS = {
    "Softmax": ({"scale": 0.5}, {"causal": True}),
    "LogSoftmax": ({"causal": True},),
    "CrossEntropyLoss": (
        *({"z_loss": 0.1}, {"softcap": 2.0}, {"num_classes": 3}, {"inplace": True}),
        {"z_loss": 0.1, "num_classes": 4},
    ),
}


@pytest.mark.parametrize(("name", "extras"), [(name, extras) for name in EXTRAS for extras in EXTRAS[name]])
def test_torchscript_refuses_what_torchs_module_does_not_have(name, extras):
    scripted = torch.jit.script(getattr(fastlm.nn, name)(**extras))
    inputs = MODULES[name][1]
    with pytest.raises(torch.jit.Error, match=r"compiles torch\.nn's module"):
        scripted(*inputs)


def test_torchscript_refuses_a_mask():
    scripted = torch.jit.script(fastlm.nn.Softmax(-1))
    with pytest.raises(torch.jit.Error, match=r"compiles torch\.nn's module"):
        scripted(X, X > 0)
