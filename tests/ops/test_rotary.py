"""Rotary embedding against complex multiplication in float64."""

import pytest
import torch

from fastlm.ops._triton import HAS_TRITON
from fastlm.ops.rotary import BLOCK_H, PAIRS, apply_rotary, apply_rotary_reference, choose_tile, lie_apart
from tests.support.accuracy import assert_accurate

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
def test_rotary_kernel_and_gradients_match_complex_rotation(interleaved, heads, R, D, dtype, layer_device):
    q, k = (torch.randn(B, 37, h, D).to(layer_device, dtype) for h in heads)
    assert_rotates(q, k, *(x.to(layer_device) for x in angles(R, 40)), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_kernel_finds_the_angles_of_packed_positions(interleaved, layer_device):
    q, k = torch.randn(29, 3, D, device=layer_device), torch.randn(29, 1, D, device=layer_device)
    positions = torch.cat([torch.arange(n) for n in (1, 17, 11)]).to(layer_device)
    assert_rotates(q, k, *(x.to(layer_device) for x in angles(D, 17)), interleaved, positions)


def test_rotary_kernel_reads_the_parts_of_one_tensor_where_they_lie(layer_device):
    qkv = torch.randn(B, T, 3 * H, D, device=layer_device)
    cos, sin = (x.to(layer_device) for x in angles())
    for views in (
        (qkv[:, :, :H], qkv[:, :, H : 2 * H]),
        (qkv.transpose(0, 1)[:, :, :H], qkv.transpose(0, 1)[:, :, H:]),
    ):
        cos, sin = (x.to(layer_device) for x in angles(positions=views[0].shape[1]))
        copies = apply_rotary(*(x.contiguous() for x in views), cos, sin)
        for one, other in zip(apply_rotary(*views, cos, sin), copies, strict=True):
            assert torch.equal(one, other)


def test_rotary_kernel_in_place_overwrites_its_part_alone(layer_device):
    qkv = torch.randn(B, T, 3 * H, D, device=layer_device)
    cos, sin = (x.to(layer_device) for x in angles(4))
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
def test_rotary_kernel_accepts_no_tokens_or_heads(shape, layer_device):
    x = torch.empty(shape, device=layer_device, requires_grad=True)
    y, _ = apply_rotary(x, None, *(a.to(layer_device) for a in angles()))
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_rotary_kernel_in_place_passes_over_what_lies_between(layer_device):
    """Rows of the batch, tokens and heads may lie apart; what is not contiguous within a head goes by way of a copy."""
    cos, sin = (x.to(layer_device) for x in angles())
    for view in (
        lambda x: x[:, ::2, ::3],
        lambda x: x.permute(2, 1, 0, 3),
        lambda x: x.transpose(1, 3)[:, :, :, :T].transpose(1, 3),
    ):
        base = torch.randn(B * 3, 2 * T, 3 * H, D, device=layer_device)[:, : 2 * T]
        x = view(base)[:, :T]
        expected, _ = apply_rotary(x.clone(), None, cos, sin)
        rest = base.sum() - x.sum()
        apply_rotary(x, None, cos, sin, inplace=True)
        assert torch.equal(x, expected)
        assert torch.allclose(base.sum() - x.sum(), rest, atol=1e-3)


def test_rotary_kernel_refuses_to_overwrite_an_expanded_tensor_as_torch_does(layer_device):
    x = torch.randn(B, T, 1, D, device=layer_device).expand(B, T, H, D)
    with pytest.raises(RuntimeError, match="single memory location"):
        apply_rotary(x, None, *(a.to(layer_device) for a in angles()), inplace=True)


def test_rotary_kernel_takes_tables_and_positions_in_any_layout(layer_device):
    cos, sin = (x.to(layer_device) for x in angles(positions=20))
    q = torch.randn(B, T, H, D, device=layer_device)
    positions = torch.randint(20, (T,), device=layer_device)
    expected, _ = apply_rotary(q, None, cos, sin, positions=positions.repeat(B, 1))
    for tables in (
        (cos.T.contiguous().T, sin),
        (torch.cat([cos, cos], 1)[:, : D // 2], torch.cat([sin, cos], 1)[:, : D // 2]),
    ):
        for tokens in (positions.expand(B, T), positions.int().repeat(B, 1)):
            assert torch.equal(apply_rotary(q, None, *tables, positions=tokens)[0], expected)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_rotary_kernel_keeps_the_dtype_of_each_tensor(dtypes, layer_device):
    q, k = (torch.randn(B, T, H, D, device=layer_device).to(dtype) for dtype in dtypes)
    cos, sin = (x.to(layer_device, torch.bfloat16) for x in angles())
    results = apply_rotary(q, k, cos, sin)
    alone = [apply_rotary(x, None, cos, sin)[0] for x in (q, k)]
    assert all(torch.equal(*pair) for pair in zip(results, alone, strict=True))
    assert [x.dtype for x in results] == list(dtypes)


def test_apply_rotary_in_float64_is_rotated_in_float64(layer_device):
    q, cos, sin = torch.randn(B, T, H, D).double(), *(x.double() for x in angles())
    ours, _ = apply_rotary(*(x.to(layer_device) if x is not None else x for x in (q, None, cos, sin)))
    assert (ours.cpu() - oracle(q, cos, sin, False)).abs().max() < 1e-14


@pytest.mark.gpu
def test_rotary_kernel_reaches_beyond_int32_offsets():
    x = torch.empty_strided((2, 3, 1, 8), (2**31 + 64, 8, 8, 1), dtype=torch.float16, device="cuda").normal_()
    cos, sin = (a.cuda() for a in angles(8))
    assert torch.equal(apply_rotary(x, None, cos, sin)[0], apply_rotary(x.contiguous(), None, cos, sin)[0])


def test_apply_rotary_takes_the_angles_of_given_positions():
    cos, sin = angles(positions=20)
    positions = torch.randint(20, (B, T))
    q = torch.randn(B, T, H, D)
    ours, k = apply_rotary(q, None, cos, sin, positions=positions)
    assert k is None
    packed, _ = apply_rotary(q.flatten(0, 1), None, cos[positions.flatten()], sin[positions.flatten()])
    assert torch.equal(ours, packed.view_as(q))
    assert_accurate(ours, ours, oracle(q.double(), cos.double()[positions], sin.double()[positions], False))


def test_apply_rotary_in_place_overwrites_and_still_has_gradients(layer_device):
    cos, sin = (x.to(layer_device) for x in angles())
    leaf = torch.randn(B, T, H, D, device=layer_device, requires_grad=True)
    expected, _ = apply_rotary(leaf, None, cos, sin)
    x = leaf * 1
    result, _ = apply_rotary(x, None, cos, sin, inplace=True)
    assert result.data_ptr() == x.data_ptr()
    assert torch.equal(result, expected)
    upstream = torch.randn(B, T, H, D, device=layer_device)
    assert torch.equal(*(torch.autograd.grad(y, leaf, upstream)[0] for y in (result, expected)))


PARTS = {  # q and k as parts of one tensor, with H heads
    "one tensor twice": lambda x: (x, x),
    "two views of all": lambda x: (x[:], x.view_as(x)),
    "heads shared by both": lambda x: (x[:, :, :2], x[:, :, 1:]),
    "tokens shared by both": lambda x: (x[:, :-1], x[:, 1:]),
    "every second head": lambda x: (x[:, :, ::2], x[:, :, 1::2]),
    "halves of each head": lambda x: (x[..., : D // 2], x[..., D // 2 :]),
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("used", ["results", "arguments", "whole"])
def test_apply_rotary_in_place_does_to_the_arguments_what_copying_the_results_there_does(used, parts, layer_device):
    whole, upstream = torch.randn(2, B, T, H, D, device=layer_device)

    def trained(rotate):
        leaf = whole.clone().requires_grad_()
        x = leaf * 1
        q, k = parts(x)
        cos, sin = (a.to(layer_device) for a in angles(4))
        results = rotate(q, k, cos, sin)
        outputs = {"results": results, "arguments": (q, k), "whole": (x,)}[used]
        gradients = [upstream.flatten()[: y.numel()].view(y.shape) for y in outputs]
        return *outputs, torch.autograd.grad(outputs, leaf, gradients)[0]

    def copied(q, k, cos, sin):
        return [x.copy_(y) for x, y in zip((q, k), apply_rotary(q, k, cos, sin), strict=True)]

    for ours, expected in zip(trained(lambda *call: apply_rotary(*call, inplace=True)), trained(copied), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "part",
    [lambda x: x, lambda x: x[:, :, :1], lambda x: (x * 1).unbind(1)[0]],
    ids=["leaf", "view of a leaf", "unbound"],
)
def test_apply_rotary_in_place_refuses_what_torch_refuses_and_writes_nothing(part, layer_device):
    leaf = torch.randn(B, T, H, D, device=layer_device, requires_grad=True)
    x, angles_of_x = part(leaf), [a.to(layer_device) for a in angles()]
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match=r"in-?place") as theirs:
        part(leaf).mul_(2)
    with pytest.raises(RuntimeError, match=str(theirs.value)[:20]):
        apply_rotary(x, None, *angles_of_x, inplace=True)
    assert torch.equal(x, before)
    with torch.no_grad():
        assert apply_rotary(x, None, *angles_of_x, inplace=True)[0] is x
        assert torch.equal(x, apply_rotary(before, None, *angles_of_x)[0])


def test_lie_apart_says_so_of_no_tensors_that_share_an_element():
    storage, found = torch.arange(400), 0
    for _ in range(2000):
        sizes, strides = (
            torch.randint(1, 5, (2, 3)).tolist(),
            torch.tensor([1, 2, 3, 6, 12, 24])[torch.randint(6, (2, 3))],
        )
        first, second = (
            storage.as_strided(size, stride.tolist(), int(torch.randint(40, ())))
            for size, stride in zip(sizes, strides, strict=True)
        )
        apart = not set(first.flatten().tolist()) & set(second.flatten().tolist())
        assert apart or not lie_apart(first, second)
        found += lie_apart(first, second)
    assert found > 100


@pytest.mark.parametrize("road", ["torch", pytest.param("kernels", marks=pytest.mark.interpreted)])
def test_apply_rotary_in_place_is_noticed_by_others_that_saved_the_tensor(road):
    x = torch.randn(B, T, H, D, requires_grad=True) * 1
    other = x.square()
    apply_rotary(x, None, *angles(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


def test_apply_rotary_gives_gradients_to_trained_angles():
    cos, sin = (x.requires_grad_() for x in angles())
    apply_rotary(torch.ones(B, T, H, D), None, cos, sin)[0].sum().backward()
    assert torch.equal(cos.grad, torch.full_like(cos, 2.0 * B * H))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("road", ["torch", pytest.param("kernels", marks=pytest.mark.interpreted)])
def test_apply_rotary_compiles_in_one_graph(road, dynamic, inplace):
    cos, sin = angles()
    x = torch.randn(B, T, 3 * H, D, requires_grad=True)

    def call(x):
        x = x * 1
        q, k = apply_rotary(x[:, :, :H], x[:, :, H : H + 1], cos, sin, inplace=inplace)
        return torch.cat([q, k, x], dim=2)

    torch.compiler.reset()
    ours, eager = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x), call(x)
    assert torch.equal(ours, eager)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, eager)))


def test_apply_rotary_is_exported_with_a_dynamic_number_of_tokens():
    class Rotary(torch.nn.Module):
        def forward(self, q, cos, sin):
            return apply_rotary(q, None, cos, sin)[0]

    tokens = torch.export.Dim("tokens", min=2, max=99)
    dims = {"q": {1: tokens}, "cos": {0: tokens}, "sin": {0: tokens}}
    program = torch.export.export(Rotary(), (torch.randn(B, T, H, D), *angles()), dynamic_shapes=dims)
    longer = torch.randn(B, 50, H, D), *angles(positions=50)
    assert torch.equal(program.module()(*longer), Rotary()(*longer))


@pytest.mark.parametrize("positions", [None, torch.zeros(B, T, dtype=torch.int64)], ids=["counted", "given"])
def test_rotary_op_in_place_passes_opcheck(positions, layer_device):
    cos, sin = (x.to(layer_device) for x in angles(4))
    positions = None if positions is None else positions.to(layer_device)
    tensors = [torch.randn(B, T, h, D, device=layer_device) for h in (H, 1)]
    torch.library.opcheck(torch.ops.fastlm.rotary_.default, (tensors, cos, sin, positions, False, False))


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


@pytest.mark.parametrize("position", [-1, T])
@pytest.mark.parametrize("trained", [False, True])
def test_apply_rotary_refuses_a_position_without_angles(position, trained):
    cos, sin = angles()
    positions = torch.full((B, T), position)
    with pytest.raises(IndexError):
        apply_rotary(torch.zeros(B, T, H, D), None, cos.requires_grad_(trained), sin, positions=positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_apply_rotary_refuses_positions_that_are_no_integers(dtype, layer_device):
    q, positions = torch.zeros(B, T, H, D, device=layer_device), torch.ones(B, T, device=layer_device, dtype=dtype)
    with pytest.raises(TypeError, match=f"apply_rotary: positions is {dtype}, expected integers"):
        apply_rotary(q, None, *(table.to(layer_device) for table in angles()), positions=positions)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_apply_rotary_takes_positions_of_every_integer_dtype(dtype):
    q, positions = torch.randn(B, T, H, D), torch.randint(T, (B, T))
    for x in (q, q.double()):
        narrow, wide = (
            apply_rotary(x, None, *angles(), positions=given)[0] for given in (positions.to(dtype), positions)
        )
        assert torch.equal(narrow, wide)


@pytest.mark.parametrize("op", ["rotary", "rotary_"])
def test_rotary_ops_run_on_any_device(op):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastlm::{op}", "MPS")


@pytest.mark.parametrize("shape", [(B, T + 1, H, D), (B, T, H, D + 2), (T, H, D)])
def test_apply_rotary_refuses_a_k_that_does_not_go_with_q(shape):
    with pytest.raises(ValueError, match=r"apply_rotary: k has shape .*, expected that of q but for the heads"):
        apply_rotary(torch.zeros(B, T, H, D), torch.zeros(shape), *angles())


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_rotary_tiles_hold_every_pair_of_a_head():
    for R in range(2, 513, 2):
        tile = choose_tile(R)
        assert tile.block_r >= R // 2
        assert tile.block_t >= 1
        assert PAIRS <= tile.block_t * tile.block_h * tile.block_r <= max(PAIRS, BLOCK_H * tile.block_r)
