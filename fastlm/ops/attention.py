"""Scaled dot product attention, dense (B, T, H, D) or varlen: sequences concatenated as (total, H, D) with cu_seqlens.

    s_ij = softcap(scale * q_i . k_j) - slope * |i - j|          for the keys j that query i may see
    lse_i = log(sum_j exp(s_ij) + exp(sink))                     sink: one logit per head that has no value
    o_i = sum_j exp(s_ij - lse_i) v_j                            0, and lse -inf, where a query sees no key

Gradient, with p_ij = exp(s_ij - lse_i) and delta_i = o_i . do_i:  dv_j = sum_i p_ij do_i  and
ds_ij = p_ij (do_i . v_j - delta_i + dlse_i). So q, k, v, o and lse are saved, never p.

Positions are aligned at the end: query i of Tq has key position i + Tk - Tq. A varlen call costs the sum of the squared
sequence lengths, never the square of the total.
Source: Dao et al. 2022, arXiv 2205.14135; ALiBi: Press et al. 2021, arXiv 2108.12409.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx import Proxy
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fastlm.ops import attention_launch
from fastlm.ops._device import is_older
from fastlm.ops._dispatch import (
    CPP,
    DTYPES,
    FLASH_ATTN,
    OLDEST_OF_FLASH_ATTN,
    TORCH,
    TRITON,
    autocast_dtype,
    is_autocast,
    is_plain_tensor,
    is_transformed,
    route,
)
from fastlm.ops._dropout import check_dropout, seed_tensor
from fastlm.ops._fx import recorded
from fastlm.ops._register import apply, differentiable_gradients, is_double_backward, register
from fastlm.ops._torch import scaled_dot_product_attention as torch_sdpa
from fastlm.ops.attention_cpu import check_boundaries, fill_varlen_gradients, varlen_forward, varlen_reference
from fastlm.ops.attention_reference import (
    UNLIMITED,
    Call,
    Inputs,
    Options,
    attention_reference,
    has_plain_scores,
    is_misaligned,
)
from fastlm.ops.attention_schedules import AttentionSchedules

BACKENDS = ("auto", "triton", "torch", "flash_attn")
MAX_WINDOW = 1 << 30  # keys: more than any sequence has, and a kernel can add a position to it without overflow
SOFTCAP_RANGE = (2.0**-60, 2.0**60)  # a softcap beyond these gives the same result, and float32 might not hold it


# The raw ops, dense and varlen: Triton, C++ or PyTorch


def forward(*flat: Any, schedules: AttentionSchedules | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, remainder of out) of a flat Call."""
    call = Call.of(flat)
    inputs = maybe_contiguous_heads(call.inputs)
    if call.implementation == TRITON:
        check_boundaries(inputs)
        return attention_launch.forward(inputs, call.options, schedules)
    return *varlen_forward(call._replace(inputs=inputs)), inputs.q.new_empty((0,))


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    remainder: Tensor,
    *flat: Any,
    schedules: AttentionSchedules | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dslopes, dsinks) of a flat Call."""
    call = Call.of(flat)
    inputs, dout = maybe_contiguous_heads(call.inputs), maybe_contiguous(dout)
    if call.implementation == TRITON:
        dq, dk, dv, dslopes, dsinks = attention_launch.backward(
            dout, dlse, out, lse, remainder, inputs, call.options, schedules
        )
        absent = inputs.q.new_empty((0,))
        return dq, dk, dv, absent if dslopes is None else dslopes, absent if dsinks is None else dsinks
    gradients = empty_gradients(dout, dlse, out, lse, remainder, *inputs)
    fill_varlen_gradients(gradients, dout, dlse, out, lse, call._replace(inputs=inputs))
    return gradients


def maybe_contiguous_heads(inputs: Inputs) -> Inputs:
    q, k, v, *others = inputs
    return Inputs(maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v), *others)


def maybe_contiguous(x: Tensor) -> Tensor:
    """x with a last stride of 1, which the kernels and ATen's CPU flash kernel assume."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_outputs(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call.of(flat)
    q, seed = call.inputs.q, call.inputs.seed
    remainder = attention_launch.empty_remainder(q, seed if call.implementation == TRITON else None)
    return *attention_launch.forward_outputs(q), remainder


