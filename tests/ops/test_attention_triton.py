"""The attention kernels against float64, in every pair of options; what they skip, list and never touch."""

import dataclasses
import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from fastlm.ops._triton import HAS_TRITON
from fastlm.ops.attention import attention
from fastlm.ops.attention_reference import Inputs, Options, attention_reference
from tests.support.accuracy import DRAWS, InaccurateError, assert_accurate, assert_accurate_over_draws
from tests.support.attention_cases import FACTORS, FLOATS, LAYOUTS, SEED, boundaries, case_name, check_case, every_pair

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

module = importlib.import_module("fastlm.ops.attention")  # the name in fastlm.ops is the function
kernels = importlib.import_module("fastlm.ops.attention_launch")


@pytest.mark.parametrize("case", every_pair(FACTORS), ids=case_name)
def test_attention_kernels_match_float64_in_every_pair_of_options(case, kernel_device, monkeypatch):
    monkeypatch.setattr(kernels, "can_use_tma", lambda arch, *tensors: case["descriptors"])
    check_case(case, kernel_device, "triton", draws=2 if case["dtype"] == torch.float32 else 1)


@pytest.mark.soak
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "few" in name])
def test_attention_kernels_match_float64_in_all_options_together(layout, dtype, monkeypatch, record_property):
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    # Every sum of integers is also looked at for overflow, in other tests: here that would be a third of the time.
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    factors = FACTORS | {"layout": [layout], "dtype": [dtype]}
    cases = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    missed_by = dict.fromkeys((1, DRAWS, 4 * DRAWS), 0)
    failures = []
    for number, case in enumerate(cases):
        monkeypatch.setattr(kernels, "can_use_tma", lambda arch, *tensors, case=case: case["descriptors"])
        for draws in missed_by:  # PyTorch's largest error of a few numbers is small by luck in some cases
            torch.manual_seed(number)  # so that the draws that missed are among the more
            try:
                check_case(case, torch.device("cpu"), "triton", draws=draws)
                break
            except InaccurateError as missed:
                missed_by[draws] += 1
                failure = f"{case_name(case)}: {missed}"
        else:
            failures.append(failure)
    record_property("cases", len(cases))
    for draws, more in itertools.pairwise(missed_by):
        record_property(f"judged by {more} draws", missed_by[draws])
    record_property("failed", len(failures))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("D", [1, 8, 31, 64, 80, 96, 128, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_kernels_take_every_head_dimension(D, dtype, kernel_device):
    plain = {name: values[0] for name, values in FACTORS.items()}
    case = plain | {"layout": "few", "dtype": dtype, "D": D, "Hk": 1}
    check_case(case, kernel_device, "triton", draws=12 if D == 1 else 3, scale=D**-0.5)


@pytest.mark.parametrize(("slopes", "layout"), [("heads", "few"), ("documents and heads", "few documents")])
def test_gradients_of_slopes_and_sinks_match_float64_over_many_draws(slopes, layout, kernel_device):
    plain = {name: values[0] for name, values in FACTORS.items()}
    case = plain | {"layout": layout, "dtype": torch.float32, "D": 16, "slopes": slopes, "sinks": True}
    check_case(case, kernel_device, "triton", draws=16, judged_from=1)


ONE_KEY = {  # queries, keys, options
    "one key": (9, 1, lambda device: {}),
    "a window of one": (9, 9, lambda device: {"window": (0, 0)}),
    "documents of one token": (3, 3, lambda device: {"cu_seqlens_q": torch.arange(4, device=device)}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ONE_KEY)
def test_gradients_under_dropout_match_float64_where_a_query_sees_one_key(form, dtype, kernel_device):
    num_queries, num_keys, options = ONE_KEY[form]
    options, scale = options(kernel_device), 0.25
    upstream = [torch.randn(num_queries, *shape, device=kernel_device) for shape in ((2, 16), (2,))]
    upstream[1] /= 8  # else its share of the gradients hides what is wrong with the rest

    def gradients(outputs, leaves):
        grads = [grad.to(x.dtype) for grad, x in zip(upstream, outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, grads)

    def compare():
        tensors = [torch.randn(n, 2, 16, device=kernel_device, dtype=dtype) for n in (num_queries, num_keys, num_keys)]
        leaves = [x.requires_grad_() for x in tensors]
        given = leaves if "cu_seqlens_q" in options else [x[None] for x in leaves]
        out, lse = attention(*given, scale=scale, dropout_p=0.17, seed=SEED, return_lse=True, **options)
        outputs = out.view(-1, 2, 16), lse.view(2, -1).T
        kept = outputs[0].ne(0).any(-1, keepdim=True)  # a whole probability is dropped; a value may be 0 by itself

        def by_hand(dtype):  # the one probability is 1
            q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors)
            return gradients((torch.where(kept, v / (1 - 0.17), 0.0), (q * k).sum(-1) * scale), (q, k, v))

        pairs = zip(gradients(outputs, leaves), by_hand(dtype), by_hand(torch.float64), strict=True)
        for name, three in zip(("dq", "dk", "dv"), pairs, strict=True):
            assert_accurate(*three, name)

    assert_accurate_over_draws(compare, draws=2)


# Packed documents


def results(tensors, **options) -> list[Tensor]:
    """[out, dq, dk, dv] of (q, k, v, dout), by the kernels."""
    q, k, v, dout = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, backend="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def random_tensors(*shape: int, device: torch.device, num_key_heads: int = 1) -> list[Tensor]:
    *tokens, num_heads, D = shape
    heads = (num_heads, num_key_heads, num_key_heads, num_heads)
    return [torch.randn(*tokens, h, D, device=device) for h in heads]


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (7, 3)}], ids=str)
def test_packed_documents_have_the_bits_of_documents_run_alone(options, descriptors, kernel_device, monkeypatch):
    monkeypatch.setattr(kernels, "can_use_tma", lambda arch, *tensors: descriptors)
    lengths = (0, 35, 1, 0, 18)
    tensors = random_tensors(sum(lengths), 2, 16, device=kernel_device)
    packed = results(tensors, cu_seqlens_q=boundaries(lengths, kernel_device), **options)
    for a, b in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        alone = results([x[None, a:b] for x in tensors], **options)
        for name, one, two in zip(("out", "dq", "dk", "dv"), packed, alone, strict=True):
            assert torch.equal(one[a:b], two[0]), name


