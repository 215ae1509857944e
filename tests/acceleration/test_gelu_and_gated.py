"""GELU and gated feed-forward blocks are recognised by what they compute, and nothing that only resembles them is."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm
from fastlm.acceleration.activations import match_gated, match_gelu
from fastlm.acceleration.matching import Match
from tests.support.accuracy import assert_accurate

C, HIDDEN = 16, 24


class TanhGelu(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class ErfGelu(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ClippedGelu(nn.Module):
    def forward(self, x):
        return F.gelu(x).clamp(-10, 10)


@pytest.mark.parametrize(("make", "approximate"), [(TanhGelu, "tanh"), (ErfGelu, "none")])
def test_gelu_is_found_by_what_it_computes(make, approximate):
    match = match_gelu(make())
    assert isinstance(match, Match)
    assert match.form == approximate


@pytest.mark.parametrize("make", [QuickGelu, ClippedGelu])
def test_other_activations_called_gelu_are_left_alone_with_a_reason(make):
    model = fastlm.accelerate(nn.Sequential(make()))
    assert type(model[0]) is make
    assert "neither form" in fastlm.accelerated(model).skipped[0].detail


class LearnedGelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return F.gelu(x * self.slope)


def test_a_gelu_with_parameters_is_left_alone_with_a_reason():
    model = fastlm.accelerate(nn.Sequential(LearnedGelu()))
    assert type(model[0]) is LearnedGelu
    assert "parameters" in fastlm.accelerated(model).skipped[0].detail


class Gated(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.a, self.b = nn.Linear(C, HIDDEN, bias), nn.Linear(C, HIDDEN, bias)
        self.out = nn.Linear(HIDDEN, C, bias)

    def forward(self, x):
        return self.out(F.silu(self.a(x)) * self.b(x))


class GateSecond(Gated):
    def forward(self, x):
        return self.out(self.a(x) * F.silu(self.b(x)))


class Joint(nn.Module):
    """One layer gives both halves, the gate second."""

    def __init__(self):
        super().__init__()
        self.both, self.act, self.down = nn.Linear(C, 2 * HIDDEN, False), nn.SiLU(), nn.Linear(HIDDEN, C, False)

    def forward(self, x):
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class Square(nn.Module):
    """Layers of one size, so that every order has to be tried."""

    def __init__(self):
        super().__init__()
        self.down, self.up, self.gate = (nn.Linear(C, C, False) for _ in range(3))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GeluGated(Gated):
    def forward(self, x):
        return self.out(F.gelu(self.a(x)) * self.b(x))


class GeluJoint(Joint):
    def __init__(self):
        super().__init__()
        self.act = nn.GELU(approximate="tanh")


class WithDropout(Gated):
    """As in T5, whose dropout comes before the last layer."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.act, self.dropout = nn.GELU(approximate="tanh"), nn.Dropout(rate)

    def forward(self, x):
        return self.out(self.dropout(self.act(self.a(x)) * self.b(x)))


BLOCKS = [Gated, lambda: Gated(bias=True), GateSecond, Joint, Square, GeluGated, GeluJoint, WithDropout]


@pytest.mark.parametrize("make", BLOCKS)
def test_gated_blocks_are_found_and_give_the_same_values_and_gradients(make):
    block, x = make(), torch.randn(2, 3, C)
    expected = block(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    model = fastlm.accelerate(nn.Sequential(block))
    assert "0" in [row.name for row in fastlm.accelerated(model).swapped]
    found = model(x)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    for gradient, parameter in zip(gradients, block.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


class ReluGated(Gated):
    def forward(self, x):
        return self.out(F.relu(self.a(x)) * self.b(x))


class WithResidual(Gated):
    def forward(self, x):
        return x + super().forward(x)


class Scaled(Gated):
    def forward(self, x):
        return 1.01 * super().forward(x)


class FunctionalDropout(Gated):
    def forward(self, x):
        return self.out(F.dropout(F.silu(self.a(x)) * self.b(x), 0.1, self.training))


class DropoutLast(WithDropout):
    def forward(self, x):
        return self.dropout(self.out(self.act(self.a(x)) * self.b(x)))


class ReadsWeights(Gated):
    """Without calling its layers, of which adapters and hooks then count for nothing."""

    def forward(self, x):
        a, b = (F.linear(x, layer.weight, layer.bias) for layer in (self.a, self.b))
        return self.out(F.silu(a) * b)


@pytest.mark.parametrize("make", [ReadsWeights, ReluGated, WithResidual, Scaled, FunctionalDropout, DropoutLast])
def test_blocks_that_compute_something_else_are_not_matched(make):
    assert match_gated(make()) is None


def test_dropout_of_a_gated_block_stays_where_it_is():
    block, x = WithDropout(0.5), torch.randn(2, 3, C)
    assert match_gated(block).form.dropout == "dropout"
    torch.manual_seed(5)
    expected = block(x)
    fastlm.accelerate(block)
    torch.manual_seed(5)
    torch.testing.assert_close(block(x), expected)


def test_adapters_put_in_afterwards_count():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.extra = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.extra(x)

    block, x = Gated(), torch.randn(2, 3, C)
    fastlm.accelerate(nn.Sequential(block))
    block.a = Adapted(block.a)
    expected = block.out(F.silu(block.a(x)) * block.b(x))
    torch.testing.assert_close(block(x), expected)


class OwnDropout(nn.Dropout):
    pass


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1) > 0.5) if self.training else x


