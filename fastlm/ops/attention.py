"""Scaled dot product attention, dense (B, T, H, D) or packed: documents end to end as (total, H, D) with cu_seqlens.

    s_ij = softcap(scale * q_i . k_j) - slope * |i - j|          for the keys j that query i may see
    lse_i = log(sum_j exp(s_ij) + exp(sink))                     sink: one logit per head that has no value
    o_i = sum_j exp(s_ij - lse_i) v_j                            0, and lse -inf, where a query sees no key

Gradient, with p_ij = exp(s_ij - lse_i) and delta_i = o_i . do_i:  dv_j = sum_i p_ij do_i  and
ds_ij = p_ij (do_i . v_j - delta_i + dlse_i), so q, k, v, o and lse are saved, never p.

Positions are aligned at the end: query i of Tq stands at key position i + Tk - Tq. A packed call costs the sum of the
squared document lengths, never the square of the total.
Source: Dao et al. 2022, arXiv 2205.14135; ALiBi: Press et al. 2021, arXiv 2108.12409.
"""

import importlib
import importlib.util
import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fastlm.ops import attention_triton as kernels
from fastlm.ops._dropout import uniform
from fastlm.ops._library import as_floats, has_attention
from fastlm.ops._triton import DTYPES, is_ordinary, runs_kernels

UNLIMITED = -1
torch_sdpa = F.scaled_dot_product_attention  # kept here, so that ours may be put in its place
BACKENDS = ("auto", "triton", "torch", "flash_attn")
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


class Options(NamedTuple):
    """What one attention call computes beside its tensors, in the order of the raw ops' arguments."""

    causal: bool
    scale: float
    left: int  # keys further back are hidden; UNLIMITED for none
    right: int
    softcap: float  # 0 for none
    dropout_p: float

    @property
    def plain(self) -> bool:
        """True if nothing but causality shapes the scores, which is what PyTorch's fused kernels compute."""
        return (self.left, self.right, self.softcap, self.dropout_p) == (UNLIMITED, UNLIMITED, 0.0, 0.0)


# Reference


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seed: Tensor | None = None,
    first_document: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out (B, Tq, H, D) in q's dtype, lse (B, H, Tq)) of dense attention, computed in float32 or wider."""
    scores, _, _ = _scores(q, k, options, alibi_slopes)
    p, lse = _softmax_and_lse(scores, sinks)
    p = p[..., :-1] * _dropout_factor(seed, options, scores, first_document)
    return torch.einsum("bhij,bjhd->bihd", p, _as_query_heads(v, q)).to(q.dtype), lse


def attention_backward_reference(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    first_document: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v (B, T, H or Hk, D), the slopes (B, H) and the sinks (H,), in float32 or wider."""
    scores, capped, distance = _scores(q, k, options, alibi_slopes)
    p, _ = _softmax_and_lse(scores, sinks)
    dropout = _dropout_factor(seed, options, scores, first_document)
    dout, Hk = dout.to(p.dtype), k.shape[2]
    dv = torch.einsum("bhij,bihd->bjhd", p[..., :-1] * dropout, dout)
    dp = torch.einsum("bihd,bjhd->bhij", dout, _as_query_heads(v, q)) * dropout
    delta = (p[..., :-1] * dp).sum(-1, keepdim=True)
    shift = delta if dlse is None else delta - dlse[..., None]
    ds, dsink = p[..., :-1] * (dp - shift), p[..., -1:] * -shift
    dslopes = -(ds * distance.abs()).sum((-1, -2))
    if options.softcap:
        ds = ds * (1 - (capped / options.softcap).square())
    ds = ds * options.scale
    dq = torch.einsum("bhij,bjhd->bihd", ds, _as_query_heads(k, q))
    dk = torch.einsum("bhij,bihd->bjhd", ds, q.to(ds.dtype))
    dk, dv = (x.unflatten(2, (Hk, -1)).sum(3) for x in (dk, dv))
    return dq, dk, dv, dslopes, dsink.sum((0, 2, 3))


def _scores(q: Tensor, k: Tensor, options: Options, alibi_slopes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(scores (B, H, Tq, Tk), -inf where a key is hidden; scores before slopes and mask; query minus key position)."""
    Tq, Tk, H = q.shape[1], k.shape[1], q.shape[2]
    keys = _as_query_heads(k, q)
    capped = torch.einsum("bihd,bjhd->bhij", q.to(keys.dtype), keys) * options.scale
    if options.softcap:
        capped = options.softcap * torch.tanh(capped / options.softcap)
    distance = torch.arange(Tq, device=q.device)[:, None] + (Tk - Tq) - torch.arange(Tk, device=q.device)  # (Tq, Tk)
    scores = capped
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(keys.dtype).view(-1, H, 1, 1) * distance.abs()
    return scores.masked_fill(~_visible(distance, options), -math.inf), capped, distance


def _as_query_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values in float32 or wider, repeated for the query heads that share them."""
    return x.to(torch.promote_types(q.dtype, torch.float32)).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _visible(distance: Tensor, options: Options) -> Tensor:
    """Which keys a query sees, from query position minus key position."""
    right = 0 if options.causal else options.right
    visible = torch.ones_like(distance, dtype=torch.bool)
    if right != UNLIMITED:
        visible = visible & (distance >= -right)
    if options.left != UNLIMITED:
        visible = visible & (distance <= options.left)
    return visible


def _softmax_and_lse(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(probabilities (B, H, Tq, Tk + 1), the last column the sink's; lse (B, H, Tq)).

    Without a sink its logit is -inf. A row of nothing but -inf gives 0 and -inf, and gradients of 0.
    """
    B, H, Tq, _ = scores.shape
    sink = scores.new_full((1,), -math.inf) if sinks is None else sinks.to(scores.dtype)
    scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(B, H, Tq, 1)], dim=-1)
    largest = scores.detach().amax(-1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)  # without this the gradient of an empty row is 0 * inf
    lse = torch.where(empty, -math.inf, torch.log(total) + largest)
    return weights / total, lse.squeeze(-1)