def empty_gradients(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, remainder: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dslopes, dsinks), uninitialised; without elements for absent slopes or sinks."""
    q, k, v, _, _, slopes, sinks, *_ = flat
    absent = [q.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in (slopes, sinks)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), absent[0], absent[1]


TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
OPTIONS = (
    "str implementation, bool float32_lse,"
    " bool causal, float scale, SymInt left, SymInt right, float softcap, float dropout_p"
)
attention_op = register(f"attention({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)", forward, empty_outputs)
attention_backward_op = register(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor remainder, {TENSORS}, {OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    empty_gradients,
)


# FLOPs for torch.utils.flop_counter, which counts all scores, also those that causality or a window masks


def flops(pairs: int, H: int, D: int, Dv: int, backward: bool) -> int:
    """Of this many query-key pairs in each of H heads; the backward recomputes the scores."""
    return 2 * pairs * H * (3 * D + 2 * Dv if backward else D + Dv)


def raw_op_flops(*flat: Any, backward: bool = False, **_: Any) -> int:
    inputs = Call.of(flat).inputs
    (*B, Tq, H, D), Tk = inputs.q.shape, inputs.k.shape[-3]
    pairs = math.prod(B) * Tq * Tk  # an upper bound where the sequence lengths are unknown
    if inputs.cu_seqlens_q is not None and not any(x.is_meta or is_fake(x) for x in inputs.bounds):
        lengths_q, lengths_k = (x.long().diff() for x in inputs.bounds)
        pairs = int((lengths_q * lengths_k).sum())
    return flops(pairs, H, D, D, backward)


def raw_backward_flops(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, remainder: Tensor, *flat: Any, **_: Any
) -> int:
    return raw_op_flops(*flat, backward=True)


def sdpa_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, backward: bool = False, **__: Any) -> int:
    B, H, Tq, D = q
    return flops(B * Tq * k[2], H, D, v[3], backward)


def sdpa_backward_flops(dout: torch.Size, *shapes: Any, **_: Any) -> int:
    return sdpa_flops(*shapes, backward=True)


register_flop_formula(torch.ops.fastlm.attention, get_raw=True)(raw_op_flops)
register_flop_formula(torch.ops.fastlm.attention_backward, get_raw=True)(raw_backward_flops)
# PyTorch has formulas for its fused kernels on GPUs alone; without these, attention on a CPU would count as nothing.
for _op, _formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flops),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flops),
):
    if _op not in flop_registry:
        register_flop_formula(_op)(_formula)


# Autograd


class AttentionFunction(torch.autograd.Function):
    """The two raw ops as one differentiable function. Takes a flat Call: autograd sees no tensors inside tuples."""

    @staticmethod
    def forward(ctx: Any, schedules: AttentionSchedules | None, *flat: Any) -> tuple[Tensor, Tensor]:
        out, lse, remainder = attention_op(*flat, schedules=schedules)
        ctx.schedules = schedules
        ctx.set_materialize_grads(False)  # without a dlse ATen's fused kernel can run
        tensors, ctx.rest = flat[: len(Inputs._fields)], flat[len(Inputs._fields) :]
        ctx.save_for_backward(out, lse, remainder, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, remainder, *tensors = ctx.saved_tensors  # read once: under checkpointing a second read fails
        call = Call.of((*tensors, *ctx.rest))
        if is_double_backward():
            gradients = gradients_in_pytorch(call, (dout, dlse))
        else:
            dout = torch.zeros_like(out) if dout is None else dout
            saved = out, lse, remainder, *tensors, *ctx.rest
            gradients = attention_backward_op(dout, dlse, *saved, schedules=ctx.schedules)
        dq, dk, dv, dslopes, dsinks = gradients
        dslopes = None if call.inputs.alibi_slopes is None else dslopes
        dsinks = None if call.inputs.sinks is None else dsinks
        return None, dq, dk, dv, None, None, dslopes, dsinks, None, *(None for _ in ctx.rest)


def in_pytorch(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """The raw op in differentiable PyTorch."""
    return (attention_reference if inputs.cu_seqlens_q is None else varlen_reference)(inputs, options)


def gradients_in_pytorch(call: Call, upstream: tuple[Tensor | None, Tensor | None]) -> Sequence[Tensor | None]:
    """(dq, dk, dv, dslopes, dsinks), which autograd can differentiate again."""

    def function(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return in_pytorch(call.inputs._replace(q=q, k=k, v=v, alibi_slopes=slopes, sinks=sinks), call.options)

    q, k, v, _, _, slopes, sinks, _ = call.inputs
    sources = (q, k, v, slopes, sinks)
    needs = [x is not None and x.requires_grad for x in sources]
    return differentiable_gradients(function, sources, needs, upstream)


# The implementations: raw ops, PyTorch's and flash_attn's functions


Longest = tuple[int | None, int | None]  # max_seqlen_q and max_seqlen_k


def by_raw_op(call: Call, schedules: AttentionSchedules | None = None) -> tuple[Tensor, Tensor]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *others = call.inputs
    # torch.compile refuses an autograd function with the same tensor twice, as in attention(x, x, x).
    k, v = k.view_as(k) if k is q else k, v.view_as(v) if v is q or v is k else v
    cu_seqlens_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    inputs = Inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, *others)
    if torch.compiler.is_compiling():
        schedules = None  # which an op of a graph could not take
    elif schedules is None and call.implementation == TRITON and cu_seqlens_q is not None and torch.is_grad_enabled():
        schedules = AttentionSchedules()  # of this call alone: where blocks are equal, dq takes the tiles of forward
    return apply(AttentionFunction, schedules, *inputs, call.implementation, call.float32_lse, *call.options)


def as_varlen(call: Call) -> tuple[Tensor, Tensor]:
    """Dense attention as varlen attention whose sequences are the rows of the batch."""
    q, k, v = call.inputs[:3]
    bounds_q = bounds_of_rows(q)
    bounds_k = bounds_q if q.shape[1] == k.shape[1] else bounds_of_rows(k)
    inputs = call.inputs._replace(
        q=q.flatten(0, 1), k=k.flatten(0, 1), v=v.flatten(0, 1), cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k
    )
    out, lse = by_raw_op(call._replace(inputs=inputs))
    return out.view(q.shape), lse.view(-1, *q.shape[:2]).transpose(0, 1)


def bounds_of_rows(x: Tensor) -> Tensor:
    return torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device)


def by_sdpa(inputs: Inputs, options: Options, has_seed: bool, longest: Longest) -> Tensor | None:
    """PyTorch's own fused attention, or None for a call that it does not support."""
    q, k = inputs.q, inputs.k
    if not has_plain_scores(inputs, options._replace(dropout_p=0.0)):
        return None
    if inputs.cu_seqlens_q is None:
        can_be_aligned = not options.causal or q.shape[1] <= k.shape[1]
        is_supported = can_be_aligned and k.shape[1] > 0 and not (options.dropout_p and has_seed)
        return dense_by_sdpa(inputs, options) if is_supported else None
    if options.dropout_p or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    if is_older(q, OLDEST_OF_FLASH_ATTN):  # varlen_attn is PyTorch's copy of that kernel
        return None
    return varlen_by_sdpa(inputs, options, longest) if 0 < q.shape[2] <= 256 and is_plain_tensor(*inputs) else None


