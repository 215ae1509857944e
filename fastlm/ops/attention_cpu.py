"""Varlen attention on a CPU: in C++, or by ATen's fused kernel for the sequences that it computes faster.

All of this reads cu_seqlens on the host. What neither supports, such as float64 with options, runs the reference.
"""

import itertools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import _dispatch, _library, attention_launch
from fastlm.ops._dispatch import CPP
from fastlm.ops._library import as_floats
from fastlm.ops.attention_reference import (
    Call,
    Inputs,
    Options,
    attention_backward_reference,
    attention_reference,
    has_plain_scores,
)


class SeqGroup(NamedTuple):
    """Consecutive sequences of equal lengths, which one dense call attends to without a copy."""

    first: int  # index of the first sequence
    size: int
    q_start: int
    q_length: int
    k_start: int
    k_length: int

    def queries(self, x: Tensor) -> Tensor:
        """(size, q_length, H, D) view of these sequences in x (total, H, D)."""
        return x.narrow(0, self.q_start, self.size * self.q_length).view(self.size, self.q_length, *x.shape[1:])

    def keys(self, x: Tensor) -> Tensor:
        return x.narrow(0, self.k_start, self.size * self.k_length).view(self.size, self.k_length, *x.shape[1:])

    def dense(self, inputs: Inputs) -> Inputs:
        """These sequences as a batch. Slopes are one per head, or one per sequence and head."""
        slopes = inputs.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[self.first : self.first + self.size]
        heads = self.queries(inputs.q), self.keys(inputs.k), self.keys(inputs.v)
        return Inputs(*heads, alibi_slopes=slopes, sinks=inputs.sinks, seed=inputs.seed)


def equal_length_groups(inputs: Inputs, longer_than: int = 0) -> Iterator[SeqGroup]:
    """The sequences that have a query and are longer than this, neighbours of equal lengths together."""
    q_bounds, k_bounds = checked_boundaries(inputs)
    lengths = [list(map(operator.sub, bounds[1:], bounds)) for bounds in (q_bounds, k_bounds)]
    if max((*lengths[0], *lengths[1]), default=0) <= longer_than:
        return
    first = 0
    for (q_length, k_length), equal in itertools.groupby(zip(*lengths, strict=True)):
        size = sum(1 for _ in equal)
        if q_length and max(q_length, k_length) > longer_than:
            yield SeqGroup(first, size, q_bounds[first], q_length, k_bounds[first], k_length)
        first += size


def checked_boundaries(inputs: Inputs) -> tuple[list[int], list[int]]:
    """Those of the queries and of the keys, once they are known to be boundaries."""
    cu_seqlens_q, cu_seqlens_k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    assert cu_seqlens_q is not None, "only varlen attention has boundaries"
    q_bounds = boundaries("q", inputs.q, "cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is not None:
        k_bounds = boundaries("k", inputs.k, "cu_seqlens_k", cu_seqlens_k)
    elif len(inputs.k) == len(inputs.q):
        k_bounds = q_bounds
    else:
        shared = "cu_seqlens_q, which is also cu_seqlens_k when that is None,"
        k_bounds = boundaries("k", inputs.k, shared, cu_seqlens_q)
    if len(q_bounds) != len(k_bounds):
        counts = f"{len(q_bounds) - 1} sequences in cu_seqlens_q, {len(k_bounds) - 1} in cu_seqlens_k"
        raise ValueError(f"attention: {counts}; both must have the same number")
    return q_bounds, k_bounds


def boundaries(name: str, x: Tensor, source: str, cu_seqlens: Tensor) -> list[int]:
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] > len(x) or bounds != sorted(bounds):
        shown = f"[{', '.join(map(str, bounds[:8]))}{', ...' if len(bounds) > 8 else ''}]"
        raise ValueError(
            f"attention: {source} must rise from 0 to at most the {len(x)} tokens of {name}, got {shown};"
            " from lengths compute F.pad(lengths.cumsum(0), (1, 0))"
        )
    return bounds


def check_boundaries(inputs: Inputs) -> None:
    """Only on a CPU, where reading them costs nothing. On a GPU no boundaries make the kernels leave the tensors."""
    if inputs.cu_seqlens_q is not None and inputs.q.is_cpu:
        checked_boundaries(inputs)


