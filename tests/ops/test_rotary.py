"""Rotary embedding against complex multiplication in float64."""

import pytest
import torch

from fastlm.ops.rotary import apply_rotary, apply_rotary_reference
from tests.accuracy import assert_accurate

B, T, H, D = 2, 7, 3, 10


def angles(R=D, positions=T):
    theta = torch.arange(positions)[:, None] * 10.0 ** -torch.linspace(0, 2, R // 2)
    return theta.cos(), theta.sin()


def oracle(x, cos, sin, interleaved):
    """Pairs as complex numbers, times cos + i sin of each token (..., T, R / 2)."""
    R = 2 * cos.shape[-1]
    pairs = x[..., :R].unflatten(-1, (R // 2, 2) if interleaved else (2, R // 2))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(first, second) * torch.complex(cos, sin).unsqueeze(-2)
    parts = torch.stack([turned.real, turned.imag], dim=-1 if interleaved else -2)
    return torch.cat([parts.flatten(-2), x[..., R:]], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("R", [D, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rotary_and_gradients_match_complex_rotation(interleaved, R, dtype):
    cos, sin = angles(R)
    x, k, upstream = (torch.randn(B, T, H, D).to(dtype) for _ in range(3))

    def run(function, dtype):
        inputs = [x.to(dtype).requires_grad_(), k.to(dtype).requires_grad_()]
        outputs = function(*inputs)
        return [*outputs, *torch.autograd.grad(outputs, inputs, [upstream.to(dtype)] * 2)]

    ours = run(lambda q, k: apply_rotary(q, k, cos, sin, interleaved=interleaved), dtype)
    theirs = run(lambda *x: [apply_rotary_reference(y, cos[:, None], sin[:, None], interleaved) for y in x], dtype)
    truth = run(lambda *x: [oracle(y, cos.double(), sin.double(), interleaved) for y in x], torch.float64)
    for results in zip(ours, theirs, truth, strict=True):
        assert_accurate(*results)


def test_apply_rotary_takes_the_angles_of_given_positions():
    cos, sin = angles(positions=20)
    positions = torch.randint(20, (B, T))
    q = torch.randn(B, T, H, D)
    ours, k = apply_rotary(q, None, cos, sin, positions=positions)
    assert k is None
    packed, _ = apply_rotary(q.flatten(0, 1), None, cos[positions.flatten()], sin[positions.flatten()])
    assert torch.equal(ours, packed.view_as(q))
    assert_accurate(ours, ours, oracle(q.double(), cos.double()[positions], sin.double()[positions], False))


def test_apply_rotary_in_place_overwrites_and_still_has_gradients():
    cos, sin = angles()
    leaf = torch.randn(B, T, H, D, requires_grad=True)
    expected, _ = apply_rotary(leaf, None, cos, sin)
    x = leaf * 1
    result, _ = apply_rotary(x, None, cos, sin, inplace=True)
    assert result.data_ptr() == x.data_ptr()
    assert torch.equal(result, expected)
    upstream = torch.randn(B, T, H, D)
    assert torch.equal(*(torch.autograd.grad(y, leaf, upstream)[0] for y in (result, expected)))


def test_apply_rotary_in_place_is_noticed_by_others_that_saved_the_tensor():
    x = torch.randn(B, T, H, D, requires_grad=True) * 1
    other = x.square()
    apply_rotary(x, None, *angles(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


def test_apply_rotary_second_derivative_is_that_of_a_linear_map():
    x = torch.randn(B, T, H, D, requires_grad=True)
    cos, sin = angles()
    (first,) = torch.autograd.grad(apply_rotary(x, None, cos, sin)[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)  # a rotation keeps lengths: the sum of squares is |x|^2
    assert_accurate(second, second + torch.finfo(second.dtype).eps, torch.full_like(second, 2.0).double())


def test_apply_rotary_gives_gradients_to_trained_angles():
    cos, sin = (x.requires_grad_() for x in angles())
    apply_rotary(torch.ones(B, T, H, D), None, cos, sin)[0].sum().backward()
    assert torch.equal(cos.grad, torch.full_like(cos, 2.0 * B * H))


@pytest.mark.parametrize("inplace", [False, True])
def test_apply_rotary_compiles_in_one_graph(inplace):
    cos, sin = angles()
    x = torch.randn(B, T, H, D, requires_grad=True)

    def call(x):
        return apply_rotary(x * 1, None, cos, sin, inplace=inplace)[0]

    ours, eager = torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x)
    assert torch.equal(ours, eager)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, eager)))


def test_rotary_raw_ops_pass_opcheck():
    cos, sin = (x[:, None] for x in angles(4))
    for op in (torch.ops.fastlm.rotary.default, torch.ops.fastlm.rotary_.default):
        torch.library.opcheck(op, (torch.randn(B, T, H, D), cos, sin, False, False))


@pytest.mark.parametrize(
    ("q", "cos", "positions", "message"),
    [
        ((T, D), (T, 5), None, "q has shape"),
        ((B, T, H, D), (T, 6), None, r"R <= 10"),
        ((B, T, H, D), (3, 5), None, "cos has 3 positions, q has 7 tokens"),
        ((B, T, H, D), (T, 5), (T,), "positions has shape"),
    ],
)
def test_apply_rotary_says_what_is_wrong(q, cos, positions, message):
    positions = None if positions is None else torch.zeros(positions, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        apply_rotary(torch.zeros(q), None, torch.zeros(cos), torch.zeros(cos), positions=positions)