def dense_by_sdpa(inputs: Inputs, options: Options) -> Tensor:
    """PyTorch aligns causality at the start, so unequal lengths need a mask."""
    q, k, v = inputs[:3]
    Tq, Tk = q.shape[1], k.shape[1]
    mask, is_causal, is_grouped = None, False, False  # set below: a comparison of symbolic sizes is no bool
    if q.shape[2] != k.shape[2]:
        is_grouped = True
    if options.causal and is_misaligned(q, k):
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    elif options.causal and Tq > 1:
        is_causal = True
    out = torch_sdpa(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=options.dropout_p,
        is_causal=is_causal,
        scale=options.scale,
        enable_gqa=is_grouped,
    )
    return out.transpose(1, 2)


def varlen_by_sdpa(inputs: Inputs, options: Options, longest: Longest) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imports torch.compile: not before it is needed

    q, k, v = map(maybe_contiguous, inputs[:3])
    bounds_q, bounds_k = (x.int() for x in inputs.bounds)
    window = (UNLIMITED, 0 if options.causal else UNLIMITED)
    if q.shape[1] != k.shape[1]:  # not every torch from 2.11 on takes enable_gqa here
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    lengths = longest[0] or q.shape[0], longest[1] or k.shape[0]
    out = varlen_attn(q, k, v, bounds_q, bounds_k, *lengths, scale=options.scale, window_size=window)
    assert isinstance(out, Tensor), "varlen_attn returns lse only on request"
    in_no_sequence = torch.arange(q.shape[0], device=q.device) >= bounds_q[-1]  # varlen_attn does not write these rows
    return out.masked_fill(in_no_sequence[:, None, None], 0.0)