def is_supported_by_aten(call: Call, dlse: Tensor | None = None) -> bool:
    """Whether ATen's CPU flash kernel computes this call."""
    is_plain = has_plain_scores(call.inputs, call.options) and dlse is None
    return is_plain and call.inputs.q.is_cpu and not call.float32_lse


def is_aligned(group: SeqGroup, options: Options) -> bool:
    """Whether ATen's causal mask, which is aligned at the start, is the mask of these sequences."""
    return group.k_length > 0 and (not options.causal or group.q_length in (1, group.k_length))


def calls_and_groups(call: Call, by_aten: bool) -> tuple[list[list[Any]], list[SeqGroup]]:
    """(arguments of each call of our C++, the groups for ATen's kernel or the reference). Checks the boundaries.

    One C++ call takes all sequences up to a length. Of the longer ones, it takes each group that is not aligned.
    """
    inputs, options = call.inputs, call.options
    if call.implementation != CPP or not _library.is_loaded("cpu"):  # an exported program may be loaded without it
        return [], list(equal_length_groups(inputs))
    longest = _dispatch.ATTENTION_MAX_SEQLEN if by_aten else max(len(inputs.q), len(inputs.k))
    long_groups = list(equal_length_groups(inputs, longest))
    if long_groups and by_aten:
        longest = _dispatch.longest_in_cpp(options.causal, inputs.k.shape[1] * sum(group.size for group in long_groups))
        long_groups = [group for group in long_groups if max(group.q_length, group.k_length) > longest]
    calls, rest = [cpp_arguments(inputs, options, longest)], []
    for group in long_groups:
        if is_aligned(group, options):
            rest.append(group)
        else:
            calls.append(cpp_arguments(inputs, options, max(group.q_length, group.k_length), group))
    return calls, rest


def cpp_arguments(inputs: Inputs, options: Options, longest: int, group: SeqGroup | None = None) -> list[Any]:
    """Arguments of a C++ call for the sequences up to the longest, of all or of a group."""
    bounds_of_call = slice(None) if group is None else slice(group.first, group.first + group.size + 1)
    bounds_q, bounds_k = inputs.bounds
    is_shared = bounds_k is bounds_q
    bounds_q = bounds_q[bounds_of_call].to(torch.int64).contiguous()
    bounds_k = bounds_q if is_shared else bounds_k[bounds_of_call].to(torch.int64).contiguous()
    slopes = inputs.alibi_slopes
    if slopes is not None:
        slopes = slopes.float().expand(len(bounds_q) - 1, -1).contiguous()
    window_right = 0 if options.causal else options.right
    scoring = options.scale, options.left, window_right, options.softcap, options.dropout_p
    return [*inputs[:3], bounds_q, bounds_k, longest, slopes, as_floats(inputs.sinks), inputs.seed, *scoring]


def varlen_forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out (total, H, D), lse (H, total))."""
    inputs, options = call.inputs, call.options
    out, lse = attention_launch.forward_outputs(inputs.q)
    by_aten = is_supported_by_aten(call)
    calls, rest = calls_and_groups(call, by_aten)
    for arguments in calls:
        torch.ops.fastlm.attention_varlen(*arguments, out, lse)
    for group in rest:
        if by_aten and is_aligned(group, options):
            group_out, group_lse = aten_forward(group.dense(inputs), options)
        else:
            group_out, group_lse = attention_reference(group.dense(inputs), options, group.first)
        group.queries(out).copy_(group_out)
        group.queries(lse.T).copy_(group_lse.transpose(1, 2))
    end = int(inputs.bounds[0][-1])
    if end < len(out):  # what follows is in no sequence
        out[end:] = 0
        lse[:, end:] = -torch.inf
    return out, lse


def aten_forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), lse (B, H, T)) by ATen's CPU flash kernel."""
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, options.causal and inputs.q.shape[1] > 1, scale=options.scale
    )
    return out.transpose(1, 2), lse


