"""Calls as flash-attn 2's documentation shows them give what it says, with only the import changed."""

import inspect
import math
import re

import pytest
import torch

from fastlm import ops
from fastlm.ops import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tests.support.accuracy import assert_accurate

B, T, H, D = 2, 6, 6, 8
CU_SEQLENS, LONGEST = torch.tensor([0, 4, 5, 12], dtype=torch.int32), 7

DEFAULTS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
BOUNDS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
ARGUMENTS = {
    "flash_attn_func": (["q", "k", "v"], DEFAULTS),
    "flash_attn_varlen_func": (["q", "k", "v", *BOUNDS], DEFAULTS | {"block_table": None}),
}


def heads(Tq=T, Tk=T, Hk=H, dtype=torch.float32):
    return [torch.randn(B, length, n, D, dtype=dtype) for length, n in ((Tq, H), (Tk, Hk), (Tk, Hk))]


def packed(Hk=H):
    return [torch.randn(int(CU_SEQLENS[-1]), n, D) for n in (H, Hk, Hk)]


def seen(Tq, Tk, **options):
    """(Tq, Tk): which keys the queries see, as flash-attn's documentation draws it: 1 is kept, 0 is hidden."""
    values = torch.eye(Tk).view(1, Tk, 1, Tk)
    q, k = torch.zeros(1, Tq, 1, Tk), torch.zeros(1, Tk, 1, Tk)
    return (flash_attn_func(q, k, values, **options)[0, :, 0] > 0).int().tolist()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_flash_attn_has_the_arguments_and_defaults_of_flash_attn(name):
    required, defaults = ARGUMENTS[name]
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    assert [p.name for p in parameters] == [*required, *defaults]
    assert {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty} == defaults


def test_flash_attn_aligns_causality_at_the_end():
    assert seen(2, 5, causal=True) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert seen(5, 2, causal=True) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]


def test_flash_attn_window_is_inclusive_and_aligned_at_the_end():
    assert seen(2, 5, window_size=(1, 0)) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert seen(3, 3, window_size=(-1, 1)) == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert seen(3, 3, window_size=(0, 1), causal=True) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert seen(2, 3, window_size=(-1, -1)) == [[1, 1, 1], [1, 1, 1]]


def test_flash_attn_gives_query_heads_their_key_heads_in_order():
    q, k, v = heads(Hk=2)
    repeated = [x.repeat_interleave(3, dim=2) for x in (k, v)]
    double = [x.double() for x in (q, *repeated)]
    assert_accurate(flash_attn_func(q, k, v), flash_attn_func(q, *repeated), flash_attn_func(*double))


def test_flash_attn_takes_every_argument_in_its_place():
    q, k, v = heads(5, 7, 2)
    slopes = torch.rand(B, H)
    ours = flash_attn_func(q, k, v, 0.0, 0.3, True, (3, 0), 1.5, slopes, True, True)
    named = attention(q, k, v, scale=0.3, causal=True, window=(3, 0), softcap=1.5, alibi_slopes=slopes, return_lse=True)
    assert ours[2] is None
    assert all(torch.equal(*pair) for pair in zip(ours, named, strict=False))


def test_flash_attn_varlen_takes_every_argument_in_its_place():
    q, k, v = packed(3)
    cu_seqlens_k, longest_k = torch.tensor([0, 5, 6, 12], dtype=torch.int32), 6
    slopes = torch.rand(H)
    bounds = CU_SEQLENS, cu_seqlens_k, LONGEST, longest_k
    ours = flash_attn_varlen_func(q, k, v, *bounds, 0.0, 0.3, True, (3, 0), 1.5, slopes, True, True, None)
    options = {"scale": 0.3, "causal": True, "window": (3, 0), "softcap": 1.5, "alibi_slopes": slopes}
    named = attention(q, k, v, cu_seqlens_q=CU_SEQLENS, cu_seqlens_k=cu_seqlens_k, return_lse=True, **options)
    assert ours[2] is None
    assert ours[1].shape == (H, int(CU_SEQLENS[-1]))
    assert all(torch.equal(*pair) for pair in zip(ours, named, strict=False))