def by_flash_attn(inputs: Inputs, options: Options, longest: Longest) -> Tensor:
    """The flash_attn package's own function, whose arguments and alignment are ours."""
    flash_attn = importlib.import_module("flash_attn")
    q, k, v, slopes = inputs.q, inputs.k, inputs.v, inputs.alibi_slopes
    keywords = {
        "dropout_p": options.dropout_p,
        "softmax_scale": options.scale,
        "causal": options.causal,
        "window_size": (options.left, options.right),
        "softcap": options.softcap,
        "alibi_slopes": None if slopes is None else slopes.float(),
    }
    if inputs.cu_seqlens_q is None:
        return flash_attn.flash_attn_func(q, k, v, **keywords)
    bounds = [x.int() for x in inputs.bounds]
    lengths = longest[0] or q.shape[0], longest[1] or k.shape[0]
    return flash_attn.flash_attn_varlen_func(q, k, v, *bounds, *lengths, **keywords)


def run(call: Call, schedules: AttentionSchedules | None) -> tuple[Tensor, Tensor]:
    """(out, lse) by the implementation of the call."""
    is_dense = call.inputs.cu_seqlens_q is None
    if call.implementation == CPP and is_dense:
        return as_varlen(call)
    if call.implementation == TORCH and (is_dense or is_transformed()):
        return in_pytorch(call.inputs, call.options)
    return by_raw_op(call, schedules)


# Options and checks


def options_of(
    D: int,
    causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    dropout_p: float,
) -> Options:
    left, right = (UNLIMITED if side is None else min(side, MAX_WINDOW) for side in window or (None, None))
    if causal or right == 0:
        causal, right = True, UNLIMITED
    scale = max(1, D) ** -0.5 if scale is None else float(scale)
    softcap = max(SOFTCAP_RANGE[0], min(float(softcap), SOFTCAP_RANGE[1])) if softcap else 0.0
    return Options(causal, scale, left, right, softcap, float(dropout_p))


def check_inputs(inputs: Inputs, longest: Longest) -> None:
    check_types(inputs)
    q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, sinks, _ = inputs
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("attention: cu_seqlens_k came without cu_seqlens_q; give both, or cu_seqlens_q alone")
    check_heads(q, k, v, varlen=cu_seqlens_q is not None)
    check_dtypes(inputs)
    H = q.shape[-2]
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"attention: sinks has shape {tuple(sinks.shape)}, expected ({H},), one per query head")
    device = q.device
    for name, x in zip(Inputs._fields, inputs, strict=True):
        if x is not None and x.device != device:
            raise ValueError(f"attention: {name} is on {x.device}, expected {device}, where q is; move it there")
    for name, x, limit in zip(("q", "k"), (cu_seqlens_q, cu_seqlens_k), longest, strict=True):
        if x is not None:
            check_bounds(name, x, limit)
    num_seqs = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if slopes is not None and slopes.shape != (H,) and slopes.shape != (num_seqs, H):  # `in` takes no symbolic sizes
        expected = f"expected ({H},) or ({num_seqs}, {H}), a row for each batch row or sequence"
        raise ValueError(f"attention: alibi_slopes has shape {tuple(slopes.shape)}, {expected}")


