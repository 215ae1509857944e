"""The attention kernels against float64, in every pair of options; what they skip, list and never touch."""

import dataclasses
import importlib
import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._dropout import uniform
from fastlm.ops._triton import HAS_TRITON
from fastlm.ops.attention import Options, attention
from tests.accuracy import DRAWS, InaccurateError, assert_accurate

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

module = importlib.import_module("fastlm.ops.attention")  # the name in fastlm.ops is the function
kernels = importlib.import_module("fastlm.ops.attention_triton")

H = 2
SEED = 2**40 + 7
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


class Layout(NamedTuple):
    """Lengths of the sequences: equal in a batch, or those of packed documents, with tokens behind the last."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    packed: bool
    behind: int = 0

    @property
    def totals(self) -> tuple[int, int]:
        return sum(self.q) + self.behind, sum(self.k) + self.behind


LAYOUTS = {
    "square": Layout((37, 37), (37, 37), False),
    "more keys": Layout((17,), (63,), False),  # the first query sees all of some blocks but their last key
    "more queries": Layout((53,), (19,), False),
    "few": Layout((5,), (19,), False),
    "few, square": Layout((21, 21), (21, 21), False),
    "few keys": Layout((37,), (5,), False),
    "few documents": Layout((3, 0, 5), (7, 2, 5), True),
    "documents": Layout((0, 35, 1, 0, 9), (0, 35, 1, 0, 9), True, behind=3),
    "few documents with themselves": Layout((0, 19, 1), (0, 19, 1), True, behind=3),
    "documents with other keys": Layout((5, 33, 1), (40, 17, 0), True, behind=2),
}
FACTORS = {
    "layout": [name for name in LAYOUTS if "few" not in name],
    "dtype": FLOATS,
    "D": [64, 40],
    "Hk": [2, 1],
    "causal": [True, False],
    "window": [None, (20, None), (None, 9), (17, 5)],
    "softcap": [None, 1.5],
    "slopes": [None, "heads", "documents and heads"],
    "sinks": [False, True],
    "dropout_p": [0.0, 0.3],
    "descriptors": [False, True],
}


def every_pair(factors: dict) -> list[dict]:
    """Few cases in which any two values of different factors meet: each next one takes the most new pairs it can."""
    names = list(factors)
    open_pairs = {
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    cases = []
    while open_pairs:
        case = dict(min(open_pairs, key=sorted))
        for name in names:
            new_pairs = [
                sum(frozenset({(name, value), chosen}) in open_pairs for chosen in case.items())
                for value in range(len(factors[name]))
            ]
            case.setdefault(name, new_pairs.index(max(new_pairs)))
        open_pairs -= set(map(frozenset, itertools.combinations(case.items(), 2)))
        cases.append({name: factors[name][case[name]] for name in names})
    return cases


class SoftmaxTimesValues(torch.autograd.Function):
    """softmax(s) @ v, with the gradient of PyTorch's fused kernels: their delta is out . dout, not the sum of p dp.

    Of a row that sees one key the sum cancels to the last bit, which no kernel that does not keep p can do.
    """

    @staticmethod
    def forward(ctx, s, v, kept):
        p = s.softmax(-1)
        out = torch.einsum("bhij,bjhd->bihd", p * kept, v)
        ctx.save_for_backward(p, v, kept, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        p, v, kept, out = ctx.saved_tensors
        dp = torch.einsum("bihd,bjhd->bhij", dout, v) * kept
        delta = (out * dout).sum(-1).transpose(1, 2)[..., None]
        return p * (dp - delta), torch.einsum("bhij,bihd->bjhd", p * kept, dout), None


def composed(q, k, v, options: Options, slopes=None, sinks=None, seed=None, first_document=0):
    """(out, lse) of (B, T, H, D) as one writes it in PyTorch, all in the dtype of q."""
    B, Tq, H, _ = q.shape
    Tk = k.shape[1]
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * options.scale
    if options.softcap:
        s = torch.tanh(s / options.softcap) * options.softcap
    ahead = torch.arange(Tq, device=q.device)[:, None] + (Tk - Tq) - torch.arange(Tk, device=q.device)
    if slopes is not None:
        s = s - slopes.to(q.dtype).view(-1, H, 1, 1) * ahead.abs()
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    hidden |= (ahead < 0) if options.causal else (ahead < -options.right if options.right >= 0 else hidden)
    hidden |= ahead > options.left if options.left >= 0 else hidden
    s = s.masked_fill(hidden, -math.inf)
    sink = s.new_full((1, H, 1, 1), -math.inf) if sinks is None else sinks.to(q.dtype).view(1, H, 1, 1)
    s = torch.cat([s, sink.expand(B, H, Tq, 1)], -1)
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)
    lse = s.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    kept = (~empty).to(q.dtype).expand(B, H, Tq, Tk + 1).clone()
    kept[..., Tk] = 0  # the sink has no value
    if seed is not None:
        keys, query, head, document = (
            torch.arange(size, device=q.device).view([-1 if dim == i else 1 for i in range(4)])
            for dim, size in ((3, -(-Tk // 4)), (2, Tq), (1, H), (0, B))
        )
        drawn = uniform(seed, keys, query, head, document + first_document)[..., :Tk]
        kept[..., :Tk] *= (drawn >= options.dropout_p) / (1 - options.dropout_p)
    return SoftmaxTimesValues.apply(s, F.pad(v, (0, 0, 0, 0, 0, 1)), kept), lse


def composed_layout(layout: Layout, q, k, v, options, slopes, sinks, seed):
    """The same of a layout: packed documents one by one, and nothing behind the last."""
    if not layout.packed:
        return composed(q, k, v, options, slopes, sinks, seed)
    outs, lses = [], []
    q_bounds, k_bounds = (list(itertools.accumulate(lengths, initial=0)) for lengths in (layout.q, layout.k))
    for i, (a, b) in enumerate(itertools.pairwise(q_bounds)):
        c, d = k_bounds[i : i + 2]
        of_document = slopes if slopes is None or slopes.dim() == 1 else slopes[i]
        out, lse = composed(q[None, a:b], k[None, c:d], v[None, c:d], options, of_document, sinks, seed, i)
        outs.append(out[0])
        lses.append(lse[0])
    behind = q[q_bounds[-1] :]
    return torch.cat([*outs, behind * 0]), torch.cat([*lses, lses[0].new_full((H, len(behind)), -math.inf)], 1)


def evaluated(function, leaves: dict[str, Tensor], dtype: torch.dtype, upstream) -> dict[str, Tensor]:
    """out, lse and all gradients; lse in float32 or wider."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
    out, lse = function(**leaves)
    lse = lse.to(torch.promote_types(lse.dtype, torch.float32))
    dout, dlse = upstream
    total = (out * dout.to(out.dtype)).sum() + (lse.masked_fill(lse == -math.inf, 0) * dlse.to(lse.dtype)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {"out": out.detach(), "lse": lse.detach()}
    for (name, x), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"d{name}"] = torch.zeros_like(x) if gradient is None else gradient
    return found


