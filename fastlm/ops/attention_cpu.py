"""Attention over packed documents on a CPU: by compiled code, or where that is slower by ATen's fused kernel.

Every road here reads cu_seqlens on the host. Where neither code serves a document, as in float64 with options, the
reference does.
"""

import itertools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import _dispatch, attention_launch
from fastlm.ops._dispatch import CPP
from fastlm.ops._library import as_floats
from fastlm.ops.attention_reference import Call, Inputs, Options, attention_backward_reference, attention_reference


class SeqGroup(NamedTuple):
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

    def dense(self, inputs: Inputs) -> Inputs:
        """These documents as a batch. Slopes are one per head, or one per document and head."""
        slopes = inputs.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[self.first : self.first + self.size]
        heads = self.queries(inputs.q), self.keys(inputs.k), self.keys(inputs.v)
        return Inputs(*heads, alibi_slopes=slopes, sinks=inputs.sinks, seed=inputs.seed)


def equal_length_groups(inputs: Inputs, served: int = 0) -> Iterator[SeqGroup]:
    """The documents that have a query and are longer than what is served, neighbours of equal lengths together."""
    stand_in = "cu_seqlens_q, which stands for the cu_seqlens_k not given,"
    cu_seqlens_q, cu_seqlens_k = inputs.bounds
    q_bounds = boundaries("q", inputs.q, "cu_seqlens_q", cu_seqlens_q)
    k_bounds = boundaries("k", inputs.k, stand_in if inputs.cu_seqlens_k is None else "cu_seqlens_k", cu_seqlens_k)
    if len(q_bounds) != len(k_bounds):
        counts = f"{len(q_bounds) - 1} documents in cu_seqlens_q, {len(k_bounds) - 1} in cu_seqlens_k"
        raise ValueError(f"attention: {counts}; they must be as many")
    lengths = (map(operator.sub, bounds[1:], bounds) for bounds in (q_bounds, k_bounds))
    first = 0
    for (q_length, k_length), equal in itertools.groupby(zip(*lengths, strict=True)):
        size = sum(1 for _ in equal)
        if q_length and max(q_length, k_length) > served:
            yield SeqGroup(first, size, q_bounds[first], q_length, k_bounds[first], k_length)
        first += size


def boundaries(name: str, x: Tensor, source: str, cu_seqlens: Tensor) -> list[int]:
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] > len(x) or bounds != sorted(bounds):
        shown = f"[{', '.join(map(str, bounds[:8]))}{', ...' if len(bounds) > 8 else ''}]"
        raise ValueError(
            f"attention: {source} must rise from 0 to at most the {len(x)} tokens of {name}, got {shown};"
            " of lengths give F.pad(lengths.cumsum(0), (1, 0))"
        )
    return bounds


def check_boundaries(inputs: Inputs) -> None:
    """Where reading them costs nothing. On a GPU the kernels keep within the tensors, whatever the boundaries."""
    if inputs.cu_seqlens_q is not None and inputs.q.is_cpu:
        for _ in equal_length_groups(inputs):
            pass


def is_supported_by_aten(call: Call, dlse: Tensor | None = None) -> bool:
    """Whether ATen's CPU flash kernel computes this call."""
    inputs, options = call.inputs, call.options
    extras = inputs.alibi_slopes, inputs.sinks, dlse
    is_plain = options.plain and options.scale > 0 and all(x is None for x in extras)
    return is_plain and inputs.q.is_cpu and not call.float32_lse


def is_aligned(group: SeqGroup, options: Options) -> bool:
    """True if that kernel's causal mask, which is aligned at the start, is these documents' mask."""
    return group.k_length > 0 and (not options.causal or group.q_length in (1, group.k_length))


def calls_and_groups(call: Call, by_aten: bool) -> tuple[list[list[Any]], list[SeqGroup]]:
    """(arguments of each call of our C++, the groups for ATen's kernel or the reference). Checks the boundaries.

    One call takes all documents up to a length; of the longer ones, each group that ATen's causal mask does not fit.
    """
    inputs, options = call.inputs, call.options
    if call.implementation != CPP:
        return [], list(equal_length_groups(inputs))
    longest = _dispatch.CPU_MAX_SEQLEN if by_aten else max(len(inputs.q), len(inputs.k))
    long = list(equal_length_groups(inputs, longest))
    calls, rest = [compiled_arguments(inputs, options, longest)], []
    for group in long:
        if is_aligned(group, options):
            rest.append(group)
        else:
            calls.append(compiled_arguments(inputs, options, max(group.q_length, group.k_length), group))
    return calls, rest


