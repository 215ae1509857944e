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

from fastlm.ops import attention_triton as kernels
from fastlm.ops._library import as_floats, has_attention
from fastlm.ops._triton import is_exporting
from fastlm.ops.attention_reference import Inputs, Options, attention_backward_reference, attention_reference

SHORT = 512  # tokens of a document up to which our compiled code serves plain scores, and not ATen's fused kernel
SHORTEST_ROW = 96  # tokens of a dense batch's rows from which on it does; of shorter ones that kernel is faster


FEW = 1 << 22  # multiplications of q and k below which the price of our call exceeds what it saves of a dense batch


def serves_plain_rows(q: Tensor, k: Tensor) -> bool:
    """Whether our compiled code is faster for plain dense (B, T, H, D) than ATen's fused kernel."""
    if is_exporting():  # a choice by sizes would hold for those of the example alone
        return False
    (B, Tq, H, D), (_, Tk, Hk, _) = q.shape, k.shape
    is_shared_out = B * Hk >= num_threads()  # a thread takes all queries of a key head
    return is_shared_out and SHORTEST_ROW <= max(Tq, Tk) <= SHORT and B * H * Tq * Tk * D >= FEW


@torch.compiler.assume_constant_result
def num_threads() -> int:
    """PyTorch's, whose function torch.compile does not follow."""
    return torch.get_num_threads()


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

    def dense(self, inputs: Inputs) -> Inputs:
        """These documents as a batch. Slopes are one per head, or one per document and head."""
        slopes = inputs.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[self.first : self.first + self.size]
        heads = self.queries(inputs.q), self.keys(inputs.k), self.keys(inputs.v)
        return Inputs(*heads, alibi_slopes=slopes, sinks=inputs.sinks, seed=inputs.seed)


def runs(inputs: Inputs, served: int = 0) -> Iterator[Run]:
    """The documents that have a query and are longer than what is served, neighbours of equal lengths together."""
    stand_in = "cu_seqlens_q, which stands for the cu_seqlens_k not given,"
    cu_seqlens_q, cu_seqlens_k = inputs.bounds
    q_bounds = _boundaries("q", inputs.q, "cu_seqlens_q", cu_seqlens_q)
    k_bounds = _boundaries("k", inputs.k, stand_in if inputs.cu_seqlens_k is None else "cu_seqlens_k", cu_seqlens_k)
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


def _boundaries(name: str, x: Tensor, source: str, cu_seqlens: Tensor) -> list[int]:
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
        for _ in runs(inputs):
            pass


def is_plain(q: Tensor, options: Options, *extras: Tensor | None) -> bool:
    """True if ATen's CPU flash kernel computes such scores."""
    return q.is_cpu and options.plain and options.scale > 0 and all(x is None for x in extras)


def _is_aligned(run: Run, options: Options) -> bool:
    """True if that kernel's causal mask, which is aligned at the start, is these documents' mask."""
    return run.k_length > 0 and (not options.causal or run.q_length in (1, run.k_length))


def _calls_and_runs(inputs: Inputs, options: Options, plain: bool) -> tuple[list[list[Any]], list[Run]]:
    """(what each call of our compiled code takes, the runs for ATen's kernel or the reference). Checks the boundaries.

    One call takes all documents up to a length; of the longer ones, each run that ATen's causal mask does not fit.
    """
    if not has_attention(inputs.q):
        return [], list(runs(inputs))
    longest = SHORT if plain else max(len(inputs.q), len(inputs.k))
    long = list(runs(inputs, longest))
    calls, rest = [_compiled_arguments(inputs, options, longest)], []
    for run in long:
        if _is_aligned(run, options):
            rest.append(run)
        else:
            calls.append(_compiled_arguments(inputs, options, max(run.q_length, run.k_length), run))
    return calls, rest


def _compiled_arguments(inputs: Inputs, options: Options, longest: int, run: Run | None = None) -> list[Any]:
    """What the compiled code takes for the documents up to the longest, of all or of a run."""
    documents = slice(None) if run is None else slice(run.first, run.first + run.size + 1)
    bounds = [x[documents].to(torch.int64).contiguous() for x in inputs.bounds]
    slopes = inputs.alibi_slopes
    if slopes is not None:
        slopes = slopes.float().expand(len(bounds[0]) - 1, -1).contiguous()
    after = 0 if options.causal else options.right
    rest = options.scale, options.left, after, options.softcap, options.dropout_p
    return [*inputs[:3], *bounds, longest, slopes, as_floats(inputs.sinks), inputs.seed, *rest]