def aten_backward(dout: Tensor, inputs: Inputs, options: Options, out: Tensor, lse: Tensor) -> list[Tensor]:
    """[dq, dk, dv] (B, T, H, D) by ATen's CPU flash kernel; lse is (B, H, T)."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, *inputs[:3], out))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, options.causal and inputs.q.shape[1] > 1, scale=options.scale
    )
    return [x.transpose(1, 2) for x in gradients]


def fill_varlen_gradients(
    gradients: tuple[Tensor, ...],
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    call: Call,
) -> None:
    """Writes the gradients of q, k and v, of the slopes and of the sinks into tensors of their shapes."""
    dq, dk, dv, dslopes, dsinks = gradients
    inputs, options = call.inputs, call.options
    of_keys = () if inputs.cu_seqlens_k is None else (dk, dv)  # keys of no query are in no group
    for gradient in (dslopes, dsinks, *of_keys):
        if gradient.numel():
            gradient.zero_()
    by_aten = is_supported_by_aten(call, dlse)
    calls, rest = calls_and_groups(call, by_aten)
    dlse = None if dlse is None else dlse.contiguous()
    fill_gradients_in_cpp(gradients, dout, dlse, lse, inputs, calls)
    for group in rest:
        if by_aten and is_aligned(group, options):
            group_lse = group.queries(lse.T).transpose(1, 2)
            group_gradients = aten_backward(
                group.queries(dout), group.dense(inputs), options, group.queries(out), group_lse
            )
        else:
            group_dlse = None if dlse is None else group.queries(dlse.T).transpose(1, 2)
            *group_gradients, group_dslopes, group_dsinks = attention_backward_reference(
                group.queries(dout), group_dlse, group.dense(inputs), options, group.first
            )
            if inputs.alibi_slopes is not None and inputs.alibi_slopes.dim() == 1:
                dslopes.add_(group_dslopes.sum(0))
            elif inputs.alibi_slopes is not None:
                dslopes[group.first : group.first + group.size] = group_dslopes
            if inputs.sinks is not None:
                dsinks.add_(group_dsinks)
        views = group.queries(dq), group.keys(dk), group.keys(dv)
        for view, gradient in zip(views, group_gradients, strict=True):
            view.copy_(gradient)
    end = int(inputs.bounds[0][-1])
    for gradient in (dq,) if of_keys else (dq, dk, dv):
        if end < len(gradient):
            gradient[end:] = 0


def fill_gradients_in_cpp(
    gradients: tuple[Tensor, ...],
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    inputs: Inputs,
    calls: list[list[Any]],
) -> None:
    """Of the sequences that these C++ calls take; the slopes' and sinks' are summed here from a part of each row."""
    dq, dk, dv, dslopes, dsinks = gradients
    slopes, sinks = inputs.alibi_slopes, inputs.sinks
    delta, dslope_partial = (torch.zeros_like(lse) if calls and x is not None else None for x in (sinks, slopes))
    for arguments in calls:
        torch.ops.fastlm.attention_varlen_backward(dout, dlse, lse, *arguments, delta, dslope_partial, dq, dk, dv)
    if sinks is not None and delta is not None:
        dsinks.copy_(attention_launch.sink_gradient(sinks, lse, delta))
    if dslope_partial is not None:
        dslopes.copy_(slope_gradient(inputs, dslope_partial).sum_to_size(dslopes.shape))


def slope_gradient(inputs: Inputs, dslope_partial: Tensor) -> Tensor:
    """The rows' parts (H, total), summed for each sequence: (num_seqs, H) in float64."""
    lengths = inputs.bounds[0].diff()
    seq_of_row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    sums = dslope_partial.new_zeros((len(lengths), len(dslope_partial)), dtype=torch.float64)
    return sums.index_add_(0, seq_of_row, dslope_partial.T[: len(seq_of_row)].double())


def varlen_reference(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """The same in differentiable PyTorch, for second derivatives: (out (total, H, D), lse (H, total))."""
    q = inputs.q
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    out = q.masked_fill(everywhere, 0.0)  # made from q, so that it has a gradient even if no sequence has a query
    lse = out.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32)) - torch.inf
    for group in equal_length_groups(inputs):
        group_out, group_lse = attention_reference(group.dense(inputs), options, group.first)
        rows = group.q_start, group.q_start + group.size * group.q_length
        out = out.slice_scatter(group_out.flatten(0, 1), 0, *rows)
        lse = lse.slice_scatter(group_lse.transpose(1, 2).flatten(0, 1), 0, *rows)
    return out, lse.T
