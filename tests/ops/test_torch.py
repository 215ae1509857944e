"""Ours have the arguments of PyTorch's functions and may take their names: none then calls itself."""

import inspect
import re
import runpy

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.models import GPT, GPTConfig
from fastlm.ops import _torch
from fastlm.ops.cross_entropy import cross_entropy_reference
from fastlm.ops.linear_cross_entropy import linear_cross_entropy_reference

NAMESAKES = [(owner, name) for owner in (F, torch) for name in ops.__all__ if hasattr(owner, name)]


def put_in_place(monkeypatch, *names):
    for owner, name in NAMESAKES:
        if not names or name in names:
            monkeypatch.setattr(owner, name, getattr(ops, name))


CLASSES = torch.tensor([0, 3, -100, 7])
SHAPE = (8,)
CALLS = {
    "layer_norm": lambda x, w: F.layer_norm(x, SHAPE, w),
    "layer_norm of float64": lambda x, w: F.layer_norm(x.double(), SHAPE, w.double()),
    "rms_norm": lambda x, w: F.rms_norm(x, SHAPE, w),
    "torch.rms_norm": lambda x, w: torch.rms_norm(x, SHAPE, w),
    "gelu": lambda x, w: F.gelu(x) * w + F.gelu(x, approximate="tanh"),
    "softmax": lambda x, w: F.softmax(x, -1) * w,
    "log_softmax": lambda x, w: F.log_softmax(x, 0) * w,
    "cross_entropy": lambda x, w: F.cross_entropy(x * w, CLASSES, label_smoothing=0.1),
    "cross_entropy of probabilities": lambda x, w: F.cross_entropy(x * w, x.detach().softmax(-1), reduction="sum"),
    "cross_entropy of z_loss": lambda x, w: ops.cross_entropy((x * w).double(), CLASSES, z_loss=0.1),
    "scaled_dot_product_attention": lambda x, w: F.scaled_dot_product_attention(*[(x * w).expand(1, 2, 4, 8)] * 3),
    "add_layer_norm": lambda x, w: sum(ops.add_layer_norm(x, x.sin(), SHAPE, w)),
    "add_rms_norm": lambda x, w: sum(ops.add_rms_norm(x, x.sin(), SHAPE, w)),
    "bias_gelu": lambda x, w: ops.bias_gelu(x, w),
    "swiglu": lambda x, w: ops.swiglu(x, x * w),
    "geglu": lambda x, w: ops.geglu(x, x * w),
    "attention": lambda x, w: ops.attention(*[(x * w).expand(1, 2, 4, 8)] * 3, causal=True),
    "linear_cross_entropy": lambda x, w: ops.linear_cross_entropy(x, torch.eye(9, 8) * w, CLASSES),
    "linear_cross_entropy of float64": lambda x, w: ops.linear_cross_entropy(
        x.double(), torch.eye(9, 8).double() * w, CLASSES
    ),
    "linear_logprobs of float64": lambda x, w: (
        ops.linear_logprobs(x.double(), torch.eye(9, 8).double() * w, CLASSES, entropy=True).entropy
    ),
    "cross_entropy_reference": lambda x, w: cross_entropy_reference(x * w, CLASSES, reduction="none"),
    "linear_cross_entropy_reference": lambda x, w: linear_cross_entropy_reference(x, torch.eye(9, 8) * w, CLASSES),
}


def outcome(call):
    x, w = torch.linspace(-2, 3, 32).view(4, 8).requires_grad_(), torch.linspace(0.5, 2, 8).requires_grad_()
    y = call(x, w)
    return y, *torch.autograd.grad(y.square().sum(), (x, w))


@pytest.mark.parametrize("name", CALLS)
def test_ops_in_torchs_place_give_what_they_gave_before(name, monkeypatch):
    expected = outcome(CALLS[name])
    put_in_place(monkeypatch)
    assert all(map(torch.equal, outcome(CALLS[name]), expected))


@pytest.mark.parametrize("function", ["layer_norm", "rms_norm", "gelu", "cross_entropy"])
def test_an_op_alone_in_torchs_place_gives_what_it_gave_before(function, monkeypatch):
    expected = outcome(CALLS[function])
    put_in_place(monkeypatch, function)
    assert all(map(torch.equal, outcome(CALLS[function]), expected))


def test_torchs_modules_run_ops_in_torchs_place(monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=torch.nn.GELU(), batch_first=True)
    model = torch.nn.Sequential(layer, torch.nn.RMSNorm(8), torch.nn.LogSoftmax(-1), torch.nn.Softmax(-1))

    def losses():
        out = model(torch.linspace(-1, 1, 48).view(2, 3, 8))
        loss = torch.nn.CrossEntropyLoss()(out.flatten(0, 1), torch.arange(6))
        return loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    expected = losses()
    put_in_place(monkeypatch)
    assert all(map(torch.equal, losses(), expected))


@pytest.mark.parametrize("config", [GPTConfig.llama, GPTConfig])
def test_gpt_trains_equally_with_ops_in_torchs_place(config, monkeypatch):
    torch.manual_seed(0)
    model = GPT(config(vocab_size=65, sequence_length=8, num_layers=1, num_heads=2, hidden_size=16))
    tokens = torch.arange(16).view(2, 8)

    def trained():
        loss, _ = model(tokens, tokens + 1)
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    expected = trained()
    put_in_place(monkeypatch)
    assert all(map(torch.equal, trained(), expected))


def test_torchs_functions_are_found_below_names_that_were_replaced_before_the_import(monkeypatch):
    for owner, name in NAMESAKES:
        monkeypatch.setattr(owner, name, None)
    found = runpy.run_path(_torch.__file__)
    kept = [name for name in found if name in ops.__all__]
    assert kept == ["layer_norm", "rms_norm", "gelu", "scaled_dot_product_attention", "cross_entropy"]
    for name in kept[:-1]:
        assert found[name] is getattr(_torch, name)
    x = torch.randn(4, 8)
    assert torch.equal(found["cross_entropy"](x, CLASSES), ops.cross_entropy(x, CLASSES))


def test_ops_in_torchs_place_compile_without_a_break(monkeypatch):
    def block(x, w):
        return F.cross_entropy(F.gelu(F.layer_norm(x, SHAPE, w)) + F.rms_norm(x, SHAPE, w), CLASSES)

    expected = outcome(block)
    put_in_place(monkeypatch)
    torch.compiler.reset()
    assert all(map(torch.equal, outcome(torch.compile(block, fullgraph=True, backend="eager")), expected))


def parameters(function):
    """(positional, keyword-only) of a function, each a name and its default; of a builtin as its documentation says."""
    try:
        found = inspect.signature(function)
    except ValueError:
        listed = re.match(r"\s*\w+(\(.*?\)) ->", function.__doc__, re.DOTALL).group(1)
        found = inspect.signature(eval(f"(lambda {listed[1:-1]}: None)"))
    pairs = [(p.name, p.default) for p in found.parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    return pairs, {p.name: p.default for p in found.parameters.values() if p.kind == p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", [name for owner, name in NAMESAKES if owner is F])
def test_namesakes_have_torchs_arguments_and_add_keywords_alone(name):
    ours, theirs = parameters(getattr(ops, name)), parameters(getattr(F, name))
    assert ours[0] == theirs[0]
    assert ours[1].items() >= theirs[1].items()


def test_assume_constant_result_is_torchs():
    def theirs(): ...
    def ours(): ...

    assert vars(_torch.assume_constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
