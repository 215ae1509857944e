"""Attention in plain PyTorch, forward and backward: the formulas of fastlm/ops/attention.py, every score at once."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops._dropout import kept_factor, uniform

UNLIMITED = -1


class Inputs(NamedTuple):
    """The tensors of one attention call, in the order of the raw ops' arguments."""

    q: Tensor  # (B, Tq, H, D), or (total, H, D) with cu_seqlens
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None  # None: as for q
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None  # None for no dropout

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """cu_seqlens of the queries and of the keys."""
        assert self.cu_seqlens_q is not None, "only a varlen call has cu_seqlens"
        return self.cu_seqlens_q, self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else 1

    @property
    def num_sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1


class Options(NamedTuple):
    """The options of one attention call, in the order of the raw ops' arguments."""

    causal: bool
    scale: float
    left: int  # how many keys before its position a query sees, or UNLIMITED
    right: int  # how many after it
    softcap: float  # 0 for none
    dropout_p: float

    @property
    def window_left(self) -> int | None:
        return None if self.left < 0 else self.left

    @property
    def window_right(self) -> int | None:
        return 0 if self.causal else None if self.right < 0 else self.right

    @property
    def is_plain(self) -> bool:
        """Whether no option but causality changes the probabilities."""
        return (self.left, self.right, self.softcap, self.dropout_p) == (UNLIMITED, UNLIMITED, 0.0, 0.0)


class Call(NamedTuple):
    """One call of attention; flat() gives the arguments of the raw ops."""

    inputs: Inputs
    implementation: str  # of _dispatch.py
    float32_lse: bool  # whether lse must be as exact as float32, which ATen's kernel does not give
    options: Options

    def flat(self) -> tuple[Any, ...]:
        return *self.inputs, self.implementation, self.float32_lse, *self.options

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> "Call":
        num_inputs = len(Inputs._fields)
        implementation, float32_lse, *options = flat[num_inputs:]
        return cls(Inputs(*flat[:num_inputs]), implementation, float32_lse, Options(*options))


def has_plain_scores(inputs: Inputs, options: Options) -> bool:
    """Whether PyTorch's fused kernels compute the probabilities of this call.

    Theirs have a positive scale and at most causality. A negative scale turns the -inf of a masked key into inf, and
    their result is NaN.
    """
    return options.is_plain and options.scale > 0 and inputs.alibi_slopes is None and inputs.sinks is None


def is_misaligned(q: Tensor, k: Tensor) -> bool:
    """Whether causal attention aligned at the end, as ours, differs from that aligned at the start, as PyTorch's."""
    return q.shape[1] != 1 and q.shape[1] != k.shape[1]


def attention_reference(inputs: Inputs, options: Options, first_seq: int = 0) -> tuple[Tensor, Tensor]:
    """(out (B, Tq, H, D) in q's dtype, lse (B, H, Tq)) of dense attention, computed in float32 or wider."""
    q, sinks = inputs.q, inputs.sinks
    scores, _, _ = _scores(inputs, options)
    p, lse = _softmax_and_lse(scores, sinks)
    p = p[..., :-1] * _dropout_factor(inputs.seed, options, scores, first_seq)
    return torch.einsum("bhij,bjhd->bihd", p, _as_query_heads(inputs.v, q)).to(q.dtype), lse


def attention_backward_reference(
    dout: Tensor, dlse: Tensor | None, inputs: Inputs, options: Options, first_seq: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v (B, T, H or Hk, D), the slopes (B, H) and the sinks (H,), in float32 or wider."""
    q, k, v = inputs.q, inputs.k, inputs.v
    scores, capped, distance = _scores(inputs, options)
    p, _ = _softmax_and_lse(scores, inputs.sinks)
    dropout = _dropout_factor(inputs.seed, options, scores, first_seq)
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


def _scores(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(scores (B, H, Tq, Tk), -inf where a key is masked; scores before slopes and mask; query minus key position)."""
    q, k, slopes = inputs.q, inputs.k, inputs.alibi_slopes
    Tq, Tk, H = q.shape[1], k.shape[1], q.shape[2]
    keys = _as_query_heads(k, q)
    capped = torch.einsum("bihd,bjhd->bhij", q.to(keys.dtype), keys) * options.scale
    if options.softcap:
        capped = options.softcap * torch.tanh(capped / options.softcap)
    distance = torch.arange(Tq, device=q.device)[:, None] + (Tk - Tq) - torch.arange(Tk, device=q.device)  # (Tq, Tk)
    scores = capped
    if slopes is not None:
        scores = scores - slopes.to(keys.dtype).view(-1, H, 1, 1) * distance.abs()
    return scores.masked_fill(~_is_visible(distance, options), -math.inf), capped, distance


def _as_query_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values in float32 or wider, repeated for the query heads that share them."""
    return x.to(torch.promote_types(q.dtype, torch.float32)).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _is_visible(distance: Tensor, options: Options) -> Tensor:
    """Whether a query sees a key, from the query's position minus the key's."""
    visible = torch.ones_like(distance, dtype=torch.bool)
    if options.window_right is not None:
        visible = visible & (distance >= -options.window_right)
    if options.window_left is not None:
        visible = visible & (distance <= options.window_left)
    return visible


def _softmax_and_lse(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(probabilities (B, H, Tq, Tk + 1), the last column the sink's; lse (B, H, Tq)).

    Without a sink its logit is -inf. A row whose scores are all -inf gives 0, an lse of -inf, and gradients of 0.
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


def _dropout_factor(seed: Tensor | None, options: Options, scores: Tensor, first_seq: int) -> Tensor | float:
    """0 or 1 / (1 - dropout_p) for every probability: a pure function of seed, sequence, head, query and key."""
    if seed is None:
        return 1.0
    B, H, Tq, Tk = scores.shape
    seq, head, query, key_group = (
        torch.arange(size, device=scores.device).view([-1 if dim == i else 1 for i in range(4)])
        for dim, size in enumerate((B, H, Tq, -(-Tk // 4)))
    )
    kept = uniform(seed, key_group, query, head, seq + first_seq)[..., :Tk] >= options.dropout_p
    return kept.to(scores.dtype) * kept_factor(options.dropout_p)