def test_flash_attn_lse_is_the_logarithm_of_the_softmax_denominator():
    q, k, v = heads()

    def lse_of_scores(dtype):
        scores = torch.einsum("bihd,bjhd->bhij", q.to(dtype), k.to(dtype)) / math.sqrt(D)
        return torch.logsumexp(scores, -1)

    lse = flash_attn_func(q, k, v, return_attn_probs=True)[1]
    assert_accurate(lse, lse_of_scores(torch.float32), lse_of_scores(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flash_attn_trains_in_the_dtypes_of_flash_attn(dtype):
    tensors = [x.requires_grad_() for x in heads(dtype=dtype)]

    def gradients(function, *inputs):
        out = function(*inputs)
        return torch.autograd.grad(out.float().square().sum(), inputs)

    def sdpa(*inputs):
        q, k, v = (x.transpose(1, 2) for x in inputs)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def sdpa_of_doubles(*inputs):
        return torch.autograd.grad(sdpa(*inputs).square().sum(), inputs)

    ours = gradients(lambda *x: flash_attn_func(*x, causal=True, deterministic=True), *tensors)
    truth = sdpa_of_doubles(*(x.detach().double().requires_grad_() for x in tensors))
    for results in zip(ours, gradients(sdpa, *tensors), truth, strict=True):
        assert_accurate(*results)


WINDOWS = {
    "tensor": torch.tensor([2, 1]),
    "tensor of int32": torch.tensor([2, 1], dtype=torch.int32),
    "list": [2, 1],
    "tensors": (torch.tensor(2), torch.tensor(1)),
    "unlimited": torch.tensor([2, -1]),
}


@pytest.mark.parametrize("form", WINDOWS)
def test_flash_attn_takes_a_window_in_every_form_that_can_be_indexed(form):
    q, k, v = heads()
    bounds = torch.arange(0, q.shape[0] * q.shape[1] + 1, q.shape[1])
    documents = *(x.flatten(0, 1) for x in (q, k, v)), bounds, bounds, q.shape[1], q.shape[1]

    def results(window):
        packed = flash_attn_varlen_func(*documents, window_size=window)
        return flash_attn_func(q, k, v, window_size=window), packed

    window = WINDOWS[form]
    assert all(map(torch.equal, results(window), results((2, int(window[1])))))


@pytest.mark.parametrize("window", [torch.tensor([1.5, 2.0]), torch.tensor(3), torch.tensor([1, 2, 3]), 3], ids=str)
def test_flash_attn_says_what_is_wrong_with_a_window(window):
    with pytest.raises(ValueError, match=r"attention: window is .*, expected \(left, right\)"):
        flash_attn_func(*heads(), window_size=window)


def test_flash_attn_dropout_is_drawn_from_torchs_generator():
    q, k, v = heads()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(flash_attn_func(q, k, v, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_flash_attn_of_stacked_tensors_equals_that_of_their_parts():
    q, k, v = heads()
    options = {"softmax_scale": 0.3, "causal": True, "return_attn_probs": True}
    whole = flash_attn_func(q, k, v, **options)
    for stacked in (
        flash_attn_qkvpacked_func(torch.stack([q, k, v], dim=2), **options),
        flash_attn_qkvpacked_func(torch.stack([q, k, v], dim=2), 0.0, 0.3, True, return_attn_probs=True),
        flash_attn_kvpacked_func(q, torch.stack([k, v], dim=2), 0.0, 0.3, True, return_attn_probs=True),
    ):
        assert all(torch.equal(*pair) for pair in zip(stacked[:2], whole[:2], strict=True))


def test_flash_attn_varlen_of_stacked_tensors_equals_that_of_their_parts():
    q, k, v = packed()
    bounds = CU_SEQLENS, CU_SEQLENS, LONGEST, LONGEST
    whole = flash_attn_varlen_func(q, k, v, *bounds, causal=True, softcap=2.0)
    qkv, kv = torch.stack([q, k, v], dim=1), torch.stack([k, v], dim=1)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, CU_SEQLENS, LONGEST, causal=True, softcap=2.0), whole)
    assert torch.equal(flash_attn_varlen_kvpacked_func(q, kv, *bounds, causal=True, softcap=2.0), whole)
    named = dict(zip(BOUNDS, bounds, strict=True))
    assert torch.equal(flash_attn_varlen_kvpacked_func(q, kv, **named, causal=True, softcap=2.0), whole)


def test_flash_attn_varlen_equals_its_documents_run_alone():
    q, k, v = packed(2)
    out = flash_attn_varlen_func(q, k, v, CU_SEQLENS, CU_SEQLENS, LONGEST, LONGEST, causal=True)

    def alone(dtype):
        documents = zip(*(x.to(dtype).split(CU_SEQLENS.diff().tolist()) for x in (q, k, v)), strict=True)
        return torch.cat([flash_attn_func(*(x[None] for x in document), causal=True)[0] for document in documents])

    assert_accurate(out, alone(torch.float32), alone(torch.float64))


def test_flash_attn_varlen_refuses_a_paged_cache():
    bounds = CU_SEQLENS, CU_SEQLENS, LONGEST, LONGEST
    with pytest.raises(ValueError, match="block_table is given, expected None"):
        flash_attn_varlen_func(*packed(), *bounds, block_table=torch.zeros(3, 1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash_attn_qkvpacked_func(torch.zeros(B, T, 4, H, D)), "expected (B, T, 3, H, D)"),
        (lambda: flash_attn_qkvpacked_func(torch.zeros(B, 3, T, H, D)), "expected (B, T, 3, H, D)"),
        (lambda: flash_attn_qkvpacked_func(torch.zeros(T, 3, H, D)), "expected (B, T, 3, H, D)"),
        (lambda: flash_attn_kvpacked_func(*packed()[:1], torch.zeros(T, 2, H, D)), "expected (B, T, 2, H, D)"),
        (
            lambda: flash_attn_varlen_qkvpacked_func(torch.zeros(T, H, 3, D), CU_SEQLENS, LONGEST),
            "expected (total, 3, H, D)",
        ),
        (lambda: flash_attn_qkvpacked_func([1.0]), "qkv is of type list, expected a tensor (B, T, 3, H, D)"),
    ],
)
def test_flash_attn_says_how_tensors_are_stacked(call, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call()