DROPPING = {
    "a subclass of dropout": lambda: OwnDropout(0.5),
    "a part of a sequence": lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.5)),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
    "rows": DropPath,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", DROPPING.values(), ids=DROPPING)
def test_a_block_that_drops_in_another_way_is_not_matched_in_either_mode(make, training):
    block = WithDropout()
    block.dropout, block.act = make(), nn.SiLU()
    assert match_gated(block.train(training)) is None


class CountsCalls(nn.SiLU):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_trials_run_no_module_of_the_model_and_no_hook():
    block, heard = WithDropout(), []
    block.act = CountsCalls()
    block.act.register_forward_hook(lambda *_: heard.append(1))
    block.register_forward_hook(lambda *_: heard.append(1))
    fastlm.accelerate(nn.Sequential(block))
    assert (block.act.calls, heard) == (0, [])


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_the_activation_of_a_block_fire_and_count(when):
    block, x = Joint(), torch.randn(2, 3, C)
    model = nn.Sequential(block)
    if when == "after":
        fastlm.accelerate(model)
    handle = block.act.register_forward_hook(lambda module, given, result: result * 0)
    fastlm.accelerate(model)
    assert not model(x).any()
    handle.remove()
    assert model(x).any()


def test_an_activation_put_in_afterwards_counts():
    block, x = Joint(), torch.randn(2, 3, C)
    fastlm.accelerate(nn.Sequential(block))
    block.act = nn.ReLU()
    up, gate = block.both(x).chunk(2, dim=-1)
    torch.testing.assert_close(block(x), block.down(F.relu(gate) * up))


class Casts(WithDropout):
    """As T5 does, whose last layer stays in float32."""

    def forward(self, x):
        hidden = self.dropout(self.act(self.a(x)) * self.b(x))
        return self.out(hidden.to(self.out.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_block_that_casts_before_its_last_layer_still_does(dtype):
    block = Casts().to(dtype)
    block.out.float()
    x = torch.randn(2, 3, C, dtype=dtype)
    model, truth = nn.Sequential(block), copy.deepcopy(block).double()
    expected, exact = (result_and_gradients(each, given) for each, given in ((block, x), (truth, x.double())))
    fastlm.accelerate(model)
    assert "0" in [row.name for row in fastlm.accelerated(model).swapped]
    assert block(x).dtype == torch.float32
    for results in zip(result_and_gradients(block, x), expected, exact, strict=True):
        assert_accurate(*results)


def result_and_gradients(block, x):
    x = x.clone().requires_grad_()
    y = block(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


class CastsFirst(Gated):
    def forward(self, x):
        return super().forward(x.to(self.a.weight.dtype))


class InFloat32(Gated):
    def forward(self, x):
        return super().forward(x).float()


class GeluInFloat32(nn.Module):
    def forward(self, x):
        return F.gelu(x.float())


@pytest.mark.parametrize("make", [CastsFirst, InFloat32, GeluInFloat32])
def test_modules_with_casts_of_their_own_are_left_alone(make):
    assert not fastlm.accelerated(fastlm.accelerate(nn.Sequential(make()))).swapped
