"""What compiled code computes on a CPU, by every instruction set: short documents, and scores ATen does not fuse."""

import importlib
import itertools

import pytest
import torch

from fastlm.ops import _dispatch
from fastlm.ops._library import INSTRUCTION_SETS, is_loaded
from fastlm.ops.attention import attention
from tests.support.accuracy import assert_accurate
from tests.support.attention_cases import FACTORS, LAYOUTS, Layout, case_name, check_case, every_pair

module = importlib.import_module("fastlm.ops.attention")  # the name in fastlm.ops is the function
on_cpu = importlib.import_module("fastlm.ops.attention_cpu")

H, D = 4, 24
LENGTHS = {
    "one and two": [1, 2] * 20,
    "all different": [5, 1, 9, 3, 64, 2, 8, 63, 30, 7, 1, 4],
    "an equal pair apart": [6, 90, 6, 65],
    "tokens alone": [1] * 9,
    "empty ones between": [3, 0, 5, 0, 0, 3],
    "short ones and long ones": [2, _dispatch.ATTENTION_MAX_SEQLEN + 9, 3, 2, _dispatch.ATTENTION_MAX_SEQLEN, 1, 3],
}


@pytest.fixture(params=range(3), ids=INSTRUCTION_SETS[:3], autouse=True)  # the last has no attention of its own
def instruction_set(request, monkeypatch):
    if not is_loaded("cpu"):
        pytest.skip("the compiled CPU code is not built")
    best = torch.ops.fastlm.cpu_instruction_set(-1)
    if request.param > best:
        pytest.skip(f"this CPU has no {INSTRUCTION_SETS[request.param]}")
    torch.ops.fastlm.cpu_instruction_set(request.param)
    monkeypatch.setattr(_dispatch, "ATTENTION_MAX_SEQLEN_AVX512", _dispatch.ATTENTION_MAX_SEQLEN)
    yield
    torch.ops.fastlm.cpu_instruction_set(best)


def row(lengths, key_lengths=None, Hk=H, D=D):
    """(q, k, v, upstream gradient, both cu_seqlens), with seven tokens behind the last document."""
    key_lengths = lengths if key_lengths is None else key_lengths
    totals = sum(lengths) + 7, sum(key_lengths) + 7
    sizes = ((totals[0], H), (totals[1], Hk), (totals[1], Hk), (totals[0], H))
    tensors = [torch.randn(total, heads, D) for total, heads in sizes]
    bounds = (torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (lengths, key_lengths))
    return *tensors, *bounds


def packed(q, k, v, dout, cu_seqlens_q, cu_seqlens_k, causal=True):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, causal=causal, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def alone(q, k, v, dout, cu_seqlens_q, cu_seqlens_k, dtype, causal):
    """Document by document, by PyTorch: causality is aligned at the end, and a query without keys gives 0."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    q, k, v = (x.transpose(0, 1) for x in inputs)
    outs = []
    for (a, b), (c, d) in zip(*(itertools.pairwise(x.tolist()) for x in (cu_seqlens_q, cu_seqlens_k)), strict=True):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a) if causal else d)
        scores = (q[:, a:b] @ k[:, c:d].repeat_interleave(H // len(k), 0).mT) * k.shape[-1] ** -0.5
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
        outs.append((p @ v[:, c:d].repeat_interleave(H // len(v), 0)).transpose(0, 1))
    out = torch.cat([*outs, 0 * inputs[0][int(cu_seqlens_q[-1]) :]])
    return out.detach(), *(x.nan_to_num() for x in torch.autograd.grad(out, inputs, dout.to(dtype)))


def assert_equal_to_alone(given, causal, dtype=torch.float32):
    roads = (alone(*given, precision, causal) for precision in (dtype, torch.float64))
    for name, *results in zip(("out", "dq", "dk", "dv"), packed(*given, causal=causal), *roads, strict=True):
        assert_accurate(*results, name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_attention_of_short_documents_equals_each_alone(name, causal):
    assert_equal_to_alone(row(LENGTHS[name]), causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("Hk", [1, 2])
def test_packed_attention_of_other_keys_and_shared_heads_equals_each_alone(Hk, causal):
    assert_equal_to_alone(row([5, 0, 33, 4, 1, 40, 30], [7, 3, 12, 0, 17, 40, 35], Hk), causal)


@pytest.mark.parametrize("D", [1, 3, 16, 40, 130])
def test_packed_attention_of_short_documents_takes_every_head_dimension(D):
    assert_equal_to_alone(row([40, 3, 17], D=D), True)


OPTIONS = {name: values for name, values in FACTORS.items() if name != "descriptors"}


@pytest.mark.parametrize("case", every_pair(OPTIONS), ids=case_name)
def test_compiled_attention_matches_float64_in_every_pair_of_options(case, no_scores):
    check_case(case, torch.device("cpu"), "auto")


@pytest.mark.parametrize("window", [None, (140, None), (None, 30), (17, 5), (0, 0), (2**62, 2**62)])
@pytest.mark.parametrize("causal", [True, False])
def test_compiled_attention_of_many_blocks_matches_float64(causal, window, no_scores, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "long", Layout((259, 3, 150), (161, 0, 300), True, behind=2))
    case = {name: values[0] for name, values in OPTIONS.items()}
    case |= {"layout": "long", "D": 8, "causal": causal, "window": window, "slopes": "heads", "sinks": True}
    check_case(case, torch.device("cpu"), "auto")


@pytest.fixture
def no_scores(monkeypatch):
    """Fails the test if it comes to the reference, which builds every score."""

    def refuse(*_):
        raise AssertionError("the reference ran")

    for place in (module, on_cpu):
        monkeypatch.setattr(place, "attention_reference", refuse)
    monkeypatch.setattr(on_cpu, "attention_backward_reference", refuse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_of_short_documents_in_low_precision_equals_each_alone(causal, dtype):
    *tensors, bounds_q, bounds_k = row(LENGTHS["all different"])
    assert_equal_to_alone((*(x.to(dtype) for x in tensors), bounds_q, bounds_k), causal, dtype)


def test_packed_attention_reads_heads_where_they_lie():
    """As in one projection's output, of which q, k and v are views; and with gradients that are expanded."""
    *_, bounds, _ = row([5, 30, 2])
    qkv = torch.randn(37, 3, H, D).transpose(0, 1)
    dout = torch.randn(37, H, 1).expand(-1, -1, D)
    given = packed(*(x.contiguous() for x in qkv), dout.contiguous(), bounds, bounds)
    for ours, theirs in zip(packed(*qkv, dout, bounds, bounds), given, strict=True):
        assert torch.equal(ours, theirs)


