"""Autograd and the dispatcher are asked where there is something for them to do, and cost nothing elsewhere."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.ops._register import RawOp, apply

softmax = importlib.import_module("fastlm.ops.softmax")  # the package has a function of that name


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.factor = 2
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return ctx.factor * x * dy


def test_apply_has_the_gradient_of_the_function():
    x = torch.tensor(3.0, requires_grad=True)
    apply(Square, x).backward()
    assert x.grad == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_apply_leaves_autograd_out_where_gradients_are_off(monkeypatch, mode):
    monkeypatch.setattr(Square, "apply", None)
    with mode():
        y = apply(Square, torch.tensor(3.0, requires_grad=True))
    assert y == 9
    assert not y.requires_grad


# A raw op without its way through the dispatcher


class Seen(TorchDispatchMode):
    """Notes the ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def by_dispatcher(op):
    """The op, and a list of the calls of it that PyTorch dispatches."""
    calls = []

    def overload(*args):
        calls.append(args)
        return op.overload(*args)

    return RawOp(overload, op.implementation), calls


@pytest.fixture
def softmax_op(kernel_device):
    """The raw op, and the calls of it that PyTorch dispatches."""
    return by_dispatcher(softmax.forward_op)


def options(dtype=torch.float32):
    return None, 1.0, False, False, dtype


def test_raw_op_runs_at_once_where_nothing_listens(softmax_op, kernel_device):
    op, calls = softmax_op
    x = torch.randn(3, 5, device=kernel_device)
    assert torch.equal(op(x, *options()), op.overload(x, *options()))
    assert len(calls) == 1
    assert op(torch.nn.Parameter(x, requires_grad=False), *options()).shape == x.shape
    assert len(calls) == 1


def test_raw_op_gives_hints_to_its_implementation_and_none_to_the_dispatcher():
    given = []

    def implementation(x, hint=None):
        given.append(hint)
        return x

    op = RawOp(implementation, implementation)
    x = torch.ones(2)
    op(x, hint="kept")
    with Seen():
        op(x, hint="kept")
    assert given == ["kept", None]


def test_raw_op_is_seen_by_a_dispatch_mode(softmax_op, kernel_device):
    with Seen() as seen:
        softmax_op[0](torch.randn(3, 5, device=kernel_device), *options())
    assert "fastlm::softmax" in seen.names


def test_raw_op_is_seen_by_the_profiler(softmax_op, kernel_device):
    with torch.profiler.profile() as profiler:
        softmax_op[0](torch.randn(3, 5, device=kernel_device), *options())
    assert "fastlm::softmax" in {event.key for event in profiler.key_averages()}


def test_raw_op_is_seen_by_fake_tensors(softmax_op):
    with FakeTensorMode():
        y = softmax_op[0](torch.empty(3, 5), *options())
    assert isinstance(y, FakeTensor)
    assert isinstance(softmax_op[0](y, *options()), FakeTensor)  # outside of the mode


def test_raw_op_is_seen_by_tracing(softmax_op, kernel_device):
    op, calls = softmax_op
    x = torch.randn(3, 5, device=kernel_device)
    traced = torch.jit.trace(lambda x: op(x, *options()), x)
    assert calls
    assert "fastlm::softmax" in str(traced.graph)


def test_raw_op_is_mapped_by_the_dispatcher(softmax_op, kernel_device):
    op, calls = softmax_op
    x = torch.randn(2, 3, 5, device=kernel_device)
    y = torch.func.vmap(lambda x: op(x, *options()))(x)
    assert calls
    assert torch.equal(y, op(x, *options()))


def test_raw_op_negates_a_lazily_negated_tensor(softmax_op, kernel_device):
    """Its memory holds the numbers of the other sign, and the dispatcher resolves that."""
    op, calls = softmax_op
    x = torch.randn(3, 5, dtype=torch.complex64, device=kernel_device).conj().imag
    assert x.is_neg()
    assert torch.equal(op(x, *options()), op(x.clone(), *options()))
    assert len(calls) == 1


def test_raw_op_has_many_upstream_gradients_as_one(kernel_device):
    x = torch.randn(3, 5, device=kernel_device, requires_grad=True)
    upstream = torch.randn(4, 3, 5, device=kernel_device)
    (at_once,) = torch.autograd.grad(softmax.softmax(x, -1), x, upstream, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(softmax.softmax(x, -1), x, dy)[0] for dy in upstream]
    assert torch.equal(at_once, torch.stack(one_by_one))


def test_raw_op_of_a_meta_tensor_is_dispatched(softmax_op):
    assert softmax_op[0](torch.empty(3, 5, device="meta"), *options()).is_meta