def check_types(inputs: Inputs) -> None:
    for name, x in zip(Inputs._fields, inputs, strict=True):
        if not isinstance(x, Tensor) and (x is not None or name in ("q", "k", "v")):
            how = ": torch.tensor(..., dtype=torch.int32)" if name.startswith("cu_seqlens") else ""
            raise TypeError(f"attention: {name} is of type {type(x).__name__}, expected a tensor{how}")


def check_dtypes(inputs: Inputs) -> None:
    q, k, v = inputs[:3]
    dtypes = q.dtype, k.dtype, v.dtype
    is_one = dtypes[0] == dtypes[1] == dtypes[2]
    is_supported = all(dtype in DTYPES for dtype in dtypes) and (is_one or is_autocast(q))
    if not is_supported and not (is_one and q.dtype == torch.float64):
        expected = "expected float32, float16, bfloat16 or float64, one for all (under autocast any of the first three)"
        raise TypeError(f"attention: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, {expected}")
    for name, x in (("alibi_slopes", inputs.alibi_slopes), ("sinks", inputs.sinks)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"attention: {name} is {x.dtype}, expected a floating dtype")


def check_heads(q: Tensor, k: Tensor, v: Tensor, varlen: bool) -> None:
    dims, layout = (
        (3, "(total, H, D) with cu_seqlens_q; a batch becomes that by x.flatten(0, 1)")
        if varlen
        else (4, "(B, T, H, D), or (total, H, D) together with cu_seqlens_q")
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"attention: {name} has shape {tuple(x.shape)}, expected {layout}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[: dims - 3] != k.shape[: dims - 3]:
        raise ValueError(f"attention: {shapes} disagree; k and v have one shape, and batch and D are those of q")
    H, Hk = q.shape[-2], k.shape[-2]
    if Hk == 0 or H % Hk:
        layout = "(total, H, D)" if varlen else "(B, T, H, D); (B, H, T, D) becomes that by x.transpose(1, 2)"
        raise ValueError(f"attention: {Hk} key heads do not divide {H} query heads in {shapes}, expected {layout}")


def check_bounds(side: str, bounds: Tensor, longest: int | None) -> None:
    name, limit = f"cu_seqlens_{side}", f"max_seqlen_{side}"
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention: {name} is {bounds.dtype}, expected torch.int32 or torch.int64")
    if bounds.dim() != 1:
        raise ValueError(f"attention: {name} has shape {tuple(bounds.shape)}, expected (sequences + 1,)")
    if longest is None:
        return
    if not (isinstance(longest, int) or hasattr(longest, "__index__")):
        raise TypeError(f"attention: {limit} is of type {type(longest).__name__}, expected an int")
    # On a GPU this would wait for the device.
    if bounds.is_cpu and bounds.shape[0] > 1 and not torch.compiler.is_compiling() and is_plain_tensor(bounds):
        length = int(bounds.diff().max())
        if length > longest:
            raise ValueError(f"attention: {limit} is {longest}, but a sequence in {name} has {length} tokens")


def check_options(
    causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    dropout_p: float,
    schedules: AttentionSchedules | None,
    backend: str,
) -> None:
    if not isinstance(causal, int):
        raise TypeError(f"attention: causal is of type {type(causal).__name__}, expected a bool")
    numbers = {"scale": scale, "softcap": softcap, "dropout_p": dropout_p}
    for name, x in numbers.items():
        if not is_number(x) and (x is not None or name == "dropout_p"):
            raise TypeError(f"attention: {name} is of type {type(x).__name__}, expected a number")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"attention: scale is {scale}, expected a finite number")
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap is {softcap}, expected a finite number above 0, or 0 or None for none")
    if window is not None and not is_window(window):
        expected = "expected (left, right): numbers of keys from 0 on, None or -1 for unlimited"
        raise ValueError(f"attention: window is {window}, {expected}")
    if schedules is not None and not isinstance(schedules, AttentionSchedules):
        expected = "expected an AttentionSchedules(), made once per batch"
        raise TypeError(f"attention: schedules is of type {type(schedules).__name__}, {expected}")
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")