@pytest.mark.parametrize("descriptors", [False, True])
def test_packed_document_of_nan_leaves_all_others_bit_identical(descriptors, kernel_device, monkeypatch):
    monkeypatch.setattr(kernels, "can_use_tma", lambda arch, *tensors: descriptors)
    lengths, behind = (17, 21, 20), 5
    bounds = boundaries(lengths, kernel_device)
    tensors = random_tensors(sum(lengths) + behind, 2, 16, device=kernel_device)
    before = results(tensors, causal=True, cu_seqlens_q=bounds)
    dense = results([x[None] for x in tensors], causal=True)
    others = torch.ones(len(tensors[0]), dtype=torch.bool)
    others[17:38], others[58:] = False, False
    for x in tensors:
        x[17:38], x[58:] = math.nan, math.nan
    after = results(tensors, causal=True, cu_seqlens_q=bounds)
    assert all(torch.equal(one[others], two[others]) for one, two in zip(before, after, strict=True))
    assert all(bool((x[58:] == 0).all()) for x in after), "tokens behind the last document have no result"
    leaking = results([x[None] for x in tensors], causal=True)
    assert not torch.equal(leaking[0][0][38:58], dense[0][0][38:58]), "a plain causal mask must leak"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_boundaries_padded_with_the_total_change_nothing(dtype, kernel_device):
    lengths = (20, 1, 14)
    tensors = random_tensors(sum(lengths), 2, 16, device=kernel_device)
    exact = results(tensors, causal=True, cu_seqlens_q=boundaries(lengths, kernel_device))
    padded = boundaries((*lengths, *[0] * 90), kernel_device).to(dtype)
    assert all(map(torch.equal, exact, results(tensors, causal=True, cu_seqlens_q=padded)))


