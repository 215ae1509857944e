"""Attention against a row-by-row float64 oracle, and packed documents against the same documents run alone."""

import contextlib
import functools
import importlib
import itertools
import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlm.ops import _dispatch, _library
from fastlm.ops._dropout import philox
from fastlm.ops.attention import attention
from tests.support.accuracy import assert_accurate

module = importlib.import_module("fastlm.ops.attention")  # the name in fastlm.ops is the function
on_cpu = importlib.import_module("fastlm.ops.attention_cpu")
launch = importlib.import_module("fastlm.ops.attention_launch")

H, D = 4, 8
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"causal": True, "scale": 0.3},
    "window behind": {"causal": True, "window": (2, None)},
    "window both sides": {"window": (3, 1)},
    "softcap": {"softcap": 1.5},
    "alibi": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 2.0])},
    "sinks": {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    "all": {
        "causal": True,
        "window": (4, 0),
        "softcap": 2.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 2.0]),
        "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0]),
    },
}
SHAPES = [
    (2, 7, 7, 4),
    (1, 1, 9, 2),
    (2, 5, 11, 1),
    (1, 9, 5, 4),
    (2, 0, 3, 4),
    (1, 3, 0, 2),
    (3, 1, 1, 4),
]  # B Tq Tk Hk
PACKED = [0, 5, 5, 6, 13, 20, 20, 20]  # an empty document, one of one token, two of equal length, padding at the end


def naive(q, k, v, causal=False, scale=None, window=(None, None), softcap=None, alibi_slopes=None, sinks=None):
    """(out, lse) of one sequence (T, H, D), query by query, in the dtype of q."""
    Tq, Tk, group = len(q), len(k), q.shape[1] // max(k.shape[1], 1)
    left, right = window
    outs, lses = [], []
    for h in range(q.shape[1]):
        for i in range(Tq):
            here = i + Tk - Tq
            seen = [
                j
                for j in range(Tk)
                if (not causal or j <= here)
                and (left is None or j >= here - left)
                and (right is None or j <= here + right)
            ]
            s = k[seen, h // group] @ q[i, h] * (q.shape[-1] ** -0.5 if scale is None else scale)
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            if alibi_slopes is not None:
                s = s - alibi_slopes[h].to(q.dtype) * torch.tensor([abs(here - j) for j in seen], dtype=q.dtype)
            terms = s if sinks is None else torch.cat([s, sinks[h].to(q.dtype)[None]])
            if len(terms) == 0:
                outs.append(0 * q[i, h])
                lses.append(torch.tensor(-math.inf, dtype=q.dtype))
                continue
            lse = torch.logsumexp(terms, 0)
            outs.append(torch.exp(s - lse) @ v[seen, h // group])
            lses.append(lse)
    if not outs:
        return q * 1, q.new_zeros(q.shape[1], Tq)
    out = torch.stack(outs).view(q.shape[1], Tq, -1).transpose(0, 1)
    return out, torch.stack(lses).view(q.shape[1], Tq)


def naive_batch(q, k, v, **options):
    results = [naive(*row, **options) for row in zip(q, k, v, strict=True)]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def naive_packed(q, k, v, bounds, **options):
    results = [naive(q[a:b], k[a:b], v[a:b], **options) for a, b in itertools.pairwise(bounds)]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses, dim=1)


def on_device(options, device):
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


def evaluated(function, tensors, dtype, seed=0, **options):
    """(out, lse, gradients of the tensors and of the sinks) with random upstream gradients on out and lse."""
    inputs = [x.to(dtype).requires_grad_() for x in tensors]
    options = on_device(options, tensors[0].device)
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(dtype).requires_grad_()
        inputs.append(options["sinks"])
    out, lse = function(*inputs[:3], **options)
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    dout, dlse = (torch.randn(result.shape, generator=generator) for result in (out, lse))
    total = (out * dout.to(out.dtype)).sum() + (lse.where(lse.isfinite(), 0.0) * dlse.to(lse.dtype)).sum()
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs, strict=True)]
    names = ["out", "lse", "dq", "dk", "dv", "dsinks"]
    return dict(zip(names, [out.detach(), lse.detach(), *filled], strict=False))


def dense_inputs(B, Tq, Tk, Hk, dtype=torch.float32):
    return [torch.randn(B, T, heads, D, dtype=dtype) for T, heads in ((Tq, H), (Tk, Hk), (Tk, Hk))]


def packed_inputs(Hk=H, total=PACKED[-1]):
    return [torch.randn(total, heads, D) for heads in (H, Hk, Hk)]


def boundaries(bounds=PACKED) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


