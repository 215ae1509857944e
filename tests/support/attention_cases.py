"""Calls of attention in which options meet, and what plain PyTorch makes of them."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.ops._dropout import uniform
from fastlm.ops.attention import attention
from fastlm.ops.attention_reference import Options
from tests.support.accuracy import assert_accurate

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
        kept[..., :Tk] *= (drawn >= options.dropout_p).to(q.dtype) / (1 - options.dropout_p)
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


def check_case(
    case: dict, device: torch.device, backend: str, draws: int = 1, scale: float = 0.15, judged_from: int = 64
) -> None:
    """A backend's results in one case of FACTORS against those of composed, over a few draws."""
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
                sinks=sinks, dropout_p=case["dropout_p"], seed=seed, return_lse=True, backend=backend, **bounds,
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