def boundaries(lengths, device) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def check_case(case: dict, device: torch.device, draws: int, scale: float = 0.15, judged_from: int = 64) -> None:
    """The kernels' results in one case of FACTORS against those of composed, over a few draws."""
    layout, causal, window = LAYOUTS[case["layout"]], case["causal"], case["window"] or (None, None)
    left, right = (-1 if side is None else side for side in window)
    options = Options(causal, scale, left, right, case["softcap"] or 0.0, case["dropout_p"])
    seed = torch.tensor(SEED, device=device) if case["dropout_p"] else None
    T_q, T_k = layout.totals if layout.packed else (layout.q[0], layout.k[0])
    batch = () if layout.packed else (len(layout.q),)
    pooled = {}
    for _ in range(draws):
        leaves = {
            "q": torch.randn(*batch, T_q, H, case["D"], device=device),
            "k": torch.randn(*batch, T_k, case["Hk"], case["D"], device=device),
            "v": torch.randn(*batch, T_k, case["Hk"], case["D"], device=device),
        }
        if case["slopes"]:
            segments = (len(layout.q),) if "documents" in case["slopes"] else ()
            leaves["slopes"] = torch.rand(*segments, H, device=device) / 8
        if case["sinks"]:
            leaves["sinks"] = torch.randn(H, device=device)
        leaves = {name: x.to(case["dtype"]) for name, x in leaves.items()}
        lse_shape = (H, T_q) if layout.packed else (*batch, H, T_q)
        upstream = torch.randn(*batch, T_q, H, case["D"], device=device), torch.randn(lse_shape, device=device)

        def ours(q, k, v, slopes=None, sinks=None):
            bounds = {}
            if layout.packed:
                bounds = {"cu_seqlens_q": boundaries(layout.q, device), "cu_seqlens_k": boundaries(layout.k, device)}
            return attention(
                q, k, v, causal=causal, scale=scale, window=window, softcap=case["softcap"], alibi_slopes=slopes,
                sinks=sinks, dropout_p=case["dropout_p"], seed=seed, return_lse=True, backend="triton", **bounds,
            )  # fmt: skip

        def theirs(q, k, v, slopes=None, sinks=None):
            return composed_layout(layout, q, k, v, options, slopes, sinks, seed)

        roads = ((ours, case["dtype"]), (theirs, case["dtype"]), (theirs, torch.float64))
        for road, (function, dtype) in enumerate(roads):
            for name, result in evaluated(function, leaves, dtype, upstream).items():
                pooled.setdefault(name, ([], [], []))[road].append(result.flatten())
    for name, three in pooled.items():
        ours, torchs, truth = map(torch.cat, three)
        # PyTorch's largest error of a handful of numbers is luck: those of float32 have a test of their own.
        if case["dtype"] != torch.float32 or len(ours) >= judged_from:
            assert_accurate(ours, torchs, truth, name)