LENGTHS = [(), (0,), (1,), (9,), (7, 0, 8, 8, 1, 30, 0), (64, 3, 64, 5, 17), tuple(i * 7 % 23 for i in range(80))]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: str(lengths[:7]))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("over_keys", [False, True])
def test_tile_list_holds_every_tile_once_and_the_heaviest_first(over_keys, causal, lengths, kernel_device):
    block, behind = 8, 11
    q_lengths, k_lengths = lengths, tuple(length + 5 * (i % 3) for i, length in enumerate(lengths))
    q, k = (torch.zeros(sum(x) + behind, 1, 16, device=kernel_device) for x in (q_lengths, k_lengths))
    bounds = [boundaries(x, kernel_device) for x in (q_lengths, k_lengths)]
    inputs, options = Inputs(q, k, k, *bounds), Options(causal, 1.0, -1, -1, 0.0, 0.0)
    tiles = kernels.varlen_tiles(inputs, options, block, over_keys).tiles_ptr.tolist()

    work = {}
    for document, (T_q, T_k) in enumerate(zip((*q_lengths, behind), (*k_lengths, behind), strict=True)):
        own, other = (T_k, T_q) if over_keys else (T_q, T_k)
        other = 0 if document == len(lengths) else other
        for i in range(-(-own // block)):
            work[document, i] = other
            if causal:  # as if the last block were full
                work[document, i] = other + own - T_q - i * block if over_keys else other - own + (i + 1) * block
    used = [tuple(tile) for tile in tiles if tile != [-1, -1]]
    assert sorted(used) == sorted(work)
    assert tiles[len(used) :] == [[-1, -1]] * (len(tiles) - len(used))
    if not (causal and over_keys):
        assert [work[tile] for tile in used] == sorted(work.values(), reverse=True)


# What the kernels read and draw


@pytest.mark.parametrize("tile", [(32, 16), (16, 64), (64, 32)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_mask_is_that_of_the_reference_at_any_tile_size(packed, tile, kernel_device, monkeypatch):
    monkeypatch.setattr(kernels, "TILE_OF_INTERPRETER", kernels.Tile(*tile, 4, 1))
    shape = (2, 37, 2, 64)
    zeros = torch.zeros(shape, device=kernel_device)
    v = torch.eye(64, device=kernel_device)[None, :37, None].expand(shape)
    masks = []
    for backend in ("triton", "torch"):
        q, k, values, bounds = zeros, zeros, v, {}
        if packed:
            q, k, values = (x.flatten(0, 1) for x in (q, k, values))
            bounds = {"cu_seqlens_q": boundaries((37, 37), kernel_device)}
        out = attention(q, k, values, dropout_p=0.3, seed=SEED, causal=True, backend=backend, **bounds)
        masks.append(out.reshape(shape) != 0)
    assert torch.equal(*masks)
    assert 0.2 < 1 - 2 * masks[0].double().sum().item() / (2 * 2 * 37 * 38) < 0.4


@pytest.mark.parametrize("options", [{}, {"causal": True, "dropout_p": 0.2, "seed": 3}], ids=str)
def test_programs_in_sections_of_the_cache_give_the_same_bits(options, kernel_device, monkeypatch):
    tensors = random_tensors(3, 33, 2, 16, device=kernel_device)
    whole = results(tensors, **options)
    monkeypatch.setattr(kernels, "L2_BYTES", 2 * (2 * 33 * 16 * 4))  # 4 of 6 pairs of batch row and head, then the rest
    assert all(map(torch.equal, whole, results(tensors, **options)))


def test_descriptors_give_the_bits_of_pointers(kernel_device, monkeypatch):
    tensors = random_tensors(2, 40, 4, 24, device=kernel_device, num_key_heads=2)
    both = []
    for descriptors in (False, True):
        monkeypatch.setattr(kernels, "can_use_tma", lambda arch, *tensors, wanted=descriptors: wanted)
        both.append(results(tensors, causal=True))
    assert all(map(torch.equal, *both))


def test_descriptors_are_for_aligned_tensors_on_chips_with_a_copy_engine():
    x = torch.zeros(2, 8, 3, 16, dtype=torch.bfloat16)
    assert kernels.can_use_tma(90, x, x[:, :, 1:])
    assert kernels.can_use_tma(100, x[0])
    refused = [x[..., 1:], x[..., :4].contiguous(), x[:1, :1].expand(2, 8, 3, 16), x[:0]]
    assert not any(kernels.can_use_tma(90, x, other) for other in refused)
    assert not kernels.can_use_tma(80, x)
    assert not kernels.can_use_tma(120, x)  # there tiles with descriptors spill


@pytest.mark.interpreted
@pytest.mark.parametrize(("T", "stride"), [(5, 2**30), (34, 2**26)])  # within a tile, and before the second
def test_offsets_beyond_two_to_the_31_elements_are_read_where_they_are(T, stride):
    numpy = pytest.importorskip("numpy")
    memory = torch.from_numpy(
        numpy.zeros(2**32 + 2**20, dtype=numpy.float16)
    )  # mapped, and touched only here and there
    far = memory.as_strided((1, T, 1, 16), (1, stride, 16, 1))
    near = torch.randn(1, T, 1, 16).half()
    far.copy_(near)
    upstream = torch.randn(1, T, 1, 16).half()
    assert all(map(torch.equal, results([far, far, far, far]), results([near, near, near, near])))
    assert all(map(torch.equal, results([far, far, far, upstream]), results([near, near, near, upstream])))


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)], ids=str)
def test_attention_kernels_accept_empty_tensors(shape, kernel_device):
    if shape[2] == 0:
        pytest.skip("no key head divides no query head")
    tensors = random_tensors(*shape, device=kernel_device)
    assert [x.shape for x in results(tensors)] == [tensors[0].shape, *(x.shape for x in tensors[:3])]


def test_attention_kernels_without_documents_give_zeros(kernel_device):
    tensors = random_tensors(7, 2, 16, device=kernel_device)
    found = results(tensors, cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device=kernel_device))
    assert all(bool((x == 0).all()) for x in found)