def packed_forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """(out (total, H, D), lse (H, total))."""
    out, lse = kernels.forward_outputs(inputs.q)
    plain = is_plain(inputs.q, options, inputs.alibi_slopes, inputs.sinks)
    calls, rest = _calls_and_runs(inputs, options, plain)
    for arguments in calls:
        torch.ops.fastlm.attention_of_documents(*arguments, out, lse)
    for run in rest:
        if plain and _is_aligned(run, options):
            run_out, run_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(x.transpose(1, 2) for x in run.dense(inputs)[:3]),
                0.0,
                options.causal and run.q_length > 1,
                scale=options.scale,
            )
            run_out = run_out.transpose(1, 2)
        else:
            run_out, run_lse = attention_reference(run.dense(inputs), options, run.first)
        run.queries(out).copy_(run_out)
        run.queries(lse.T).copy_(run_lse.transpose(1, 2))
    end = int(inputs.bounds[0][-1])  # what follows is in no document
    out[end:] = 0
    lse[:, end:] = -torch.inf
    return out, lse


def fill_packed_gradients(
    gradients: tuple[Tensor, ...],
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    options: Options,
) -> None:
    """Writes the gradients of q, k and v, of the slopes and of the sinks into tensors of their shapes."""
    dq, dk, dv, dslopes, dsinks = gradients
    slopes, sinks = inputs.alibi_slopes, inputs.sinks
    own_keys = inputs.cu_seqlens_k is not None
    for gradient in gradients if own_keys else (dslopes, dsinks):  # keys of no query are in no run
        gradient.zero_()
    plain = is_plain(inputs.q, options, slopes, sinks, dlse)
    calls, rest = _calls_and_runs(inputs, options, plain)
    dlse = None if dlse is None else dlse.contiguous()
    delta, shares = (torch.zeros_like(lse) if calls and x is not None else None for x in (sinks, slopes))
    for arguments in calls:
        torch.ops.fastlm.attention_of_documents_backward(dout, dlse, lse, *arguments, delta, shares, dq, dk, dv)
    if sinks is not None and delta is not None:
        dsinks.copy_(kernels.sink_gradient(sinks, lse, delta))
    if shares is not None:
        dslopes.copy_(_slope_gradient(inputs, shares).sum_to_size(dslopes.shape))
    for run in rest:
        if plain and _is_aligned(run, options):
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x.transpose(1, 2) for x in (run.queries(dout), *run.dense(inputs)[:3], run.queries(out))),
                run.queries(lse.T).transpose(1, 2),
                0.0,
                options.causal and run.q_length > 1,
                scale=options.scale,
            )
            parts = [x.transpose(1, 2) for x in parts]
        else:
            run_dlse = None if dlse is None else run.queries(dlse.T).transpose(1, 2)
            *parts, run_dslopes, run_dsinks = attention_backward_reference(
                run.queries(dout), run_dlse, run.dense(inputs), options, run.first
            )
            if slopes is not None and slopes.dim() == 1:
                dslopes.add_(run_dslopes.sum(0))
            elif slopes is not None:
                dslopes[run.first : run.first + run.size] = run_dslopes
            if sinks is not None:
                dsinks.add_(run_dsinks)
        for place, part in zip((run.queries(dq), run.keys(dk), run.keys(dv)), parts, strict=True):
            place.copy_(part)
    for gradient in () if own_keys else (dq, dk, dv):
        gradient[int(inputs.bounds[0][-1]) :] = 0


def _slope_gradient(inputs: Inputs, shares: Tensor) -> Tensor:
    """The rows' shares (H, total), summed up for each document: (documents, H) in float64."""
    lengths = inputs.bounds[0].diff()
    documents = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    sums = shares.new_zeros((len(lengths), len(shares)), dtype=torch.float64)
    return sums.index_add_(0, documents, shares.T[: len(documents)].double())


def packed_reference(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """The same in differentiable PyTorch, for second derivatives: (out (total, H, D), lse (H, total))."""
    q = inputs.q
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    out = q.masked_fill(everywhere, 0.0)  # of q, so that there is something to derive where no document has a query
    lse = out.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32)) - torch.inf
    for run in runs(inputs):
        run_out, run_lse = attention_reference(run.dense(inputs), options, run.first)
        rows = run.q_start, run.q_start + run.size * run.q_length
        out = out.slice_scatter(run_out.flatten(0, 1), 0, *rows)
        lse = lse.slice_scatter(run_lse.transpose(1, 2).flatten(0, 1), 0, *rows)
    return out, lse.T
