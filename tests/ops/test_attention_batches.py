"""Short packed documents go in batches on a CPU, and still give what they give alone."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastlm.ops.attention import attention
from tests.accuracy import assert_accurate

module = importlib.import_module("fastlm.ops.attention")  # the name in fastlm.ops is the function

H, D = 3, 8
LENGTHS = {
    "one and two": [1, 2] * 20,
    "all different": [5, 1, 9, 3, 64, 2, 8, 63, 30, 7, 1, 4],
    "an equal pair apart": [6, 90, 6, 65],
    "tokens alone": [1] * 9,
    "empty ones between": [3, 0, 5, 0, 0, 3],
    "short ones and long ones": [2, 100, 3, 2, 70, 1, 3],
}


def row(lengths, seed=0):
    """(q, k, v, upstream gradient, cu_seqlens), with seven tokens behind the last document."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(sum(lengths) + 7, H, D, generator=generator) for _ in range(4)]
    return *tensors, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(q, k, v, dout, cu_seqlens, causal=True):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, causal=causal, cu_seqlens_q=cu_seqlens)
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def alone(q, k, v, dout, cu_seqlens, dtype, causal):
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    sizes = [*cu_seqlens.diff().tolist(), len(q) - int(cu_seqlens[-1])]
    documents = [[x.transpose(0, 1)[None] for x in d] for d in zip(*(x.split(sizes) for x in inputs), strict=True)]
    outs = [F.scaled_dot_product_attention(*d, is_causal=causal)[0].transpose(0, 1) for d in documents[:-1]]
    out = torch.cat([*outs, 0 * inputs[0][int(cu_seqlens[-1]) :]])
    return out.detach(), *torch.autograd.grad(out, inputs, dout.to(dtype))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_attention_of_short_documents_equals_each_alone(name, causal):
    given = row(LENGTHS[name])
    ours = packed(*given, causal=causal)
    roads = (alone(*given, dtype, causal) for dtype in (torch.float32, torch.float64))
    for results in zip(ours, *roads, strict=True):
        assert_accurate(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_of_short_documents_in_low_precision_equals_each_alone(causal, dtype):
    *tensors, cu_seqlens = row(LENGTHS["all different"])
    given = *(x.to(dtype) for x in tensors), cu_seqlens
    roads = (alone(*given, precision, causal) for precision in (dtype, torch.float64))
    for results in zip(packed(*given, causal=causal), *roads, strict=True):
        assert_accurate(*results)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_packed_attention_keeps_nan_within_its_document(value, causal):
    lengths = LENGTHS["all different"]
    *tensors, dout, cu_seqlens = row(lengths)
    clean = packed(*tensors, dout, cu_seqlens, causal=causal)
    first = slice(0, lengths[0])
    for x in tensors:
        x[first] = value
    for results in zip(packed(*tensors, dout, cu_seqlens, causal=causal), clean, strict=True):
        assert torch.equal(*(x[lengths[0] :] for x in results))
        assert not bool(results[0][first].isfinite().all())


def test_packed_attention_of_many_short_documents_takes_few_calls():
    q, k, *_, cu_seqlens = row([1, 3, 2, 1, 2, 3, 3, 1] * 50)
    parts = list(module._joined(module._runs(q, k, cu_seqlens, None)))
    assert len(parts) <= 3
    assert sum(part.size * part.q_length if isinstance(part, module.Run) else len(part.tokens) for part in parts) == 800


def test_batches_compute_less_in_vain_than_a_call_costs():
    q, k, *_, cu_seqlens = row(list(range(1, 100)))
    batches = [part for part in module._joined(module._runs(q, k, cu_seqlens, None)) if isinstance(part, module.Batch)]
    assert len(batches) > 1
    for batch in batches:
        size, longest = batch.behind.shape
        lengths = (~batch.behind).sum(1)
        assert longest <= module.SHORT
        assert size * longest**2 - int(lengths.square().sum()) <= module.PADDING


def test_packed_attention_gives_keys_of_no_query_a_gradient_of_zero():
    q, k, v, dout, _ = row([4, 0, 5])
    cu_q, cu_k = (torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 4, 4, 9], [0, 4, 6, 11]))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    dq, dk, dv = torch.autograd.grad(out, inputs, dout)
    for gradient, unseen in ((dq, slice(9, None)), (dk, slice(4, 6)), (dv, slice(4, 6)), (dk, slice(11, None))):
        assert bool((gradient[unseen] == 0).all())
    assert bool(dk[:4].any())
