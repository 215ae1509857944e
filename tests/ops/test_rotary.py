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


def with_gradients(function, tensors, upstream, dtype):
    """Outputs of function, and the gradients of the tensors."""
    inputs = [x.to(dtype).requires_grad_() for x in tensors]
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [dy.to(dtype) for dy in upstream])]


def assert_rotates(q, k, cos, sin, interleaved, positions=None):
    """q, k and their gradients are as near to complex rotation in float64 as those of the reference."""
    upstream = [torch.randn(x.shape, device=x.device).to(x.dtype) for x in (q, k)]
    rows = slice(q.shape[-3]) if positions is None else positions
    token_cos, token_sin = cos[rows], sin[rows]

    def reference(*tensors):
        return [
            apply_rotary_reference(x, token_cos[..., None, :], token_sin[..., None, :], interleaved) for x in tensors
        ]

    def truth(*tensors):
        return [oracle(x, token_cos.double(), token_sin.double(), interleaved) for x in tensors]

    def ours(q, k):
        return apply_rotary(q, k, cos, sin, interleaved=interleaved, positions=positions)

    results = [
        with_gradients(function, (q, k), upstream, dtype)
        for function, dtype in ((ours, q.dtype), (reference, q.dtype), (truth, torch.float64))
    ]
    for several in zip(*results, strict=True):
        assert_accurate(*several)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("R", [D, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rotary_and_gradients_match_complex_rotation(interleaved, R, dtype):
    q, k = torch.randn(B, T, H, D).to(dtype), torch.randn(B, T, 1, D).to(dtype)
    assert_rotates(q, k, *angles(R), interleaved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "R", "D"), [((3, 3), 10, 10), ((5, 1), 4, 10), ((1, 2), 16, 33), ((6, 2), 64, 64)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_kernel_and_gradients_match_complex_rotation(interleaved, heads, R, D, dtype, kernel_device):
    q, k = (torch.randn(B, 37, h, D).to(kernel_device, dtype) for h in heads)
    assert_rotates(q, k, *(x.to(kernel_device) for x in angles(R, 40)), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_kernel_finds_the_angles_of_packed_positions(interleaved, kernel_device):
    q, k = torch.randn(29, 3, D, device=kernel_device), torch.randn(29, 1, D, device=kernel_device)
    positions = torch.cat([torch.arange(n) for n in (1, 17, 11)]).to(kernel_device)
    assert_rotates(q, k, *(x.to(kernel_device) for x in angles(D, 17)), interleaved, positions)


def test_rotary_kernel_reads_the_parts_of_one_tensor_where_they_lie(kernel_device):
    qkv = torch.randn(B, T, 3 * H, D, device=kernel_device)
    cos, sin = (x.to(kernel_device) for x in angles())
    for views in (
        (qkv[:, :, :H], qkv[:, :, H : 2 * H]),
        (qkv.transpose(0, 1)[:, :, :H], qkv.transpose(0, 1)[:, :, H:]),
    ):
        cos, sin = (x.to(kernel_device) for x in angles(positions=views[0].shape[1]))
        copies = apply_rotary(*(x.contiguous() for x in views), cos, sin)
        for one, other in zip(apply_rotary(*views, cos, sin), copies, strict=True):
            assert torch.equal(one, other)


def test_rotary_kernel_in_place_overwrites_its_part_alone(kernel_device):
    qkv = torch.randn(B, T, 3 * H, D, device=kernel_device)
    cos, sin = (x.to(kernel_device) for x in angles(4))
    before, q, k = qkv.clone(), qkv[:, :, :H], qkv[:, :, H : 2 * H]
    expected = apply_rotary(q.clone(), k.clone(), cos, sin)
    results = apply_rotary(q, k, cos, sin, inplace=True)
    for one, other, where in zip(results, expected, (q, k), strict=True):
        assert one.data_ptr() == where.data_ptr()
        assert torch.equal(one, other)
    assert torch.equal(qkv[:, :, 2 * H :], before[:, :, 2 * H :])


def test_rotary_kernel_gives_nan_for_a_position_without_angles(kernel_device):
    cos, sin = (x.to(kernel_device) for x in angles(positions=4))
    positions = torch.tensor([0, 4, 3, -1], device=kernel_device)
    y, _ = apply_rotary(torch.ones(4, H, D, device=kernel_device), None, cos, sin, positions=positions)
    assert y.isnan().flatten(1).any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("shape", [(0, T, H, D), (B, 0, H, D), (0, H, D), (T, 0, D)])
def test_rotary_kernel_accepts_no_tokens_or_heads(shape, kernel_device):
    x = torch.empty(shape, device=kernel_device, requires_grad=True)
    y, _ = apply_rotary(x, None, *(a.to(kernel_device) for a in angles()))
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_apply_rotary_takes_the_angles_of_given_positions():
    cos, sin = angles(positions=20)
    positions = torch.randint(20, (B, T))
    q = torch.randn(B, T, H, D)
    ours, k = apply_rotary(q, None, cos, sin, positions=positions)
    assert k is None
    packed, _ = apply_rotary(q.flatten(0, 1), None, cos[positions.flatten()], sin[positions.flatten()])
    assert torch.equal(ours, packed.view_as(q))
    assert_accurate(ours, ours, oracle(q.double(), cos.double()[positions], sin.double()[positions], False))


def test_apply_rotary_in_place_overwrites_and_still_has_gradients(kernel_device):
    cos, sin = (x.to(kernel_device) for x in angles())
    leaf = torch.randn(B, T, H, D, device=kernel_device, requires_grad=True)
    expected, _ = apply_rotary(leaf, None, cos, sin)
    x = leaf * 1
    result, _ = apply_rotary(x, None, cos, sin, inplace=True)
    assert result.data_ptr() == x.data_ptr()
    assert torch.equal(result, expected)
    upstream = torch.randn(B, T, H, D, device=kernel_device)
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


@pytest.mark.parametrize("positions", [None, torch.zeros(B, T, dtype=torch.int64)], ids=["counted", "given"])
def test_rotary_raw_ops_pass_opcheck(positions, kernel_device):
    cos, sin = (x.to(kernel_device) for x in angles(4))
    positions = None if positions is None else positions.to(kernel_device)
    for op in (torch.ops.fastlm.rotary.default, torch.ops.fastlm.rotary_.default):
        tensors = [torch.randn(B, T, h, D, device=kernel_device) for h in (H, 1)]
        torch.library.opcheck(op, (tensors, cos, sin, positions, False, False))


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