def _dropout_factor(seed: Tensor | None, options: Options, scores: Tensor, first_document: int) -> Tensor | float:
    """0 or 1 / (1 - dropout_p) for every probability: a pure function of seed, document, head, query and key."""
    if seed is None:
        return 1.0
    B, H, Tq, Tk = scores.shape
    document, head, query, keys = (
        torch.arange(size, device=scores.device).view([-1 if dim == i else 1 for i in range(4)])
        for dim, size in enumerate((B, H, Tq, -(-Tk // 4)))
    )
    drawn = uniform(seed, keys, query, head, document + first_document)[..., :Tk]
    return (drawn >= options.dropout_p) / (1 - options.dropout_p)


# Packed documents on a CPU, by compiled code or PyTorch's, which read cu_seqlens on the host


SHORT = 512  # tokens of a document up to which our compiled code serves plain scores, and not PyTorch's fused kernel
FEW = 1 << 22  # multiplications of q and k below which the price of our call exceeds what it saves of a dense batch


class Run(NamedTuple):
    """Consecutive documents of equal lengths, attended in one call where they lie."""

    first: int  # index of the first document
    size: int
    q_start: int
    q_length: int
    k_start: int
    k_length: int

    def queries(self, x: Tensor) -> Tensor:
        """(size, q_length, H, D) view of these documents in x (total, H, D)."""
        return x.narrow(0, self.q_start, self.size * self.q_length).view(self.size, self.q_length, *x.shape[1:])

    def keys(self, x: Tensor) -> Tensor:
        return x.narrow(0, self.k_start, self.size * self.k_length).view(self.size, self.k_length, *x.shape[1:])

    def of_slopes(self, slopes: Tensor | None) -> Tensor | None:
        """Slopes are one per head, or one per document and head."""
        return slopes if slopes is None or slopes.dim() == 1 else slopes[self.first : self.first + self.size]


def _runs(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, served: int = 0) -> Iterator[Run]:
    """The documents that have a query and are longer than what is served, neighbours of equal lengths together."""
    q_bounds = _boundaries("q", q, cu_seqlens_q, "cu_seqlens_q")
    if cu_seqlens_k is None:
        k_bounds = _boundaries("k", k, cu_seqlens_q, "cu_seqlens_q, which stands for the cu_seqlens_k not given,")
    else:
        k_bounds = _boundaries("k", k, cu_seqlens_k, "cu_seqlens_k")
    if len(q_bounds) != len(k_bounds):
        counts = f"{len(q_bounds) - 1} documents in cu_seqlens_q, {len(k_bounds) - 1} in cu_seqlens_k"
        raise ValueError(f"attention: {counts}; they must be as many")
    lengths = (map(operator.sub, bounds[1:], bounds) for bounds in (q_bounds, k_bounds))
    first = 0
    for (q_length, k_length), equal in itertools.groupby(zip(*lengths, strict=True)):
        size = sum(1 for _ in equal)
        if q_length and max(q_length, k_length) > served:
            yield Run(first, size, q_bounds[first], q_length, k_bounds[first], k_length)
        first += size


def _boundaries(name: str, x: Tensor, cu_seqlens: Tensor, source: str) -> list[int]:
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] > len(x) or bounds != sorted(bounds):
        shown = f"[{', '.join(map(str, bounds[:8]))}{', ...' if len(bounds) > 8 else ''}]"
        raise ValueError(
            f"attention: {source} must rise from 0 to at most the {len(x)} tokens of {name}, got {shown};"
            " of lengths give F.pad(lengths.cumsum(0), (1, 0))"
        )
    return bounds


def _check_boundaries_on_host(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    """Where reading them costs nothing. On a GPU the kernels keep within the tensors, whatever the boundaries."""
    if cu_seqlens_q is not None and q.is_cpu:
        for _ in _runs(q, k, cu_seqlens_q, cu_seqlens_k):
            pass


def _is_plain(q: Tensor, options: Options, *extras: Tensor | None) -> bool:
    """True if ATen's CPU flash kernel computes such scores."""
    return q.is_cpu and options.plain and options.scale > 0 and all(x is None for x in extras)


def _is_aligned(run: Run, options: Options) -> bool:
    """True if that kernel's causal mask, which is aligned at the start, is these documents' mask."""
    return run.k_length > 0 and (not options.causal or run.q_length in (1, run.k_length))


def _shares(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, options: Options, plain: bool
) -> tuple[int, list[Run]]:
    """(the longest document that our compiled code takes, the runs that PyTorch's takes). Checks the boundaries."""
    if not has_attention(q):
        return 0, list(_runs(q, k, cu_seqlens_q, cu_seqlens_k))
    long = list(_runs(q, k, cu_seqlens_q, cu_seqlens_k, SHORT))
    if plain and all(_is_aligned(run, options) for run in long):
        return SHORT, long
    return max(len(q), len(k)), []


def _compiled_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    longest: int,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> list[Any]:
    """What the compiled code takes for documents up to the longest."""
    bounds = [
        x.to(torch.int64).contiguous() for x in (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)
    ]
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.float().expand(len(cu_seqlens_q) - 1, -1).contiguous()
    windows = (min(side, max(len(q), len(k))) for side in (options.left, 0 if options.causal else options.right))
    rest = options.scale, *windows, options.softcap, options.dropout_p
    return [q, k, v, *bounds, longest, alibi_slopes, as_floats(sinks), seed, *rest]


def _packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    out, lse = kernels.forward_outputs(q)
    plain = _is_plain(q, options, alibi_slopes, sinks)
    longest, runs = _shares(q, k, cu_seqlens_q, cu_seqlens_k, options, plain)
    if longest:
        torch.ops.fastlm.attention_of_documents(
            *_compiled_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, alibi_slopes, sinks, seed, options),
            out,
            lse,
        )
    for run in runs:
        heads = run.queries(q), run.keys(k), run.keys(v)
        if plain and _is_aligned(run, options):
            run_out, run_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(x.transpose(1, 2) for x in heads), 0.0, options.causal and run.q_length > 1, scale=options.scale
            )
            run_out = run_out.transpose(1, 2)
        else:
            slopes = run.of_slopes(alibi_slopes)
            run_out, run_lse = attention_reference(*heads, options, slopes, sinks, seed, run.first)
        run.queries(out).copy_(run_out)
        run.queries(lse.T).copy_(run_lse.transpose(1, 2))
    end = int(cu_seqlens_q[-1])  # what follows is in no document
    out[end:] = 0
    lse[:, end:] = -math.inf
    return out, lse


def _fill_packed_gradients(
    gradients: tuple[Tensor, ...],
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> None:
    dq, dk, dv, dslopes, dsinks = gradients
    for gradient in (dslopes, dsinks) if cu_seqlens_k is None else gradients:  # keys of no query are in no run
        gradient.zero_()
    plain = _is_plain(q, options, alibi_slopes, sinks, dlse)
    longest, runs = _shares(q, k, cu_seqlens_q, cu_seqlens_k, options, plain)
    if longest:
        delta, shares = (None if x is None else torch.zeros_like(lse) for x in (sinks, alibi_slopes))
        torch.ops.fastlm.attention_of_documents_backward(
            dout,
            None if dlse is None else dlse.contiguous(),
            lse,
            *_compiled_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, alibi_slopes, sinks, seed, options),
            delta,
            shares,
            dq,
            dk,
            dv,
        )
        if sinks is not None and delta is not None:
            dsinks.copy_(kernels.sink_gradient(sinks, lse, delta))
        if shares is not None:
            dslopes.copy_(_slope_gradient(shares, cu_seqlens_q).sum_to_size(dslopes.shape))
    for run in runs:
        heads = run.queries(q), run.keys(k), run.keys(v)
        if plain and _is_aligned(run, options):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x.transpose(1, 2) for x in (run.queries(dout), *heads, run.queries(out))),
                run.queries(lse.T).transpose(1, 2),
                0.0,
                options.causal and run.q_length > 1,
                scale=options.scale,
            )
            parts = [x.transpose(1, 2) for x in parts]
        else:
            run_dlse = None if dlse is None else run.queries(dlse.T).transpose(1, 2)
            slopes = run.of_slopes(alibi_slopes)
            *parts, run_dslopes, run_dsinks = attention_backward_reference(
                run.queries(dout), run_dlse, *heads, options, slopes, sinks, seed, run.first
            )
            if alibi_slopes is not None and alibi_slopes.dim() == 1:
                dslopes.add_(run_dslopes.sum(0))
            elif alibi_slopes is not None:
                dslopes[run.first : run.first + run.size] = run_dslopes
            if sinks is not None:
                dsinks.add_(run_dsinks)
        for place, part in zip((run.queries(dq), run.keys(dk), run.keys(dv)), parts, strict=True):
            place.copy_(part)
    for gradient in (dq, dk, dv) if cu_seqlens_k is None else ():
        gradient[int(cu_seqlens_q[-1]) :] = 0


