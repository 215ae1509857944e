"""Norms are recognised by what they compute, under any name, and nothing that only resembles one is."""

import pytest
import torch
from torch import nn

import fastlm
from fastlm.acceleration.matching import Match
from fastlm.acceleration.norms import NormForm, match_norm
from tests.support.accuracy import assert_accurate

C = 48


class Rms(nn.Module):
    """As in Llama."""

    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(C)), eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        x = hidden_states.to(torch.promote_types(dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


class OnePlus(nn.Module):
    """As in Gemma: the weight is 1 + parameter and the result has the dtype of the input."""

    def __init__(self):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.randn(C)), 1e-5

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.scale)).type_as(x)


class MeanAndVariance(nn.Module):
    """The textbook's layer norm."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta, self.epsilon = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C)), 1e-6

    def forward(self, x):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.gamma * (x - mean) / torch.sqrt(variance + self.epsilon) + self.beta


class BetaFirst(MeanAndVariance):
    def __init__(self):
        super().__init__()
        self.gamma, self.beta = None, None
        self.beta, self.gamma = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))


class NoParameterNorm(nn.Module):
    """As in OLMo: nothing to learn, and eps in the code."""

    def forward(self, x):
        return nn.functional.layer_norm(x, (x.shape[-1],), None, None, 1e-5)


@pytest.mark.parametrize(
    ("norm", "form"),
    [
        (Rms(), NormForm("rms", "weight", None, "variance_epsilon", False, result="both")),
        (OnePlus(), NormForm("rms", "scale", None, "eps", True, result="input")),
        (MeanAndVariance(), NormForm("layer", "gamma", "beta", "epsilon", False, result="both")),
        (BetaFirst(), NormForm("layer", "gamma", "beta", "epsilon", False, result="both")),
        (NoParameterNorm(), NormForm("layer", None, None, 1e-5, False, result="input")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_are_found_by_what_they_compute(norm, form):
    match = match_norm(norm)
    assert isinstance(match, Match)
    assert match.form == form


@pytest.mark.parametrize("make", [Rms, OnePlus, MeanAndVariance, BetaFirst, NoParameterNorm])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_found_norms_give_values_gradients_and_dtype_of_the_original(make, dtypes):
    dtype, weight_dtype = dtypes
    theirs, x, upstream = make().to(weight_dtype), torch.randn(3, 5, C, dtype=dtype), torch.randn(3, 5, C)

    def run(norm, x):
        norm.zero_grad()
        x = x.clone().requires_grad_()
        y = norm(x)
        y.backward(upstream.to(y.dtype))
        return {"y": y.detach(), "dx": x.grad, **{name: p.grad.clone() for name, p in norm.named_parameters()}}

    expected = run(theirs, x)
    truth = run(make().double().requires_grad_(), x.double()) if not list(theirs.parameters()) else None
    if truth is None:
        double = make().double()
        double.load_state_dict(theirs.state_dict())
        truth = run(double, x.double())
    found = run(fastlm.accelerate(nn.Sequential(theirs))[0], x)
    for name in truth:
        assert_accurate(found[name], expected[name], truth[name], name)


def test_an_eps_that_changes_later_counts():
    norm = fastlm.accelerate(nn.Sequential(Rms()))[0]
    x = torch.randn(4, C) * 1e-3
    before = norm(x)
    norm.variance_epsilon = 1e-2
    assert norm(x).abs().max() < before.abs().max() / 10


class OtherEpsNorm(Rms):
    def forward(self, x):
        return super().forward(x) * (1 + 1e-3)


class ClampedNorm(Rms):
    def forward(self, x):
        return super().forward(x.clamp(-20, 20))


class GroupedNorm(Rms):
    """Over the halves of the last dimension."""

    def forward(self, x):
        return self.weight * nn.functional.rms_norm(x.unflatten(-1, (2, -1)), (C // 2,), None, 1e-6).flatten(-2)


class BatchedNorm(Rms):
    """Over all but the last dimension."""

    def forward(self, x):
        return self.weight * x / x.square().mean(0, keepdim=True).sqrt()


class BufferedNorm(Rms):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))


class FailingNorm(Rms):
    def forward(self, x):
        raise RuntimeError("needs a context")


class OneGainNorm(nn.Module):
    """One weight for all features."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:]) * self.gain + self.shift


class WithoutEpsNorm(Rms):
    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) * C**0.5 * self.weight


class FarClampedNorm(Rms):
    def forward(self, x):
        return super().forward(x.clamp(-1000, 1000))


@pytest.mark.parametrize(
    "make",
    [
        OneGainNorm,
        WithoutEpsNorm,
        FarClampedNorm,
        OtherEpsNorm,
        ClampedNorm,
        GroupedNorm,
        BatchedNorm,
        BufferedNorm,
        FailingNorm,
    ],
)
def test_what_only_resembles_a_norm_is_left_alone_with_a_reason(make):
    model = fastlm.accelerate(nn.Sequential(make()))
    assert type(model[0]) is make
    assert [row.family for row in fastlm.accelerated(model).skipped] == ["norms"]


def test_calls_with_more_arguments_run_the_original():
    class GatedNorm(Rms):
        def forward(self, x, gate=None):
            y = super().forward(x)
            return y if gate is None else y * torch.sigmoid(gate)

    norm = GatedNorm()
    x, gate = torch.randn(2, 3, C)
    expected = norm(x, gate=gate)
    swapped = fastlm.accelerate(nn.Sequential(norm))[0]
    assert fastlm.accelerated(nn.Sequential(swapped)).swapped
    assert type(swapped) is not GatedNorm
    assert torch.equal(swapped(x, gate=gate), expected)


class OtherImages(MeanAndVariance):
    """Channels first where there are four dimensions, as in networks of images."""

    def forward(self, x):
        return super().forward(x.transpose(1, 3)).transpose(1, 3) if x.dim() == 4 else super().forward(x)


class AlwaysFloat32(Rms):
    def forward(self, hidden_states):
        return super().forward(hidden_states.float())


@pytest.mark.parametrize("make", [OtherImages, AlwaysFloat32])
def test_norms_with_other_code_for_some_inputs_are_left_alone(make):
    assert not isinstance(match_norm(make()), Match)


class OfWeightDtype(Rms):
    """As in T5: a weight of 16 bits decides."""

    def forward(self, hidden_states):
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(self.weight.dtype)


def test_a_norm_whose_weight_decides_the_dtype_keeps_that():
    norm = OfWeightDtype().bfloat16()
    model = fastlm.accelerate(nn.Sequential(norm))
    assert fastlm.accelerated(model).swapped
    for dtype in (torch.float32, torch.bfloat16):
        assert norm(torch.randn(2, C, dtype=dtype)).dtype == torch.bfloat16
    assert norm.float()(torch.randn(2, C, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_private_eps_that_is_changed_counts():
    class Private(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self._eps = nn.Parameter(torch.randn(C)), 1e-6

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps)

    norm, x = Private(), torch.randn(2, C)
    fastlm.accelerate(nn.Sequential(norm))
    norm._eps = 0.05
    torch.testing.assert_close(norm(x), norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.05))


def test_a_norm_with_one_weight_for_all_features_is_not_tried_on_one_feature():
    assert match_norm(OneGainNorm()).reason == "its parameters have one element"