def test_packed_document_has_the_same_bits_alone_and_on_any_number_of_threads():
    lengths = LENGTHS["all different"]
    given = row(lengths)
    together = packed(*given)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for ours, theirs in zip(packed(*given), together, strict=True):
            assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(threads)
    start, length = sum(lengths[:4]), lengths[4]
    of_document = slice(start, start + length)
    bounds = torch.tensor([0, length], dtype=torch.int32)
    for ours, theirs in zip(packed(*(x[of_document] for x in given[:4]), bounds, bounds), together, strict=True):
        assert torch.equal(ours, theirs[of_document])


def test_packed_document_longer_than_short_has_the_same_bits_whatever_its_neighbour(monkeypatch):
    """The neighbour has more keys than queries, so that PyTorch's causal mask is not its own."""
    monkeypatch.setattr(_dispatch, "ATTENTION_MAX_SEQLEN", 8)
    lengths, key_lengths = [40, 3, 33], [40, 3, 50]
    *tensors, bounds_q, bounds_k = row(lengths, key_lengths, H)
    together = packed(*tensors, bounds_q, bounds_k)
    alone = packed(*(x[:40] for x in tensors), bounds_q[:2], bounds_k[:2])
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours[:40], theirs)
    assert_equal_to_alone((*tensors, bounds_q, bounds_k), True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_packed_attention_keeps_nan_within_its_document(value, causal):
    lengths = LENGTHS["all different"]
    *tensors, dout, bounds, _ = row(lengths)
    clean = packed(*tensors, dout, bounds, bounds, causal=causal)
    first = slice(0, lengths[0])
    for x in tensors:
        x[first] = value
    for results in zip(packed(*tensors, dout, bounds, bounds, causal=causal), clean, strict=True):
        assert torch.equal(*(x[lengths[0] :] for x in results))
        assert not bool(results[0][first].isfinite().all())


def test_packed_attention_gives_keys_of_no_query_a_gradient_of_zero():
    _, dq, dk, dv = packed(*row([4, 0, 5], [4, 2, 5]), causal=False)
    for gradient, unseen in ((dq, slice(9, None)), (dk, slice(4, 6)), (dv, slice(4, 6)), (dk, slice(11, None))):
        assert bool((gradient[unseen] == 0).all())
    assert bool(dk[:4].any())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("Tq", [40, 32])
def test_dense_attention_of_short_sequences_runs_the_code_of_documents(Tq, causal, monkeypatch):
    monkeypatch.setattr(_dispatch, "ATTENTION_MIN_MACS", 0)
    monkeypatch.setattr(_dispatch, "ATTENTION_MIN_SEQLEN_IN_TRAINING", 0)
    q, k, v, dout = (torch.randn(3, T, heads, D) for T, heads in ((Tq, H), (40, 2), (40, 2), (Tq, H)))
    bounds = (torch.arange(0, 3 * T + 1, T, dtype=torch.int32) for T in (Tq, 40))
    theirs = packed(*(x.flatten(0, 1) for x in (q, k, v, dout)), *bounds, causal=causal)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, causal=causal)
    assert type(out.grad_fn.next_functions[0][0]).__name__ == "AttentionFunctionBackward"
    for mine, other in zip((out, *torch.autograd.grad(out, inputs, dout)), theirs, strict=True):
        assert torch.equal(mine.flatten(0, 1), other)


def test_dense_causal_attention_of_other_numbers_of_keys_builds_no_mask(monkeypatch):
    monkeypatch.setattr(module, "torch_sdpa", None)
    for Tq, Tk in ((5, 9), (9, 5)):
        q, k = torch.randn(1, Tq, H, D), torch.randn(1, Tk, H, D)
        assert attention(q, k, k, causal=True).shape == q.shape
    with pytest.raises(TypeError):
        attention(q, q, q, causal=True)


def test_packed_documents_up_to_short_run_compiled_code_and_others_pytorchs(monkeypatch):
    seen = []
    original = on_cpu.equal_length_groups
    monkeypatch.setattr(on_cpu, "equal_length_groups", lambda *x: seen.extend(original(*x)) or iter(seen))
    q, k, v, _, bounds, _ = row(LENGTHS["short ones and long ones"])
    attention(q, k, v, cu_seqlens_q=bounds)
    assert [group.q_length for group in seen] == [_dispatch.ATTENTION_MAX_SEQLEN + 9]