def _slope_gradient(shares: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """The rows' shares (H, total), summed up for each document: (documents, H) in float64."""
    lengths = cu_seqlens_q.diff()
    documents = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = shares.new_zeros((len(lengths), len(shares)), dtype=torch.float64)
    return sums.index_add_(0, documents, shares.T[: len(documents)].double())


def _packed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The same in differentiable PyTorch, for second derivatives: (out (total, H, D), lse (H, total))."""
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for run in _runs(q, k, cu_seqlens_q, cu_seqlens_k):
        heads = run.queries(q), run.keys(k), run.keys(v)
        run_out, run_lse = attention_reference(*heads, options, run.of_slopes(slopes), sinks, seed, run.first)
        rows = slice(run.q_start, run.q_start + run.size * run.q_length)
        out = out.slice_scatter(run_out.flatten(0, 1), 0, rows.start, rows.stop)
        lse = lse.slice_scatter(run_lse.transpose(1, 2).flatten(0, 1), 0, rows.start, rows.stop)
    return out, lse.T


# The raw ops, dense and packed: the kernels, or PyTorch's code


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    by_kernels: bool,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    q, k, v = map(_with_adjacent_features, (q, k, v))
    if by_kernels:
        _check_boundaries_on_host(q, k, cu_seqlens_q, cu_seqlens_k)
        return kernels.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, *options)
    if cu_seqlens_q is None:
        return attention_reference(q, k, v, Options(*options), alibi_slopes, sinks, seed)
    return _packed_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, Options(*options))


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    by_kernels: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dout, q, k, v = map(_with_adjacent_features, (dout, q, k, v))
    tensors = q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed
    if by_kernels:
        dq, dk, dv, dslopes, dsinks = kernels.backward(dout, dlse, out, lse, *tensors, *options)
        absent = q.new_empty((0,))
        return dq, dk, dv, absent if dslopes is None else dslopes, absent if dsinks is None else dsinks
    gradients = _empty_gradients(dout, dlse, out, lse, *tensors)
    if cu_seqlens_q is None:
        found = attention_backward_reference(
            dout, dlse, q, k, v, Options(*options), alibi_slopes, sinks, seed, first_document=0
        )
        for gradient, part in zip(gradients, found, strict=True):
            gradient.copy_(part.sum_to_size(gradient.shape) if gradient.numel() else gradient)
        return gradients
    _fill_packed_gradients(
        gradients, dout, dlse, out, lse, q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed,
        Options(*options),
    )  # fmt: skip
    return gradients


def _with_adjacent_features(x: Tensor) -> Tensor:
    """x with a last stride of 1: the kernels and ATen's CPU flash kernel take that for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return kernels.forward_outputs(q)


def _empty_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients; an absent tensor's has no elements."""
    absent = [q.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in (alibi_slopes, sinks)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), absent[0], absent[1]


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
_OPTIONS = "bool by_kernels, bool causal, float scale, int left, int right, float softcap, float dropout_p"
_library = torch.library.Library("fastlm", "FRAGMENT")
_library.define(f"attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_TENSORS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _device)
    _library.impl("attention_backward", _backward, _device)
torch.library.register_fake("fastlm::attention", _empty_outputs)
torch.library.register_fake("fastlm::attention_backward", _empty_gradients)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.fastlm.attention(*arguments)
        ctx.set_materialize_grads(False)  # a gradient of lse that nobody took must not cost the fused kernel
        ctx.options = arguments[8:]
        ctx.save_for_backward(out, lse, *arguments[:8])
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing hands them out once
        out, _lse, q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, sinks, seed = saved
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            options = Options(*ctx.options[1:])
            results = _reference(q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, sinks, seed, options)
            found = _gradients(results, [q, k, v, slopes, sinks], (dout, dlse), create_graph=True)
        else:
            dout = torch.zeros_like(out) if dout is None else dout
            found = torch.ops.fastlm.attention_backward(dout, dlse, *saved, *ctx.options)
        dq, dk, dv, dslopes, dsinks = found
        dslopes = None if slopes is None else dslopes
        dsinks = None if sinks is None else dsinks
        return dq, dk, dv, None, None, dslopes, dsinks, None, *(None for _ in ctx.options)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The raw op in differentiable PyTorch."""
    if cu_seqlens_q is None:
        return attention_reference(q, k, v, options, slopes, sinks, seed)
    return _packed_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, sinks, seed, options)


def _gradients(
    results: tuple[Tensor, Tensor],
    inputs: list[Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None],
    create_graph: bool,
) -> list[Tensor | None]:
    pairs = [(result, grad) for result, grad in zip(results, upstream, strict=True) if grad is not None]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


# Which code serves a call


def _kernels_refuse(q: Tensor, k: Tensor, v: Tensor, options: Options, *others: Tensor | None) -> str | None:
    """Why the Triton kernels do not serve a call, or None."""
    if not kernels.HAS_TRITON:
        return "triton is not installed"
    if not runs_kernels(q):
        return f"q is on {q.device}, where kernels run only under TRITON_INTERPRET=1"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, the kernels take float32, float16 and bfloat16"
    if not 1 <= q.shape[-1] <= kernels.MAX_D:
        return f"D is {q.shape[-1]}, the kernels take 1 to {kernels.MAX_D}"
    if options.scale < kernels.MIN_SCALE and not options.softcap:
        return f"scale is {options.scale}, the kernels take positive ones"
    if not all(is_ordinary(x) for x in (q, k, v, *others) if x is not None):
        return "the kernels know nothing of tensor subclasses and torch.func"
    return None


def _flash_attn_refuses(
    q: Tensor, options: Options, sinks: Tensor | None, seed: int | Tensor | None, return_lse: bool
) -> str | None:
    """Why the flash_attn package does not serve a call, or None."""
    if not HAS_FLASH_ATTN:
        return "the flash_attn package is not installed"
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype} on {q.device}, flash_attn takes float16 and bfloat16 on a GPU"
    if q.shape[-1] > 256:
        return f"D is {q.shape[-1]}, flash_attn takes up to 256"
    if sinks is not None:
        return "flash_attn has no sinks"
    if options.dropout_p and (options.softcap or seed is not None):
        return "flash_attn draws its own dropout, and takes none with a softcap"
    if return_lse:
        return "the lse of flash_attn has no gradient"
    return None


def _backend_refusals(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: int | Tensor | None,
    return_lse: bool,
) -> dict[str, str | None]:
    """Every backend, and why it does not serve a call, or None."""
    return {
        "triton": _kernels_refuse(q, k, v, options, alibi_slopes, sinks),
        "torch": None,
        "flash_attn": _flash_attn_refuses(q, options, sinks, seed, return_lse),
    }


def _chosen_backend(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *others: Any,
) -> str:
    if backend == "auto":  # the kernels where they serve, until times taken on a GPU name other winners
        return "torch" if _kernels_refuse(q, k, v, options, alibi_slopes, sinks) else "triton"
    refusals = _backend_refusals(q, k, v, options, alibi_slopes, sinks, *others)
    if refusals[backend] is not None:
        known = "; ".join(f"{name}: {reason or 'serves this call'}" for name, reason in refusals.items())
        raise ValueError(f"attention: backend {backend!r} cannot serve this call. {known}")
    return backend


# Public function


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query to the keys it may see, densely or within the documents that cu_seqlens names.

    q             (B, Tq, H, D), or (total_q, H, D) with cu_seqlens
    k, v          (B, Tk, Hk, D), or (total_k, Hk, D); Hk divides H, and H / Hk query heads share a key head
    causal        a query sees no later key; positions are aligned at the end (bottom right)
    scale         of the products q . k; 1 / sqrt(D) when None
    window        (left, right): how many keys before and after it a query sees; None or -1 is unlimited
    softcap       scores become softcap * tanh(scores / softcap); None or 0 for none
    alibi_slopes  (H,), or (documents, H), or (B, H): scores lose slope * distance
    sinks         (H,): a logit of each head that takes probability and has no value
    dropout_p     chance of zeroing a probability, decided by seed: an int or an int64 tensor; None draws one
    cu_seqlens    int32 or int64 (documents + 1,) boundaries, rising from 0; may repeat at the end. None for k: as for q
    max_seqlen    the longest document or an upper bound of it; total when None
    backend       "auto", "triton", "torch" (PyTorch's code, on a CPU our C++ too) or "flash_attn"
    returns       out like q; with return_lse also lse, float32 (float64 of float64), (B, H, Tq) or (H, total_q),
                  differentiable

    Raises ValueError if shapes, devices or options disagree, TypeError for a dtype or type.
    """
    _check(q, k, v, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_options(causal, scale, window, softcap, dropout_p, seed, backend)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    left, right = (UNLIMITED if side is None else side for side in window or (None, None))
    if causal or right == 0:
        causal, right = True, UNLIMITED
    scale = max(1, q.shape[-1]) ** -0.5 if scale is None else float(scale)
    options = Options(causal, scale, left, right, float(softcap or 0.0), float(dropout_p))
    backend = _chosen_backend(backend, q, k, v, options, alibi_slopes, sinks, seed, return_lse)
    if backend == "flash_attn":
        return _by_flash_attn(q, k, v, options, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    by_kernels = backend == "triton"
    extras = alibi_slopes, sinks
    if cu_seqlens_q is None and not by_kernels and _runs_as_documents(q, k, v, options, return_lse, *extras):
        return _as_documents(q, k, v, options, *extras, _seed_tensor(seed, dropout_p, q.device), return_lse)
    plain = options._replace(dropout_p=0.0).plain and alibi_slopes is None and sinks is None and not return_lse
    if plain and not by_kernels:
        out = _by_sdpa(q, k, v, options, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        if out is not None:
            return out
    seed = _seed_tensor(seed, dropout_p, q.device)
    if cu_seqlens_q is None and not by_kernels:
        out, lse = attention_reference(q, k, v, options, alibi_slopes, sinks, seed)
    else:
        # The compiler refuses one tensor given twice to an autograd function, as in attention(x, x, x).
        k, v = (x.view_as(x) if x is q or x is other else x for x, other in ((k, q), (v, k)))
        cu_seqlens_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
        tensors = q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed
        out, lse = _Attention.apply(*tensors, by_kernels, *options)
    return (out, lse) if return_lse else out


def _runs_as_documents(
    q: Tensor, k: Tensor, v: Tensor, options: Options, return_lse: bool, *extras: Tensor | None
) -> bool:
    """Whether a dense call is faster by our compiled code for packed documents than by PyTorch's."""
    if not (has_attention(q) and q.numel() and k.numel() and is_ordinary(q, k, v, *extras)):
        return False
    if return_lse or not _is_plain(q, options, *extras):  # PyTorch's fused kernel does not serve these
        return True
    B, Tq, H, D = q.shape
    Tk = k.shape[1]
    return max(Tq, Tk) <= SHORT and B * H * Tq * Tk * D >= FEW


def _as_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense attention of a batch whose rows are packed documents of equal lengths."""
    bounds_q, bounds_k = (torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device) for x in (q, k))
    documents = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = _Attention.apply(*documents, bounds_q, bounds_k, alibi_slopes, sinks, seed, False, *options)
    out = out.view(q.shape)
    return (out, lse.view(-1, *q.shape[:2]).transpose(0, 1)) if return_lse else out


def _by_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    seed: int | Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Tensor | None:
    """PyTorch's own fused attention of scores that nothing but causality shapes, or None if it has none for them.

    A negative scale is none: it turns the -inf of a hidden key around, and the CPU's result is NaN.
    """
    if cu_seqlens_q is None:
        can_be_aligned = not options.causal or q.shape[1] <= k.shape[1]
        serves = can_be_aligned and k.shape[1] > 0 and options.scale > 0 and (not options.dropout_p or seed is None)
        return _dense_by_sdpa(q, k, v, options) if serves else None
    if options.dropout_p or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q or len(q), max_seqlen_k or len(k)
    sides = (UNLIMITED, 0 if options.causal else UNLIMITED)
    if q.shape[1] != k.shape[1]:  # not every torch from 2.11 on takes enable_gqa here
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, *bounds, scale=options.scale, window_size=sides)
    assert isinstance(out, Tensor), "lse was not asked for"
    return out


def _by_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Tensor:
    """The flash_attn package's own function, whose arguments and alignment are ours."""
    flash_attn = importlib.import_module("flash_attn")
    given = {
        "dropout_p": options.dropout_p,
        "softmax_scale": options.scale,
        "causal": options.causal,
        "window_size": (options.left, options.right),
        "softcap": options.softcap,
        "alibi_slopes": None if alibi_slopes is None else alibi_slopes.float(),
    }
    if cu_seqlens_q is None:
        return flash_attn.flash_attn_func(q, k, v, **given)
    bounds = [x.int() for x in (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)]
    longest = max_seqlen_q or len(q), max_seqlen_k or len(k)
    return flash_attn.flash_attn_varlen_func(q, k, v, *bounds, *longest, **given)


def _dense_by_sdpa(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """PyTorch's own fused attention; its causal flag is aligned at the start, so unequal lengths need a mask."""
    Tq, Tk = q.shape[1], k.shape[1]
    mask = None
    if options.causal and Tq not in (1, Tk):
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    out = torch_sdpa(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=options.dropout_p,
        is_causal=options.causal and Tq == Tk and Tq > 1,
        scale=options.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _seed_tensor(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed on the device, drawn from torch's generator if none was given; None if there is nothing to decide."""
    if not dropout_p:
        return None
    if isinstance(seed, Tensor):
        return seed.to(device)
    if seed is None:
        return torch.randint(2**62, (), device=device)
    return torch.tensor(seed, dtype=torch.int64, device=device)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    required = {"q": q, "k": k, "v": v}
    bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    others = {"sinks": sinks, "alibi_slopes": alibi_slopes, **bounds}
    for name, x in (required | others).items():
        if not isinstance(x, Tensor) and (x is not None or name in required):
            how = ": torch.tensor(..., dtype=torch.int32)" if name in bounds else ""
            raise TypeError(f"attention: {name} is of type {type(x).__name__}, expected a tensor{how}")
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("attention: cu_seqlens_k came without cu_seqlens_q; give both, or cu_seqlens_q alone")
    dims, names = (4, "(B, T, H, D), or (total, H, D) together with cu_seqlens_q")
    if cu_seqlens_q is not None:
        dims, names = 3, "(total, H, D) with cu_seqlens_q"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"attention: {name} has shape {tuple(x.shape)}, expected {names}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[: dims - 3] != k.shape[: dims - 3]:
        raise ValueError(f"attention: {shapes} disagree; k and v have one shape, and batch and D are those of q")
    H, Hk = q.shape[-2], k.shape[-2]
    if Hk == 0 or H % Hk:
        layout = "(total, H, D)" if dims == 3 else "(B, T, H, D); of (B, H, T, D) give x.transpose(1, 2)"
        raise ValueError(f"attention: {Hk} key heads do not divide {H} query heads in {shapes}, expected {layout}")
    if len({q.device, k.device, v.device}) > 1:
        raise ValueError(f"attention: q, k and v are on {q.device}, {k.device} and {v.device}, expected one device")
    if not q.is_floating_point() or not (q.dtype == k.dtype == v.dtype or torch.is_autocast_enabled(q.device.type)):
        raise TypeError(f"attention: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected one floating dtype")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"attention: sinks has shape {tuple(sinks.shape)}, expected ({H},), one per query head")
    for name, other in others.items():
        if other is not None and other.device != q.device:
            raise ValueError(f"attention: {name} is on {other.device}, expected {q.device}, where q is; move it there")
    for (name, x), longest in zip(bounds.items(), (max_seqlen_q, max_seqlen_k), strict=True):
        if x is not None:
            _check_bounds(name, x, longest)
    segments = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    if alibi_slopes is not None and alibi_slopes.shape not in ((H,), (segments, H)):
        expected = f"expected ({H},) or ({segments}, {H}), a row for each batch row or document"
        raise ValueError(f"attention: alibi_slopes has shape {tuple(alibi_slopes.shape)}, {expected}")


def _check_bounds(name: str, bounds: Tensor, longest: int | None) -> None:
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention: {name} is {bounds.dtype}, expected torch.int32 or torch.int64")
    if bounds.dim() != 1:
        raise ValueError(f"attention: {name} has shape {tuple(bounds.shape)}, expected (documents + 1,)")
    if longest is None:
        return
    limit = name.replace("cu_seqlens", "max_seqlen")
    if not hasattr(longest, "__index__"):
        raise TypeError(f"attention: {limit} is of type {type(longest).__name__}, expected an int")
    # On a GPU nobody waits for the boundaries.
    if bounds.is_cpu and len(bounds) > 1 and not torch.compiler.is_compiling():
        found = int(bounds.diff().max())
        if found <= longest:
            return
        raise ValueError(f"attention: {limit} is {longest}, but a document in {name} has {found} tokens")


def _check_options(
    causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    backend: str,
) -> None:
    if not isinstance(causal, int):
        raise TypeError(f"attention: causal is of type {type(causal).__name__}, expected a bool")
    numbers = {"scale": scale, "softcap": softcap, "dropout_p": dropout_p}
    for name, x in numbers.items():
        if not hasattr(x, "__float__") and (x is not None or name == "dropout_p"):
            raise TypeError(f"attention: {name} is of type {type(x).__name__}, expected a number")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"attention: scale is {scale}, expected a finite number")
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap is {softcap}, expected a finite number above 0, or 0 or None for none")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p is {dropout_p}, expected a number from 0 to below 1")
    if window is not None and not _is_window(window):
        expected = "expected (left, right): numbers of keys from 0 on, None or -1 for unlimited"
        raise ValueError(f"attention: window is {window}, {expected}")
    _check_seed(seed)
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")


def _is_window(window: object) -> bool:
    return (
        isinstance(window, tuple | list)
        and len(window) == 2
        and all(side is None or (isinstance(side, int) and side >= UNLIMITED) for side in window)
    )


def _check_seed(seed: int | Tensor | None) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            kind = f"{seed.dtype} of shape {tuple(seed.shape)}"
            raise TypeError(f"attention: seed is a tensor of {kind}, expected torch.int64 of one element")
    elif not isinstance(seed, int | None):
        raise TypeError(f"attention: seed is a {type(seed).__name__}, expected an int, a tensor or None")
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"attention: seed is {seed}, expected an int of 64 bits, from -2^63 to below 2^63")


# The same by other libraries' names


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for torch.nn.functional.scaled_dot_product_attention, by the kernels of attention where they serve.

    query       (..., H, Tq, D)
    key         (..., H, Tk, D); with enable_gqa (..., Hk, Tk, D), where Hk divides H
    value       (..., H, Tk, Dv), or (..., Hk, Tk, Dv)
    attn_mask   broadcasts to (..., H, Tq, Tk); boolean, where True keeps, or added to the scores; may have a gradient
    is_causal   hides the keys after i from query i: aligned at the start (top left), where attention aligns at the end
    returns     (..., H, Tq, Dv)

    The kernels take one (B, H, T, D) form for all three, float32, float16 or bfloat16, without attn_mask; causal only
    for Tq == Tk, where both alignments agree. All else, and every call on a plain CPU, is PyTorch's own code, results
    and errors alike.
    """
    kernels = isinstance(query, Tensor) and attn_mask is None and runs_kernels(query)
    if not kernels or not _is_attention(query, key, value, dropout_p, is_causal, enable_gqa):
        return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = attention(q, k, v, causal=is_causal, scale=scale, dropout_p=dropout_p)
    return cast(Tensor, out).transpose(1, 2)


def _is_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> bool:
    """Whether attention of these, heads and tokens exchanged, is what PyTorch's function computes."""
    for x in (query, key, value):
        if not isinstance(x, Tensor) or not is_ordinary(x) or x.dim() != 4 or x.dtype not in DTYPES:
            return False
        if not x.numel():
            return False
    (B, H, Tq, D), (B_of_key, Hk, Tk, D_of_key) = query.shape, key.shape
    return (
        key.shape == value.shape
        and (B_of_key, D_of_key) == (B, D)
        and (Hk == H or (enable_gqa and H % Hk == 0))
        and (Tq == Tk or not is_causal)
        and query.device == key.device == value.device
        and (query.dtype == key.dtype == value.dtype or torch.is_autocast_enabled(query.device.type))
        and 0 <= dropout_p < 1
    )


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash-attn 2's function of this name, argument for argument, of q (B, Tq, H, D), k and v (B, Tk, Hk, D).

    dropout_p           of the probabilities, its seed drawn from torch's generator
    window_size         (left, right): how many keys before and after its position a query sees; -1 is unlimited
    softcap             0 for none
    deterministic       makes no difference: the gradients always are
    return_attn_probs   gives (out, lse, None): lse (B, H, Tq) is float32, natural log, differentiable; there are no
                        probabilities in the third place, because none are ever stored

    Errors are those of attention, as are the alignment of causal (bottom right), the rest of the arguments and more
    dtypes than flash-attn takes.
    """
    result = attention(
        q,
        k,
        v,
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=return_attn_probs,
    )
    return (*result, None) if isinstance(result, tuple) else result


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash-attn 2's function of this name: documents end to end in q (total_q, H, D), k and v (total_k, Hk, D).

    cu_seqlens, max_seqlen   boundaries and longest documents, as in attention
    block_table              a paged cache of keys, which attention does not read: must be None

    All else is as in flash_attn_func; lse is (H, total_q). Raises ValueError for a block_table.
    """
    if block_table is not None:
        raise ValueError(
            "flash_attn_varlen_func: block_table is given, expected None: a paged cache of keys is not served; "
            "gather each document's pages into k and v"
        )
    result = attention(
        q,
        k,
        v,
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        return_lse=return_attn_probs,
    )
    return (*result, None) if isinstance(result, tuple) else result


def flash_attn_qkvpacked_func(qkv: Tensor, *options: Any, **named: Any) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_func of qkv (B, T, 3, H, D); all that follows is the same."""
    q, k, v = _unstacked("flash_attn_qkvpacked_func", qkv, "qkv", "(B, T, 3, H, D)")
    return flash_attn_func(q, k, v, *options, **named)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, *options: Any, **named: Any
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_func of q and kv (B, Tk, 2, Hk, D); all that follows is the same."""
    k, v = _unstacked("flash_attn_kvpacked_func", kv, "kv", "(B, T, 2, H, D)")
    return flash_attn_func(q, k, v, *options, **named)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *options: Any, **named: Any
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_varlen_func of qkv (total, 3, H, D), one cu_seqlens, one max_seqlen; the rest is the same."""
    q, k, v = _unstacked("flash_attn_varlen_qkvpacked_func", qkv, "qkv", "(total, 3, H, D)")
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options, **named)


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, *bounds_and_options: Any, **named: Any
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_varlen_func of q and kv (total_k, 2, Hk, D); all that follows is the same."""
    k, v = _unstacked("flash_attn_varlen_kvpacked_func", kv, "kv", "(total, 2, H, D)")
    return flash_attn_varlen_func(q, k, v, *bounds_and_options, **named)


def _unstacked(function: str, x: Tensor, name: str, layout: str) -> tuple[Tensor, ...]:
    """The tensors of a stack of this layout, in which a digit is how many there are."""
    expected = layout.strip("()").split(", ")
    if x.dim() != len(expected) or str(x.shape[-3]) != expected[-3]:
        raise ValueError(f"{function}: {name} has shape {tuple(x.shape)}, expected {layout}")
    return x.unbind(-3)