def case_name(case: dict) -> str:
    return " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in case.items() if value)


@pytest.mark.parametrize("case", every_pair(FACTORS), ids=case_name)
def test_attention_kernels_match_float64_in_every_pair_of_options(case, kernel_device, monkeypatch):
    monkeypatch.setattr(kernels, "takes_descriptors", lambda arch, *tensors: case["descriptors"])
    check_case(case, kernel_device, draws=2 if case["dtype"] == torch.float32 else 1)


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
    pooled, failures = 0, []
    for number, case in enumerate(cases):
        monkeypatch.setattr(kernels, "takes_descriptors", lambda arch, *tensors, case=case: case["descriptors"])
        torch.manual_seed(number)
        try:
            check_case(case, torch.device("cpu"), draws=1)
        except InaccurateError:  # PyTorch's error of two numbers, those of sinks, say, is small by luck in some cases
            pooled += 1
            torch.manual_seed(number)  # so that the draw that missed is among them
            try:
                check_case(case, torch.device("cpu"), draws=DRAWS)
            except InaccurateError as missed:
                failures.append(f"{case_name(case)}: {missed}")
    record_property("cases", len(cases))
    record_property(f"judged by {DRAWS} draws", pooled)
    record_property("failed", len(failures))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("D", [1, 8, 31, 64, 80, 96, 128, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_kernels_take_every_head_dimension(D, dtype, kernel_device):
    plain = {name: values[0] for name, values in FACTORS.items()}
    case = plain | {"layout": "few", "dtype": dtype, "D": D, "Hk": 1}
    check_case(case, kernel_device, draws=12 if D == 1 else 3, scale=D**-0.5)


@pytest.mark.parametrize(("slopes", "layout"), [("heads", "few"), ("documents and heads", "few documents")])
def test_gradients_of_slopes_and_sinks_match_float64_over_many_draws(slopes, layout, kernel_device):
    plain = {name: values[0] for name, values in FACTORS.items()}
    case = plain | {"layout": layout, "dtype": torch.float32, "D": 16, "slopes": slopes, "sinks": True}
    check_case(case, kernel_device, draws=16, judged_from=1)


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
    monkeypatch.setattr(kernels, "takes_descriptors", lambda arch, *tensors: descriptors)
    lengths = (0, 35, 1, 0, 18)
    tensors = random_tensors(sum(lengths), 2, 16, device=kernel_device)
    packed = results(tensors, cu_seqlens_q=boundaries(lengths, kernel_device), **options)
    for a, b in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        alone = results([x[None, a:b] for x in tensors], **options)
        for name, one, two in zip(("out", "dq", "dk", "dv"), packed, alone, strict=True):
            assert torch.equal(one[a:b], two[0]), name


@pytest.mark.parametrize("descriptors", [False, True])
def test_packed_document_of_nan_leaves_all_others_bit_identical(descriptors, kernel_device, monkeypatch):
    monkeypatch.setattr(kernels, "takes_descriptors", lambda arch, *tensors: descriptors)
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
    call = kernels.Call(q, k, k, *bounds, None, None, None, causal, 1.0, -1, -1, 0.0, 0.0)
    tiles = call.schedule(block, over_keys).tiles_ptr.tolist()

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
        monkeypatch.setattr(kernels, "takes_descriptors", lambda arch, *tensors, wanted=descriptors: wanted)
        both.append(results(tensors, causal=True))
    assert all(map(torch.equal, *both))


def test_descriptors_are_for_aligned_tensors_on_chips_with_a_copy_engine():
    x = torch.zeros(2, 8, 3, 16, dtype=torch.bfloat16)
    assert kernels.takes_descriptors(90, x, x[:, :, 1:])
    assert kernels.takes_descriptors(100, x[0])
    refused = [x[..., 1:], x[..., :4].contiguous(), x[:1, :1].expand(2, 8, 3, 16), x[:0]]
    assert not any(kernels.takes_descriptors(90, x, other) for other in refused)
    assert not kernels.takes_descriptors(80, x)


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


def test_frozen_inputs_get_no_gradient(kernel_device):
    q, k, v, _ = random_tensors(1, 9, 2, 16, device=kernel_device)
    attention(q, k.requires_grad_(), v, backend="triton").sum().backward()
    assert q.grad is None
    assert v.grad is None
    assert k.grad is not None
    with torch.inference_mode():
        assert not attention(q, k, v, backend="triton").requires_grad


# Which code runs


@pytest.fixture
def broken_reference(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("PyTorch's code ran")

    monkeypatch.setattr(module, "attention_reference", refuse)
    monkeypatch.setattr(module, "_by_sdpa", refuse)


@pytest.mark.usefixtures("broken_reference")
def test_auto_runs_the_kernels_where_kernels_run(kernel_device):
    attention(*random_tensors(1, 9, 2, 16, device=kernel_device)[:3])


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
    expected, _ = module.attention_reference(q, k, v, Options(True, scale, -1, -1, 0.0, 0.0))
    torch.testing.assert_close(attention(q, k, v, causal=True, scale=scale), expected)
    with pytest.raises(ValueError, match=reason):
        attention(q, k, v, causal=True, scale=scale, backend="triton")


def test_attention_kernels_leave_torch_func_to_torch(kernel_device):
    q, k, v, _ = random_tensors(3, 1, 9, 2, 16, device=kernel_device)
    batched = torch.func.vmap(attention)(q, k, v)
    assert_accurate(
        batched[1], attention(q[1], k[1], v[1], backend="torch"), attention(q[1].double(), k[1].double(), v[1].double())
    )