@pytest.fixture(
    params=[
        pytest.param("cpu", id="torch"),
        pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def road(request):
    """A test that asks for it makes its tensors where attention runs PyTorch's code, or the kernels."""
    torch.compiler.reset()  # what another road compiled from the same lines would be taken again
    with torch.device(request.param):
        yield


on_every_road = pytest.mark.usefixtures("road")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_and_gradients_match_oracle(name, shape):
    def ours(*tensors, **options):
        return attention(*tensors, return_lse=True, **options)

    # Over many draws: of a few numbers PyTorch's largest error may be small by luck.
    draws = []
    for seed in range(1, 13):
        tensors = dense_inputs(*shape)
        roads = ((ours, torch.float32), (naive_batch, torch.float32), (naive_batch, torch.float64))
        draws.append([evaluated(function, tensors, dtype, seed, **OPTIONS[name]) for function, dtype in roads])
    for key in draws[0][0]:
        assert_accurate(*(torch.cat([draw[road][key].flatten() for draw in draws]) for road in range(3)), key)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_lse_matches_oracle(causal, shape):
    tensors = dense_inputs(*shape)

    def out_alone(function):
        return lambda *x: (function(*x), x[0].new_zeros(1))

    oracle = out_alone(lambda *x: naive_batch(*x, causal=causal)[0])
    peer = (
        oracle if (causal and shape[1] > shape[2]) or not shape[2] else out_alone(lambda *x: sdpa_aligned(*x, causal))
    )
    ours = evaluated(out_alone(lambda *x: attention(*x, causal=causal)), tensors, torch.float32)
    theirs, truth = evaluated(peer, tensors, torch.float32), evaluated(oracle, tensors, torch.float64)
    for key in truth:
        assert_accurate(ours[key], theirs[key], truth[key], key)


def sdpa_aligned(q, k, v, causal):
    """PyTorch's attention of (B, T, H, D); its own causal flag is aligned at the start, so the mask is given."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    mask = mask.tril(k.shape[1] - q.shape[1]) if causal else mask
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


@pytest.mark.parametrize("Hk", [4, 2, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_attention_equals_documents_run_alone(name, Hk):
    tensors, bounds = packed_inputs(Hk), boundaries()

    def ours_packed(*inputs, **options):
        return attention(*inputs, cu_seqlens_q=bounds, return_lse=True, **options)

    ours = evaluated(ours_packed, tensors, torch.float32, **OPTIONS[name])
    theirs = evaluated(lambda *x, **o: naive_packed(*x, PACKED, **o), tensors, torch.float32, **OPTIONS[name])
    truth = evaluated(lambda *x, **o: naive_packed(*x, PACKED, **o), tensors, torch.float64, **OPTIONS[name])
    for key in truth:
        assert_accurate(ours[key], theirs[key], truth[key], key)


def block_diagonal(bounds, causal=True) -> Tensor:
    document = torch.bucketize(torch.arange(bounds[-1]), torch.tensor(bounds[1:]), right=True)
    same = document[:, None] == document
    return same.tril() if causal else same


def sdpa_packed(q, k, v, bounds, causal=True):
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        *heads, attn_mask=block_diagonal(bounds, causal), enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1), q.new_zeros(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("Hk", [4, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_is_as_accurate_as_sdpa_with_a_mask(causal, Hk, dtype):
    bounds = [0, 67, 68, 68, 200]
    tensors = [x.to(dtype) for x in packed_inputs(Hk, bounds[-1])]

    def ours_packed(*inputs):
        return attention(*inputs, causal=causal, cu_seqlens_q=boundaries(bounds)), inputs[0].new_zeros(1)

    ours = evaluated(ours_packed, tensors, dtype)
    theirs = evaluated(lambda *x: sdpa_packed(*x, bounds, causal), tensors, dtype)
    truth = evaluated(lambda *x: sdpa_packed(*x, bounds, causal), tensors, torch.float64)
    for key in ("out", "dq", "dk", "dv"):
        assert_accurate(ours[key], theirs[key], truth[key], key)


@on_every_road
def test_packed_attention_takes_strided_views_of_one_product():
    qkv = torch.randn(PACKED[-1], 3 * H, D, requires_grad=True)
    views, copies = qkv.split(H, dim=1), [x.contiguous() for x in qkv.split(H, dim=1)]
    results = [attention(*x, causal=True, cu_seqlens_q=boundaries()) for x in (views, copies)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), qkv)[0] for out in results))


def test_packed_causal_attention_never_builds_a_score_matrix(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the reference builds every score")

    for name in ("attention_reference", "attention_backward_reference"):
        monkeypatch.setattr(on_cpu, name, refuse)
    monkeypatch.setattr(_library, "LIBRARIES", {})  # the compiled code has tests of its own
    q, k, v = (x.requires_grad_() for x in packed_inputs(2))
    attention(q, k, v, causal=True, cu_seqlens_q=boundaries()).sum().backward()
    assert q.grad is not None
    with pytest.raises(AssertionError, match="every score"):
        attention(q, k, v, causal=True, softcap=1.0, cu_seqlens_q=boundaries())


@on_every_road
def test_packed_attention_of_one_document_leaves_others_bit_identical():
    q, k, v = packed_inputs()
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[6:13] = torch.randn(7, H, D)
    others = torch.ones(PACKED[-1], dtype=torch.bool)
    others[6:13] = False

    def same(**documents):
        before, after = (attention(*x, causal=True, **documents) for x in ((q, k, v), changed))
        return torch.equal(before.squeeze(0)[others], after.squeeze(0)[others])

    assert same(cu_seqlens_q=boundaries())
    q, k, v = (x[None] for x in (q, k, v))
    changed = [x[None] for x in changed]
    assert not same(), "a plain causal mask must leak into later documents"


@on_every_road
def test_packed_attention_gives_zero_behind_the_last_document():
    q, k, v = packed_inputs()
    out, lse = attention(q, k, v, causal=True, cu_seqlens_q=boundaries([0, 5, 13]), return_lse=True)
    assert bool((out[13:] == 0).all())
    assert bool((lse[:, 13:] == -math.inf).all())


@on_every_road
def test_packed_attention_with_different_keys_per_document():
    q, k, v = torch.randn(6, H, D), torch.randn(10, H, D), torch.randn(10, H, D)
    cu_q, cu_k = boundaries([0, 2, 3, 6]), boundaries([0, 4, 4, 10])
    out = attention(q, k, v, causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    pairs = [((0, 2), (0, 4)), ((2, 3), (4, 4)), ((3, 6), (4, 10))]

    def alone(dtype):
        parts = [naive(*(x.to(dtype) for x in (q[a:b], k[c:d], v[c:d])), causal=True)[0] for (a, b), (c, d) in pairs]
        return torch.cat(parts)

    assert_accurate(out, alone(torch.float32), alone(torch.float64))


@on_every_road
def test_packed_self_attention_of_one_tensor_compiles():
    x = torch.randn(PACKED[-1], H, D)
    bounds = boundaries()
    compiled = torch.compile(lambda x: attention(x, x, x, cu_seqlens_q=bounds), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), attention(x, x, x, cu_seqlens_q=bounds))


@pytest.mark.parametrize("Tk", [7, 9])
@pytest.mark.parametrize("name", ["plain", "causal", "all"])
def test_attention_compiles_in_one_graph_for_open_sizes(name, Tk):
    def call(q, k, v):
        return attention(q, k, v, **OPTIONS[name])

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = dense_inputs(2, 7, Tk, 2)
    assert torch.equal(compiled(*tensors), call(*tensors))


@on_every_road
@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("scale", (0.1, 0.2, 0.3)),
        ("softcap", (1.0, 2.0, 3.0)),
        ("dropout_p", (0.1, 0.2, 0.3)),
        ("window", ((1, 2), (2, 3), (3, 4))),
        ("max_seqlen_q", (7, 8, 9)),
    ],
)
def test_attention_compiles_in_one_graph_for_changing_options(option, values):
    def call(value):
        return attention(*tensors, cu_seqlens_q=bounds, seed=3, **{option: value})

    tensors, bounds = packed_inputs(), boundaries()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for value in values:
        assert torch.equal(compiled(value), call(value))


def heads_of(*shape):
    return [torch.randn(*shape, D, requires_grad=True) for _ in "qkv"]


LATE = {  # calls one after the other, whose sizes a compiler leaves open from the second on
    "slopes of heads": [(heads, {"alibi_slopes": x}) for heads, x in ((4, None), (6, None), (4, torch.rand(4)))],
    "slopes of rows": [(heads, {"alibi_slopes": x}) for heads, x in ((4, None), (6, None), (4, torch.rand(2, 4)))],
}


@pytest.mark.parametrize("option", LATE)
def test_compiled_attention_takes_an_option_that_comes_after_a_size_was_left_open(option):
    def gradients(function, tensors, options):
        return torch.autograd.grad(function(*tensors, **options).square().sum(), tensors)

    torch.compiler.reset()
    compiled = torch.compile(functools.partial(attention, causal=True), fullgraph=True, backend="aot_eager")
    for heads, options in LATE[option]:
        tensors = heads_of(2, 9, heads)
        expected = gradients(functools.partial(attention, causal=True), tensors, options)
        assert all(map(torch.equal, gradients(compiled, tensors, options), expected))


def test_compiled_attention_of_slopes_left_open_says_what_is_wrong_with_them():
    compiled = torch.compile(attention, dynamic=True, backend="eager")
    for wrong in ((5,), (3, 4), (2, 1, 4)):
        with pytest.raises(Exception, match=r"alibi_slopes has shape .*, expected \(4,\) or \(2, 4\)"):
            compiled(*heads_of(2, 9, 4), alibi_slopes=torch.ones(wrong))


PACKINGS = {  # lengths of documents, options
    "documents": [(lengths, {}) for lengths in ((4, 5), (3, 3, 3), (7,), (1, 2, 3, 4), (8, 1, 1))],
    "longest": [(x, {"max_seqlen_q": max(x)}) for x in ((4, 5), (3, 3, 3), (7,), (1, 2, 3, 4), (8, 1, 1))],
    "upper bounds": [((4, 5), {"max_seqlen_q": longest}) for longest in (5, 6, 7, 8, 9)],
    "windows": [((4, 5), {"window": (left, 0)}) for left in (1, 2, 3, 4, 5)],
}


@pytest.mark.parametrize("kind", PACKINGS)
def test_compiled_attention_takes_no_new_graph_for_another_packing(kind):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(q, k, v, bounds, options):
        return attention(q, k, v, causal=True, cu_seqlens_q=bounds, **options)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend=count)
    for lengths, options in PACKINGS[kind]:
        tensors, bounds = heads_of(sum(lengths), 4), boundaries([0, *itertools.accumulate(lengths)])
        assert torch.equal(compiled(*tensors, bounds, options), call(*tensors, bounds, options))
    assert len(graphs) <= 3, "one of the first sizes, one of other documents, one of other totals"


@pytest.mark.parametrize("packed", [False, True])
def test_attention_exports_with_any_number_of_tokens(packed):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, bounds=None):
            return attention(q, k, v, causal=True, cu_seqlens_q=bounds)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    if packed:
        documents = torch.export.Dim("documents", min=2, max=100)
        sizes = [{0: tokens}] * 3 + [{0: documents}]
        examples = [
            (*packed_inputs(total=total), boundaries(bounds)) for total, bounds in ((9, [0, 4, 9]), (20, PACKED))
        ]
    else:
        sizes = [{1: tokens}] * 3
        examples = [tuple(dense_inputs(2, T, T, H)) for T in (5, 11)]
    layer = Layer()
    exported = torch.export.export(layer, examples[0], dynamic_shapes=sizes).module()
    assert torch.equal(exported(*examples[1]), layer(*examples[1]))


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_attention_of_tensors_without_data_has_their_shapes(kind):
    mode = FakeTensorMode()

    def emptied(x):
        return x.to("meta") if kind == "meta" else mode.from_tensor(x)

    q, k, v = (emptied(x) for x in packed_inputs())
    with mode if kind == "fake" else contextlib.nullcontext():
        out = attention(q, k, v, cu_seqlens_q=emptied(boundaries()), max_seqlen_q=9)
        dense, lse = attention(q[None], k[None], v[None], softcap=1.0, return_lse=True)
    assert (out.shape, dense.shape, lse.shape) == (q.shape, q[None].shape, (1, H, len(q)))


@pytest.mark.parametrize("packed", [False, True])
def test_attention_makes_its_tensors_where_q_is_whatever_the_default_device(packed):
    q, k, v = packed_inputs() if packed else dense_inputs(2, 7, 7, H)
    bounds = {"cu_seqlens_q": boundaries()} if packed else {}
    slopes = torch.rand(H, requires_grad=True)

    def results():
        out = attention(q, k, v, causal=True, alibi_slopes=slopes, dropout_p=0.2, seed=1, **bounds)
        return out, *torch.autograd.grad(out, slopes, out)

    expected = results()
    with torch.device("meta"):
        assert all(torch.equal(*pair) for pair in zip(results(), expected, strict=True))


def test_packed_attention_serves_torch_func():
    q, k, v = packed_inputs()
    bounds = boundaries()

    def call(q):
        return attention(q, k, v, causal=True, cu_seqlens_q=bounds)

    batch = torch.stack([q, q + 1])
    expected = torch.stack([call(x) for x in batch])
    torch.testing.assert_close(torch.func.vmap(call)(batch), expected)
    q.requires_grad_()
    gradient = torch.autograd.grad(call(q).square().sum(), q)[0]
    torch.testing.assert_close(torch.func.grad(lambda q: call(q).square().sum())(q), gradient)
    _, tangent = torch.func.jvp(call, (q,), (q,))
    torch.testing.assert_close(tangent, torch.func.jacrev(call)(q).flatten(3) @ q.flatten())


@on_every_road
@pytest.mark.parametrize("side", [2**31 - 1, 2**62, 10**30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_of_a_window_wider_than_all_keys_is_that_of_none(dtype, side):
    inputs = [x.to(dtype).requires_grad_() for x in dense_inputs(1, 5, 7, 1)]

    def results(**options):
        out, lse = attention(*inputs, return_lse=True, **options)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)

    for window in ((side, side), (side, 0)):
        none = tuple(None if given == side else given for given in window)
        for one, other in zip(results(window=window), results(window=none), strict=True):
            torch.testing.assert_close(one, other)


@on_every_road
@pytest.mark.parametrize("softcap", [1e-300, 1e-50, 1e50, 1e300])
def test_attention_takes_a_softcap_that_float32_does_not_hold(softcap):
    q, k, v = dense_inputs(1, 5, 9, H)
    expected = attention(q, k, v, scale=0.5 if softcap > 1 else 2.0**-30)
    torch.testing.assert_close(attention(q, k, v, scale=0.5, softcap=softcap), expected)


@on_every_road
@pytest.mark.parametrize("packed", [False, True])
def test_attention_of_nothing_but_minus_infinity_is_that_of_no_key(packed):
    q, k, v = packed_inputs()
    k = k.abs()
    q[2] = -math.inf
    bounds = {"cu_seqlens_q": boundaries()} if packed else {}
    inputs = [x.requires_grad_() for x in ((q, k, v) if packed else (x[None] for x in (q, k, v)))]
    sinks = torch.full((H,), -math.inf).requires_grad_()
    for options in ({}, {"sinks": sinks}, {"causal": True, "softcap": None, "window": (3, 0)}):
        out, lse = attention(*inputs, return_lse=True, **bounds, **options)
        row = out[..., 2, :, :]
        assert bool((row == 0).all())
        assert bool((lse[..., 2] == -math.inf).all())
        wanted = [inputs[2], *([sinks] if "sinks" in options else [])]
        dlse = torch.zeros_like(lse)
        dlse[..., 2] = math.nan  # what comes back for such a row must go no further
        for gradient in torch.autograd.grad((out, lse), wanted, (torch.ones_like(out), dlse)):
            assert bool(gradient.isfinite().all())


@on_every_road
@pytest.mark.parametrize("packed", [False, True])
def test_attention_of_sinks_and_no_keys_gives_the_sinks_their_gradient(packed):
    q, none = torch.randn(5, H, D), torch.zeros(2, dtype=torch.int32)
    bounds = {"cu_seqlens_q": boundaries([0, 5]), "cu_seqlens_k": none} if packed else {}
    sinks = torch.randn(H, requires_grad=True)
    inputs = (q, q[:0], q[:0]) if packed else (q[None], q[None, :0], q[None, :0])
    out, lse = attention(*inputs, sinks=sinks, return_lse=True, **bounds)
    assert bool((out == 0).all())
    assert torch.equal(lse.view(H, 5), sinks.detach()[:, None].expand(H, 5))
    dlse = torch.randn(lse.shape)
    torch.testing.assert_close(torch.autograd.grad(lse, sinks, dlse)[0], dlse.view(H, 5).sum(1))


@pytest.mark.parametrize("name", ["causal", "alibi", "sinks"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_gradients_of_large_scores_match_oracle(packed, name):
    """Where the rounding of lse is far larger than that of a probability. The scores themselves are exact."""
    q, k, v = (x[:13] for x in packed_inputs())
    q, k = q.sign(), k.sign()
    q[..., 0], k[..., 0] = 1.0, 4096.0
    tensors, bounds = [q, k, v], [0, 13]

    def ours(q, k, v, **options):
        if packed:
            return attention(q, k, v, cu_seqlens_q=boundaries(bounds), return_lse=True, **options)
        out, lse = attention(q[None], k[None], v[None], return_lse=True, **options)
        return out[0], lse[0]

    options = OPTIONS[name] | {"scale": 1.0}
    roads = (ours, torch.float32), (naive_softmax, torch.float32), (naive_softmax, torch.float64)
    results = [evaluated(function, tensors, dtype, **options) for function, dtype in roads]
    for key in ("dq", "dk", "dv"):
        assert_accurate(*(result[key] for result in results), key)


def naive_softmax(q, k, v, causal=False, scale=1.0, alibi_slopes=None, sinks=None):
    """One square sequence by torch.softmax, whose backward has the probabilities themselves."""
    T = len(q)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(q.dtype)[:, None, None] * distance.abs()
    s = s.masked_fill((distance < 0) & causal, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(H, T, 1)], -1)
    return torch.einsum("hij,jhd->ihd", s.softmax(-1)[..., :T], v), s.logsumexp(-1)


@on_every_road
def test_attention_under_autocast_computes_in_the_autocast_dtype():
    q, k, v = packed_inputs()
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        mixed = attention(q, k, v.bfloat16(), causal=True, cu_seqlens_q=boundaries())
    low = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True, cu_seqlens_q=boundaries())
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, low)


@pytest.mark.parametrize("odd", ["q", "k"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_attention_under_autocast_rejects_what_it_would_not_cast(dtype, odd):
    tensors = dict(zip("qkv", dense_inputs(1, 5, 5, H), strict=True))
    tensors[odd] = tensors[odd].to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="expected float32, float16"):
        attention(*tensors.values())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_lse_of_long_rows_in_low_precision_is_as_exact_as_float32(dtype, packed):
    q, k, v = (torch.randn(530, 1, 64).to(dtype) for _ in range(3))

    def lse(dtype):
        scores = (q[:, 0].to(dtype) @ k[:, 0].to(dtype).T / 8).masked_fill(torch.ones(530, 530).triu(1) > 0, -math.inf)
        return scores.logsumexp(-1)

    inputs = (q, k, v) if packed else (q[None], k[None], v[None])
    bounds = {"cu_seqlens_q": boundaries([0, 530])} if packed else {}
    _, ours = attention(*inputs, causal=True, return_lse=True, **bounds)
    assert_accurate(ours.view(530), lse(torch.float32), lse(torch.float64))


# Dropout


def test_philox_gives_the_published_numbers():
    # Known answers of Random123 (kat_vectors, philox4x32 7 rounds): counters and keys all 0 and all 1.
    for words, bits in (
        ((0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48), 0),
        ((0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662), 0xFFFFFFFF),
    ):
        counter, seed = torch.tensor(bits), torch.tensor(0 if bits == 0 else -1)
        assert torch.equal(philox(seed, counter, counter, counter, counter), torch.tensor(words))


@on_every_road
def test_attention_dropout_is_repeated_by_its_seed():
    q, k, v = dense_inputs(2, 9, 9, 4)
    first, again, other = (attention(q, k, v, dropout_p=0.5, seed=seed) for seed in (7, torch.tensor(7), 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@on_every_road
@pytest.mark.parametrize("bounds", [None, [0, 3, 9]])
def test_attention_dropout_of_1_gives_zeros_and_their_gradients(bounds):
    tensors = packed_inputs(total=9) if bounds else dense_inputs(2, 9, 9, 4)
    inputs = [x.requires_grad_() for x in tensors]
    options = {"dropout_p": 1.0, "cu_seqlens_q": bounds and boundaries(bounds)}
    out, lse = attention(*inputs, return_lse=True, **options)
    zeros = [attention(*inputs, **options), out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]
    assert all(bool((x == 0).all()) for x in zeros)
    assert torch.equal(lse, attention(*inputs, return_lse=True, cu_seqlens_q=options["cu_seqlens_q"])[1])


@on_every_road
def test_attention_dropout_seed_is_drawn_from_torch_generator():
    q, k, v = packed_inputs()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(attention(q, k, v, dropout_p=0.5, cu_seqlens_q=boundaries()))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@on_every_road
def test_packed_dropout_equals_that_of_the_same_batch():
    q, k, v = dense_inputs(3, 6, 6, 4)
    dense = attention(q, k, v, causal=True, dropout_p=0.3, seed=5)
    packed = attention(
        *(x.flatten(0, 1) for x in (q, k, v)),
        causal=True,
        dropout_p=0.3,
        seed=5,
        cu_seqlens_q=boundaries([0, 6, 12, 18]),
    )
    assert torch.equal(packed, dense.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_dropout_factor_is_exact_in_the_dtype_of_the_scores(dtype):
    zeros, p = torch.zeros(1, 64, 1, 64, dtype=dtype), 0.3
    out = attention(zeros, zeros, torch.eye(64, dtype=dtype).view(1, 64, 1, 64), dropout_p=p, seed=0)
    assert torch.equal(out[out != 0].unique(), torch.tensor([1 / 64 / (1 - p)], dtype=dtype))


@on_every_road
def test_attention_dropout_keeps_the_stated_share_and_scales_it():
    zeros = torch.zeros(1, 64, 1, 64)
    out = attention(zeros, zeros, torch.eye(64).view(1, 64, 1, 64), dropout_p=0.25, seed=0).view(64, 64)
    kept = out != 0
    assert torch.equal(out[kept], torch.full_like(out[kept], 1 / 64 / 0.75))
    spread = math.sqrt(0.25 * 0.75 / kept.numel())  # of the mean of as many independent draws
    assert abs(kept.double().mean().item() - 0.75) < 4 * spread


# What serves a call


def test_documented_table_of_calls_is_what_serves_them(monkeypatch):
    def calls(D=8, Hk=H, dtype=torch.float32, **options):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 4, heads, D, dtype=dtype) for heads in (H, Hk, Hk))
        return attention(q, k, v, **options)

    def packed(**bounds):
        return attention(*packed_inputs(), cu_seqlens_q=boundaries(), **bounds)

    every_option = OPTIONS["all"] | {"dropout_p": 0.1, "return_lse": True}
    documented = {
        "float32, float16, bfloat16": lambda: [calls(dtype=x) for x in (torch.float32, torch.half, torch.bfloat16)],
        "D from 1 to 256, a power of two or not": lambda: [calls(D=D) for D in (1, 80, 256)],
        "grouped key heads, window, softcap, ALiBi, sinks, dropout, lse": lambda: [calls(Hk=2, **every_option)],
        "varlen, with cu_seqlens_k or without": lambda: [packed(), packed(cu_seqlens_k=boundaries())],
        "float64": lambda: [calls(dtype=torch.float64)],
        "D above 256": lambda: [calls(D=257)],
        "a scale of 0 or below without softcap": lambda: [calls(scale=scale) for scale in (0.0, -1.0)],
        "torch.func transforms": lambda: [torch.func.vmap(lambda x: attention(x, x, x))(torch.randn(2, 1, 4, H, D))],
    }
    launches = []
    monkeypatch.setattr(_dispatch, "use_triton", lambda tensor: True)
    monkeypatch.setattr(
        launch,
        "forward",
        lambda inputs, *_: launches.append(inputs) or (*launch.forward_outputs(inputs.q), inputs.q.new_empty((0,))),
    )
    table = []
    for call, run in documented.items():
        launches.clear()
        results = run()
        assert len(launches) in (0, len(results)), call
        table.append(f"| {call} | {'Triton' if launches else 'PyTorch'} |")
    page = (Path(__file__).resolve().parents[2] / "docs" / "attention.md").read_text()
    section = page.split("## Which implementation runs a call")[1].split("##")[0]
    assert [line for line in section.splitlines() if line.startswith("|")][2:] == table


# The flash_attn package


@pytest.mark.parametrize("packed", [False, True])
def test_attention_hands_flash_attn_its_own_arguments(packed, monkeypatch):
    """By a stand-in of that package's two functions that answers with PyTorch's code."""
    calls = []

    def answer(q, k, v, *bounds, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes):
        calls.append((dropout_p, bounds[2:]))
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        options = {"causal": causal, "scale": softmax_scale, "window": window_size, "softcap": softcap}
        given = dict(zip(names, bounds, strict=False)) | options | {"alibi_slopes": alibi_slopes, "backend": "torch"}
        return attention(q, k, v, **given)

    package = types.SimpleNamespace(flash_attn_func=answer, flash_attn_varlen_func=answer)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(_dispatch, "flash_attn_refusal", lambda *_: None)
    options = {"causal": True, "window": (4, None), "softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 1.0, 2.0, 3.0])}
    if packed:
        options |= {"cu_seqlens_q": boundaries(), "max_seqlen_q": 9}
    tensors = packed_inputs() if packed else dense_inputs(2, 5, 9, 4)
    ours = attention(*tensors, backend="flash_attn", **options)
    assert torch.equal(ours, attention(*tensors, backend="torch", **options))
    assert calls == [(0.0, (9, PACKED[-1]) if packed else ())]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "q is torch.float32 on cpu, flash_attn takes float16 and bfloat16 on a GPU"),
        ({"missing": True}, "the flash_attn package is not installed"),
    ],
)
def test_attention_says_why_flash_attn_does_not_serve(change, reason, monkeypatch):
    monkeypatch.setattr(_dispatch, "HAS_FLASH_ATTN", not change.get("missing", False))
    with pytest.raises(ValueError, match=re.escape(f"flash_attn: {reason}")):
        attention(*dense_inputs(1, 3, 3, 4), backend="flash_attn")


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(1, 5, 3, D), "v": torch.zeros(1, 5, 3, D)}, ValueError, "3 key heads do not divide 4"),
        ({"v": torch.zeros(1, 4, H, D)}, ValueError, "disagree"),
        ({"q": torch.zeros(5, H, D)}, ValueError, "q has shape"),
        (
            dict.fromkeys("qkv", torch.zeros(1, 5, H, D).to(torch.float8_e4m3fn)),
            TypeError,
            "expected float32, float16",
        ),
        ({"sinks": torch.zeros(H, dtype=torch.complex64)}, TypeError, "sinks is torch.complex64, expected a floating"),
        (
            {"alibi_slopes": torch.ones(H, dtype=torch.int64)},
            TypeError,
            "alibi_slopes is torch.int64, expected a float",
        ),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5, expected a probability between 0 and 1"),
        ({"window": (-2, 3)}, ValueError, r"window is \(-2, 3\), expected \(left, right\)"),
        ({"window": 8}, ValueError, r"window is 8, expected \(left, right\)"),
        ({"window": (1.5, 0)}, ValueError, r"window is \(1.5, 0\), expected \(left, right\)"),
        (
            {"alibi_slopes": torch.zeros(3, H)},
            ValueError,
            r"has shape \(3, 4\), expected \(4,\) or \(1, 4\)",
        ),
        ({"seed": 1.5, "dropout_p": 0.1}, TypeError, "seed is a float, expected an int"),
        ({"seed": torch.arange(2), "dropout_p": 0.1}, ValueError, r"seed has shape \(2,\), expected one element"),
        (
            {"seed": torch.ones(()), "dropout_p": 0.1},
            TypeError,
            "seed is a tensor of torch.float32, expected torch.int64",
        ),
        ({"seed": torch.ones((), device="meta").long()}, ValueError, "seed is on meta, expected cpu, where q is"),
        (
            {"q": torch.zeros(5, H, D), "k": torch.zeros(5, H, D)},
            ValueError,
            "together with cu_seqlens_q",
        ),
        ({"window": (3,)}, ValueError, r"window is \(3,\), expected \(left, right\)"),
        ({"k": [[1.0]]}, TypeError, "k is of type list, expected a tensor"),
        ({"v": None}, TypeError, "v is of type NoneType, expected a tensor"),
        ({"cu_seqlens_q": [0, 5]}, TypeError, r"cu_seqlens_q is of type list, expected a tensor: torch.tensor\("),
        ({"cu_seqlens_k": torch.zeros(2, dtype=torch.int32)}, ValueError, "without cu_seqlens_q"),
        ({"backend": "triton"}, ValueError, r"triton: q is on cpu.*torch: supports this call.*flash_attn: "),
        ({"backend": "flash_attn"}, ValueError, "backend 'flash_attn' does not support"),
        ({"backend": "fast"}, ValueError, "backend is 'fast', expected one of auto, triton, torch, flash_attn"),
        ({"causal": "yes"}, TypeError, "causal is of type str, expected a bool"),
        ({"causal": torch.ones(5, 5, dtype=torch.bool)}, TypeError, "causal is of type Tensor, expected a bool"),
        ({"schedules": {}}, TypeError, r"schedules is of type dict, expected an AttentionSchedules\(\)"),
        ({"dropout_p": None}, TypeError, "dropout_p is of type NoneType, expected a number"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p is of type str, expected a number"),
        ({"softcap": "30"}, TypeError, "softcap is of type str, expected a number"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, expected a finite number above 0"),
        ({"softcap": math.nan}, ValueError, "softcap is nan, expected a finite number"),
        ({"scale": math.inf}, ValueError, "scale is inf, expected a finite number"),
        ({"scale": torch.ones(())}, TypeError, "scale is of type Tensor, expected a number"),
        ({"seed": 2**64, "dropout_p": 0.1}, ValueError, "seed is 18446744073709551616, expected a signed"),
        (
            {"k": torch.zeros(1, H, 5, D), "v": torch.zeros(1, H, 5, D)},
            ValueError,
            r"\(B, H, T, D\) becomes that by x.transpose",
        ),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_attention_says_what_is_wrong(change, error, message):
    arguments = {name: torch.zeros(1, 5, H, D) for name in "qkv"} | change
    with pytest.raises(error, match=message):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_of_no_keys_is_zero(packed, kernel_device):
    q = torch.randn(5, H, 16, device=kernel_device, requires_grad=True)
    none = torch.zeros(2, dtype=torch.int32, device=kernel_device)
    bounds = {"cu_seqlens_q": none + torch.tensor([0, 5], device=kernel_device), "cu_seqlens_k": none} if packed else {}
    bounds = {name: x.int() for name, x in bounds.items()}
    query, keys = (q, q[:0]) if packed else (q[None], q[None, :0])
    out, lse = attention(query, keys, keys, return_lse=True, **bounds)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())
    assert bool((torch.autograd.grad(out.sum(), q)[0] == 0).all())


@pytest.mark.parametrize("bounds", [[1, 20], [0, 9, 5, 20], [0, 21], []])
def test_attention_rejects_boundaries_that_do_not_rise_within_the_tokens(bounds):
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to at most the 20 tokens"):
        attention(*packed_inputs(), cu_seqlens_q=boundaries(bounds))


def test_attention_rejects_float_boundaries():
    with pytest.raises(TypeError, match=r"cu_seqlens_q is torch\.float32, expected torch\.int32"):
        attention(*packed_inputs(), cu_seqlens_q=boundaries().float())


def test_attention_names_the_boundaries_that_stand_for_those_of_keys():
    q, k, v = packed_inputs()
    with pytest.raises(ValueError, match="cu_seqlens_q, which is also cu_seqlens_k when that is None, must rise"):
        attention(q, k[:9], v[:9], cu_seqlens_q=boundaries())


@pytest.mark.parametrize(
    ("longest", "error", "message"),
    [
        ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q is 3, but a sequence in cu_seqlens_q has"),
        ({"max_seqlen_q": 1.5}, TypeError, "max_seqlen_q is of type float, expected an int"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k is -1, but a sequence in cu_seqlens_k has"),
    ],
)
def test_attention_rejects_a_longest_document_that_is_none(longest, error, message):
    bounds = {"cu_seqlens_q": boundaries(), "cu_seqlens_k": boundaries()}
    attention(*packed_inputs(), **bounds, **dict.fromkeys(longest, PACKED[-1]))
    with pytest.raises(error, match=message):
        attention(*packed_inputs(), **bounds, **longest)


def test_attention_of_a_window_without_later_keys_is_causal(monkeypatch):
    q, k, v = dense_inputs(1, 5, 5, H)
    assert torch.equal(attention(q, k, v, window=(None, 0)), attention(q, k, v, causal=True))
    monkeypatch.setattr(_library, "LIBRARIES", {})
    monkeypatch.setattr(module, "attention_reference", None)
    attention(q, k, v, window=(-1, 0))


def test_attention_of_no_features_is_empty():
    assert attention(*(torch.zeros(1, 5, H, 0) for _ in range(3))).shape == (1, 5, H, 0)
