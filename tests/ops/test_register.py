"""Autograd is asked for where there may be gradients, and costs nothing where they are off."""

import pytest
import torch

from fastlm.ops._register import apply


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