def is_number(x: object) -> bool:
    """False for a tensor: its gradient would be lost, and reading it would wait for a GPU."""
    return isinstance(x, int | float) or (hasattr(x, "__float__") and not isinstance(x, Tensor))


def is_window(window: object) -> bool:
    return (
        isinstance(window, tuple | list)
        and len(window) == 2
        and all(side is None or (isinstance(side, int) and side >= UNLIMITED) for side in window)
    )


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
    schedules: AttentionSchedules | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query to the keys it may see, of its batch row or of its sequence in cu_seqlens.

    q             (B, Tq, H, D), or (total_q, H, D) with cu_seqlens; float32, float16, bfloat16 or float64, as k and v
    k, v          (B, Tk, Hk, D), or (total_k, Hk, D); Hk divides H, and H / Hk query heads share a key head
    causal        a query sees no later key; positions are aligned at the end (bottom right)
    scale         of the products q . k; 1 / sqrt(D) when None
    window        (left, right): how many keys before and after it a query sees; None or -1 is unlimited
    softcap       scores become softcap * tanh(scores / softcap); None or 0 for none
    alibi_slopes  (H,), or (B, H), or (sequences, H): subtracts slope * distance from the scores
    sinks         (H,): one more logit per head in the softmax, without a value
    dropout_p     the chance that a probability is zeroed
    seed          of dropout: an int, or an int64 tensor of one element on the device of q; None draws one
    cu_seqlens    int32 or int64 (sequences + 1,) boundaries, rising from 0; may repeat at the end. None for k: as for q
    max_seqlen    the length of the longest sequence or an upper bound; total when None
    schedules     of cu_seqlens, made once per batch and given to the calls of all layers, which then share them
    backend       "auto", "triton", "torch" (PyTorch's code, on a CPU also our C++) or "flash_attn"
    returns       out like q; with return_lse also lse, float32 (float64 of float64), (B, H, Tq) or (H, total_q),
                  differentiable

    Raises ValueError if shapes, devices or options disagree, TypeError for a dtype or type.
    """
    if isinstance(q, Proxy) or isinstance(k, Proxy) or isinstance(v, Proxy):
        return recorded(attention, locals() | {"schedules": None})  # a graph takes other batches than this one
    inputs = Inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)
    longest = max_seqlen_q, max_seqlen_k
    check_inputs(inputs, longest)
    check_options(causal, scale, window, softcap, dropout_p, schedules, backend)
    check_dropout("attention", "q", q, dropout_p, seed)
    if dtype := autocast_dtype(q):
        inputs = inputs._replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype))
    options = options_of(q.shape[-1], causal, scale, window, softcap, dropout_p)
    implementation = route("attention", inputs, (options, backend, seed is not None, return_lse)).implementation
    if implementation == FLASH_ATTN:
        return by_flash_attn(inputs, options, longest)
    if implementation == TORCH and not return_lse:
        out = by_sdpa(inputs, options, seed is not None, longest)
        if out is not None:
            return out
    inputs = inputs._replace(seed=seed_tensor(seed, q.device) if dropout_p else None)
    # For plain scores in 16 bits ATen's lse is much less exact than float32.
    float32_lse = return_lse and q.dtype in (torch.float16, torch.bfloat16)
    out, lse = run(Call(inputs, implementation, float32_lse, options), schedules)
    return (out, lse) if return_lse else out