# Which code runs


@pytest.fixture
def broken_reference(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("PyTorch's code ran")

    monkeypatch.setattr(module, "attention_reference", refuse)
    monkeypatch.setattr(module, "by_sdpa", refuse)


@pytest.mark.usefixtures("broken_reference")
def test_auto_runs_the_kernels_where_kernels_run(kernel_device):
    q, k, v, _ = random_tensors(1, 9, 2, 16, device=kernel_device)
    attention(q.requires_grad_(), k, v)


@pytest.mark.usefixtures("broken_reference")
def test_auto_runs_torch_on_a_cpu():
    with pytest.raises(AssertionError, match="PyTorch's code ran"):
        attention(*random_tensors(1, 9, 2, 16, device=torch.device("cpu"))[:3])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "q is torch.float64"),
        ({"D": 257}, "D is 257, the kernels take 1 to 256"),
        ({"scale": -1.0}, "scale is -1.0, the kernels take positive ones"),
    ],
    ids=["float64", "D", "scale"],
)
def test_calls_that_no_kernel_serves_run_torch_and_say_why_not_triton(options, reason, kernel_device):
    dtype, D, scale = (
        options.get(name, default) for name, default in (("dtype", torch.float32), ("D", 8), ("scale", 0.5))
    )
    q, k, v = (x.to(dtype) for x in random_tensors(1, 9, 2, D, device=kernel_device)[:3])
    expected, _ = attention_reference(Inputs(q, k, v), Options(True, scale, -1, -1, 0.0, 0.0))
    torch.testing.assert_close(attention(q, k, v, causal=True, scale=scale), expected)
    with pytest.raises(ValueError, match=reason):
        attention(q, k, v, causal=True, scale=scale, backend="triton")