def compiled_arguments(inputs: Inputs, options: Options, longest: int, group: SeqGroup | None = None) -> list[Any]:
    """What the compiled code takes for the documents up to the longest, of all or of a group."""
    documents = slice(None) if group is None else slice(group.first, group.first + group.size + 1)
    bounds = [x[documents].to(torch.int64).contiguous() for x in inputs.bounds]
    slopes = inputs.alibi_slopes
    if slopes is not None:
        slopes = slopes.float().expand(len(bounds[0]) - 1, -1).contiguous()
    after = 0 if options.causal else options.right
    rest = options.scale, options.left, after, options.softcap, options.dropout_p
    return [*inputs[:3], *bounds, longest, slopes, as_floats(inputs.sinks), inputs.seed, *rest]


def varlen_forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out (total, H, D), lse (H, total))."""
    inputs, options = call.inputs, call.options
    out, lse = attention_launch.forward_outputs(inputs.q)
    by_aten = is_supported_by_aten(call)
    calls, rest = calls_and_groups(call, by_aten)
    for arguments in calls:
        torch.ops.fastlm.attention_of_documents(*arguments, out, lse)
    for group in rest:
        if by_aten and is_aligned(group, options):
            group_out, group_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(x.transpose(1, 2) for x in group.dense(inputs)[:3]),
                0.0,
                options.causal and group.q_length > 1,
                scale=options.scale,
            )
            group_out = group_out.transpose(1, 2)
        else:
            group_out, group_lse = attention_reference(group.dense(inputs), options, group.first)
        group.queries(out).copy_(group_out)
        group.queries(lse.T).copy_(group_lse.transpose(1, 2))
    end = int(inputs.bounds[0][-1])  # what follows is in no document
    out[end:] = 0
    lse[:, end:] = -torch.inf
    return out, lse


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
    slopes, sinks = inputs.alibi_slopes, inputs.sinks
    own_keys = inputs.cu_seqlens_k is not None
    for gradient in gradients if own_keys else (dslopes, dsinks):  # keys of no query are in no group
        gradient.zero_()
    by_aten = is_supported_by_aten(call, dlse)
    calls, rest = calls_and_groups(call, by_aten)
    dlse = None if dlse is None else dlse.contiguous()
    delta, shares = (torch.zeros_like(lse) if calls and x is not None else None for x in (sinks, slopes))
    for arguments in calls:
        torch.ops.fastlm.attention_of_documents_backward(dout, dlse, lse, *arguments, delta, shares, dq, dk, dv)
    if sinks is not None and delta is not None:
        dsinks.copy_(attention_launch.sink_gradient(sinks, lse, delta))
    if shares is not None:
        dslopes.copy_(slope_gradient(inputs, shares).sum_to_size(dslopes.shape))
    for group in rest:
        if by_aten and is_aligned(group, options):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x.transpose(1, 2) for x in (group.queries(dout), *group.dense(inputs)[:3], group.queries(out))),
                group.queries(lse.T).transpose(1, 2),
                0.0,
                options.causal and group.q_length > 1,
                scale=options.scale,
            )
            parts = [x.transpose(1, 2) for x in parts]
        else:
            group_dlse = None if dlse is None else group.queries(dlse.T).transpose(1, 2)
            *parts, group_dslopes, group_dsinks = attention_backward_reference(
                group.queries(dout), group_dlse, group.dense(inputs), options, group.first
            )
            if slopes is not None and slopes.dim() == 1:
                dslopes.add_(group_dslopes.sum(0))
            elif slopes is not None:
                dslopes[group.first : group.first + group.size] = group_dslopes
            if sinks is not None:
                dsinks.add_(group_dsinks)
        for place, part in zip((group.queries(dq), group.keys(dk), group.keys(dv)), parts, strict=True):
            place.copy_(part)
    for gradient in () if own_keys else (dq, dk, dv):
        gradient[int(inputs.bounds[0][-1]) :] = 0


def slope_gradient(inputs: Inputs, shares: Tensor) -> Tensor:
    """The rows' shares (H, total), summed up for each document: (documents, H) in float64."""
    lengths = inputs.bounds[0].diff()
    documents = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    sums = shares.new_zeros((len(lengths), len(shares)), dtype=torch.float64)
    return sums.index_add_(0, documents, shares.T[: len(documents)].double())


def varlen_reference(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """The same in differentiable PyTorch, for second derivatives: (out (total, H, D), lse (H, total))."""
    q = inputs.q
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    out = q.masked_fill(everywhere, 0.0)  # of q, so that there is something to derive where no document has a query
    lse = out.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32)) - torch.inf
    for group in equal_length_groups(inputs):
        group_out, group_lse = attention_reference(group.dense(inputs), options, group.first)
        rows = group.q_start, group.q_start + group.size * group.q_length
        out = out.slice_scatter(group_out.flatten(0, 1), 0, *rows)
        lse = lse.slice_scatter(group_lse.transpose(1, 2).flatten(0, 1), 0, *rows)
    return out, lse.T
