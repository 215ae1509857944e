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
import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx import Proxy
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fastlm.ops import attention_triton as kernels
from fastlm.ops._dropout import check_dropout, seed_tensor
from fastlm.ops._fx import recorded
from fastlm.ops._library import has_attention
from fastlm.ops._torch import scaled_dot_product_attention as torch_sdpa
from fastlm.ops._triton import DTYPES, is_autocast, is_ordinary, is_transformed, runs_kernels
from fastlm.ops.attention_cpu import (
    check_boundaries,
    fill_packed_gradients,
    is_plain,
    packed_forward,
    packed_reference,
    serves_plain_rows,
)
from fastlm.ops.attention_reference import (
    UNLIMITED,
    Inputs,
    Options,
    attention_reference,
)

BACKENDS = ("auto", "triton", "torch", "flash_attn")
HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None
FARTHEST = 1 << 30  # keys: more than any sequence has, and what the positions in a kernel can be added to
CAPS = (2.0**-60, 2.0**60)  # beyond these a softcap makes no other difference, and float32 might not hold it


# The raw ops, dense and packed: the kernels, or PyTorch's code


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, by_kernels, options = _split(arguments)
    if by_kernels:
        check_boundaries(inputs)
        return kernels.forward(*inputs, *options)
    return *packed_forward(inputs, options), inputs.q.new_empty((0,))


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, remainder: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, by_kernels, options = _split(arguments)
    dout = _with_adjacent_features(dout)
    if by_kernels:
        dq, dk, dv, dslopes, dsinks = kernels.backward(dout, dlse, out, lse, remainder, *inputs, *options)
        absent = inputs.q.new_empty((0,))
        return dq, dk, dv, absent if dslopes is None else dslopes, absent if dsinks is None else dsinks
    gradients = _empty_gradients(dout, dlse, out, lse, remainder, *inputs)
    fill_packed_gradients(gradients, dout, dlse, out, lse, inputs, options)
    return gradients


def _split(arguments: tuple[Any, ...]) -> tuple[Inputs, bool, Options]:
    """What a raw op is given, with heads whose features are adjacent."""
    q, k, v, *others = arguments[: len(Inputs._fields)]
    by_kernels, *options = arguments[len(Inputs._fields) :]
    return Inputs(*map(_with_adjacent_features, (q, k, v)), *others), by_kernels, Options(*options)


def _with_adjacent_features(x: Tensor) -> Tensor:
    """x with a last stride of 1: the kernels and ATen's CPU flash kernel take that for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, by_kernels = Inputs(*arguments[: len(Inputs._fields)]), arguments[len(Inputs._fields)]
    remainder = kernels.empty_remainder(inputs.q, inputs.seed if by_kernels else None)
    return *kernels.forward_outputs(inputs.q), remainder


def _empty_gradients(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, remainder: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients; an absent tensor's has no elements."""
    q, k, v, _, _, slopes, sinks, *_ = arguments
    absent = [q.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in (slopes, sinks)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), absent[0], absent[1]


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
_OPTIONS = "bool by_kernels, bool causal, float scale, SymInt left, SymInt right, float softcap, float dropout_p"
_library = torch.library.Library("fastlm", "FRAGMENT")
_library.define(f"attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")  # out, lse, remainder of out
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor remainder, {_TENSORS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _device)
    _library.impl("attention_backward", _backward, _device)
torch.library.register_fake("fastlm::attention", _empty_outputs)
torch.library.register_fake("fastlm::attention_backward", _empty_gradients)


# FLOPs, as torch.utils.flop_counter counts them: of all scores, also of those that causality or a window hides


def _flops(pairs: int, H: int, D: int, Dv: int, backward: bool) -> int:
    """Of so many pairs of a query and a key in each of H heads; the backward makes the scores anew."""
    return 2 * pairs * H * (3 * D + 2 * Dv if backward else D + Dv)


def _raw_op_flops(*arguments: Any, backward: bool = False, **_: Any) -> int:
    inputs = Inputs(*arguments[: len(Inputs._fields)])
    (*B, Tq, H, D), Tk = inputs.q.shape, inputs.k.shape[-3]
    pairs = math.prod(B) * Tq * Tk  # of documents whose lengths nobody knows, the most that they can have
    if inputs.cu_seqlens_q is not None and not any(x.is_meta or is_fake(x) for x in inputs.bounds):
        lengths_q, lengths_k = (x.long().diff() for x in inputs.bounds)
        pairs = int((lengths_q * lengths_k).sum())
    return _flops(pairs, H, D, D, backward)


def _raw_backward_flops(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, remainder: Tensor, *arguments: Any, **_: Any
) -> int:
    return _raw_op_flops(*arguments, backward=True)


def _sdpa_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, backward: bool = False, **__: Any) -> int:
    B, H, Tq, D = q
    return _flops(B * Tq * k[2], H, D, v[3], backward)


def _sdpa_backward_flops(dout: torch.Size, *shapes: Any, **_: Any) -> int:
    return _sdpa_flops(*shapes, backward=True)


register_flop_formula(torch.ops.fastlm.attention, get_raw=True)(_raw_op_flops)
register_flop_formula(torch.ops.fastlm.attention_backward, get_raw=True)(_raw_backward_flops)
# PyTorch has formulas for its fused kernels on GPUs alone; without these, attention on a CPU would count as nothing.
for _op, _formula in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _sdpa_flops),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _sdpa_backward_flops),
):
    if _op not in flop_registry:
        register_flop_formula(_op)(_formula)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse, remainder = torch.ops.fastlm.attention(*arguments)
        ctx.set_materialize_grads(False)  # a gradient of lse that nobody took must not cost the fused kernel
        ctx.options = arguments[len(Inputs._fields) :]
        ctx.save_for_backward(out, lse, remainder, *arguments[: len(Inputs._fields)])
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing hands them out once
        out, inputs = saved[0], Inputs(*saved[3:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            found = _differentiable_gradients(inputs, Options(*ctx.options[1:]), (dout, dlse))
        else:
            dout = torch.zeros_like(out) if dout is None else dout
            found = torch.ops.fastlm.attention_backward(dout, dlse, *saved, *ctx.options)
        dq, dk, dv, dslopes, dsinks = found
        dslopes = None if inputs.alibi_slopes is None else dslopes
        dsinks = None if inputs.sinks is None else dsinks
        return dq, dk, dv, None, None, dslopes, dsinks, None, *(None for _ in ctx.options)


def _in_pytorch(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """The raw op in differentiable PyTorch."""
    return (attention_reference if inputs.cu_seqlens_q is None else packed_reference)(inputs, options)


def _differentiable_gradients(
    inputs: Inputs, options: Options, upstream: tuple[Tensor | None, Tensor | None]
) -> list[Tensor | None]:
    """Those of q, k, v, the slopes and the sinks."""
    pairs = [(x, grad) for x, grad in zip(_in_pytorch(inputs, options), upstream, strict=True) if grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    sources = [inputs.q, inputs.k, inputs.v, inputs.alibi_slopes, inputs.sinks]
    wanted = [x for x in sources if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in sources]


# Which code serves a call


def _kernels_refuse(inputs: Inputs, options: Options) -> str | None:
    """Why the Triton kernels do not serve a call, or None."""
    q = inputs.q
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
    if not is_ordinary(*inputs):
        return "the kernels know nothing of tensor subclasses and torch.func"
    return None


def _flash_attn_refuses(inputs: Inputs, options: Options, seed: int | Tensor | None, return_lse: bool) -> str | None:
    """Why the flash_attn package does not serve a call, or None."""
    q = inputs.q
    if not HAS_FLASH_ATTN:
        return "the flash_attn package is not installed"
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype} on {q.device}, flash_attn takes float16 and bfloat16 on a GPU"
    if q.shape[-1] > 256:
        return f"D is {q.shape[-1]}, flash_attn takes up to 256"
    if inputs.sinks is not None:
        return "flash_attn has no sinks"
    if inputs.alibi_slopes is not None and inputs.alibi_slopes.requires_grad:
        return "flash_attn has no gradient of the slopes"
    if options.scale <= 0:
        return f"scale is {options.scale}, flash_attn takes positive ones"
    if options.dropout_p and (options.softcap or seed is not None):
        return "flash_attn draws its own dropout, and takes none with a softcap"
    if options.dropout_p == 1:
        return "flash_attn takes a dropout_p below 1"
    if return_lse:
        return "the lse of flash_attn has no gradient"
    return None


def _chosen_backend(backend: str, inputs: Inputs, options: Options, seed: int | Tensor | None, return_lse: bool) -> str:
    kernels_refuse = _kernels_refuse(inputs, options)
    if backend == "auto":  # the kernels where they serve, until times taken on a GPU name other winners
        return "torch" if kernels_refuse else "triton"
    refusals = {
        "triton": kernels_refuse,
        "torch": None,
        "flash_attn": _flash_attn_refuses(inputs, options, seed, return_lse),
    }
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

    q             (B, Tq, H, D), or (total_q, H, D) with cu_seqlens; float32, float16, bfloat16 or float64, as k and v
    k, v          (B, Tk, Hk, D), or (total_k, Hk, D); Hk divides H, and H / Hk query heads share a key head
    causal        a query sees no later key; positions are aligned at the end (bottom right)
    scale         of the products q . k; 1 / sqrt(D) when None
    window        (left, right): how many keys before and after it a query sees; None or -1 is unlimited
    softcap       scores become softcap * tanh(scores / softcap); None or 0 for none
    alibi_slopes  (H,), or (documents, H), or (B, H): scores lose slope * distance
    sinks         (H,): a logit of each head that takes probability and has no value
    dropout_p     chance of zeroing a probability
    seed          of dropout: an int, or an int64 tensor of one element where q is; None draws one
    cu_seqlens    int32 or int64 (documents + 1,) boundaries, rising from 0; may repeat at the end. None for k: as for q
    max_seqlen    the longest document or an upper bound of it; total when None
    backend       "auto", "triton", "torch" (PyTorch's code, on a CPU our C++ too) or "flash_attn"
    returns       out like q; with return_lse also lse, float32 (float64 of float64), (B, H, Tq) or (H, total_q),
                  differentiable

    Raises ValueError if shapes, devices or options disagree, TypeError for a dtype or type.
    """
    if isinstance(q, Proxy) or isinstance(k, Proxy) or isinstance(v, Proxy):
        return recorded(attention, locals())
    inputs = Inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks)
    longest = max_seqlen_q, max_seqlen_k
    _check(inputs, longest)
    _check_options(causal, scale, window, softcap, dropout_p, backend)
    check_dropout("attention", "q", q, dropout_p, seed)
    if is_autocast(q) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        inputs = inputs._replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype))
    options = _options(q.shape[-1], causal, scale, window, softcap, dropout_p)
    backend = _chosen_backend(backend, inputs, options, seed, return_lse)
    if backend == "flash_attn":
        return _by_flash_attn(inputs, options, longest)
    by_kernels = backend == "triton"
    if return_lse and not by_kernels and options.plain and inputs.q.dtype in (torch.float16, torch.bfloat16):
        options = options._replace(left=FARTHEST)  # hides no key; of plain scores ATen's lse is far from float32's
    as_documents = not by_kernels and cu_seqlens_q is None and _runs_as_documents(inputs, options, return_lse)
    if not (by_kernels or as_documents or return_lse):
        out = _by_sdpa(inputs, options, seed, longest)
        if out is not None:
            return out
    inputs = inputs._replace(seed=seed_tensor(seed, q.device) if dropout_p else None)
    if as_documents:
        out, lse = _as_documents(inputs, options)
    elif by_kernels or (cu_seqlens_q is not None and not is_transformed()):
        out, lse = _by_raw_op(inputs, by_kernels, options)
    else:
        out, lse = _in_pytorch(inputs, options)
    return (out, lse) if return_lse else out


def _options(
    D: int,
    causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    dropout_p: float,
) -> Options:
    left, right = (UNLIMITED if side is None else min(side, FARTHEST) for side in window or (None, None))
    if causal or right == 0:
        causal, right = True, UNLIMITED
    scale = max(1, D) ** -0.5 if scale is None else float(scale)
    softcap = max(CAPS[0], min(float(softcap), CAPS[1])) if softcap else 0.0
    return Options(causal, scale, left, right, softcap, float(dropout_p))


def _runs_as_documents(inputs: Inputs, options: Options, return_lse: bool) -> bool:
    """Whether a dense call is faster by our compiled code for packed documents than by PyTorch's."""
    q, k = inputs.q, inputs.k
    if not (has_attention(q) and q.numel() and k.numel() and is_ordinary(*inputs)):
        return False
    if return_lse or not is_plain(q, options, inputs.alibi_slopes, inputs.sinks):
        return True
    # Where the numbers differ that kernel would need a mask.
    return (options.causal and _is_misaligned(q, k)) or serves_plain_rows(q, k)


def _is_misaligned(q: Tensor, k: Tensor) -> bool:
    """Whether dense causal attention aligned at the end is not that aligned at the start, which is PyTorch's."""
    return q.shape[1] != 1 and q.shape[1] != k.shape[1]


def _as_documents(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Dense attention of a batch whose rows are packed documents of equal lengths."""
    q, k, v = inputs.q, inputs.k, inputs.v
    bounds_q, bounds_k = (torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device) for x in (q, k))
    documents = inputs._replace(
        q=q.flatten(0, 1), k=k.flatten(0, 1), v=v.flatten(0, 1), cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k
    )
    out, lse = _by_raw_op(documents, False, options)
    return out.view(q.shape), lse.view(-1, *q.shape[:2]).transpose(0, 1)


def _by_raw_op(inputs: Inputs, by_kernels: bool, options: Options) -> tuple[Tensor, Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    # The compiler refuses one tensor given twice to an autograd function, as in attention(x, x, x).
    k, v = (x.view_as(x) if x is q or x is other else x for x, other in ((k, q), (v, k)))
    cu_seqlens_k = None if inputs.cu_seqlens_k is inputs.cu_seqlens_q else inputs.cu_seqlens_k
    inputs = inputs._replace(k=k, v=v, cu_seqlens_k=cu_seqlens_k)
    return _Attention.apply(*inputs, by_kernels, *options)


def _by_sdpa(
    inputs: Inputs, options: Options, seed: int | Tensor | None, longest: tuple[int | None, int | None]
) -> Tensor | None:
    """PyTorch's own fused attention of scores that nothing but causality shapes, or None if it has none for them.

    A negative scale is none: it turns the -inf of a hidden key around, and the CPU's result is NaN.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    if not options._replace(dropout_p=0.0).plain or inputs.alibi_slopes is not None or inputs.sinks is not None:
        return None
    if inputs.cu_seqlens_q is None:
        can_be_aligned = not options.causal or q.shape[1] <= k.shape[1]
        serves = can_be_aligned and k.shape[1] > 0 and options.scale > 0 and (not options.dropout_p or seed is None)
        return _dense_by_sdpa(q, k, v, options) if serves else None
    if options.dropout_p or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    if not (0 < q.shape[2] <= 256 and options.scale > 0 and is_ordinary(*inputs)):
        return None
    q, k, v = map(_with_adjacent_features, (q, k, v))
    bounds_q, bounds_k = (x.int() for x in inputs.bounds)
    lengths = longest[0] or q.shape[0], longest[1] or k.shape[0]
    sides = (UNLIMITED, 0 if options.causal else UNLIMITED)
    if q.shape[1] != k.shape[1]:  # not every torch from 2.11 on takes enable_gqa here
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, bounds_q, bounds_k, *lengths, scale=options.scale, window_size=sides)
    assert isinstance(out, Tensor), "lse was not asked for"
    behind = torch.arange(q.shape[0], device=q.device) >= bounds_q[-1]  # no document's, and so nothing wrote it
    return out.masked_fill(behind[:, None, None], 0.0)


def _dense_by_sdpa(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """PyTorch's own fused attention; its causal flag is aligned at the start, so unequal lengths need a mask."""
    Tq, Tk = q.shape[1], k.shape[1]
    mask, is_causal, is_grouped = None, False, False  # of sizes that a compiler left open, comparisons are no bools
    if q.shape[2] != k.shape[2]:
        is_grouped = True
    if options.causal and _is_misaligned(q, k):
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


def _by_flash_attn(inputs: Inputs, options: Options, longest: tuple[int | None, int | None]) -> Tensor:
    """The flash_attn package's own function, whose arguments and alignment are ours."""
    flash_attn = importlib.import_module("flash_attn")
    q, k, v, slopes = inputs.q, inputs.k, inputs.v, inputs.alibi_slopes
    given = {
        "dropout_p": options.dropout_p,
        "softmax_scale": options.scale,
        "causal": options.causal,
        "window_size": (options.left, options.right),
        "softcap": options.softcap,
        "alibi_slopes": None if slopes is None else slopes.float(),
    }
    if inputs.cu_seqlens_q is None:
        return flash_attn.flash_attn_func(q, k, v, **given)
    bounds = [x.int() for x in inputs.bounds]
    lengths = longest[0] or q.shape[0], longest[1] or k.shape[0]
    return flash_attn.flash_attn_varlen_func(q, k, v, *bounds, *lengths, **given)


def _check(inputs: Inputs, longest: tuple[int | None, int | None]) -> None:
    given = inputs._asdict()
    del given["seed"]
    for name, x in given.items():
        if not isinstance(x, Tensor) and (x is not None or name in ("q", "k", "v")):
            how = ": torch.tensor(..., dtype=torch.int32)" if name.startswith("cu_seqlens") else ""
            raise TypeError(f"attention: {name} is of type {type(x).__name__}, expected a tensor{how}")
    q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, sinks, _ = inputs
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("attention: cu_seqlens_k came without cu_seqlens_q; give both, or cu_seqlens_q alone")
    _check_heads(q, k, v, packed=cu_seqlens_q is not None)
    dtypes = {q.dtype, k.dtype, v.dtype}
    if not ((len(dtypes) == 1 or is_autocast(q)) and dtypes <= {*DTYPES}) and dtypes != {torch.float64}:
        expected = "expected float32, float16, bfloat16 or float64, one for all (under autocast any of the first three)"
        raise TypeError(f"attention: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, {expected}")
    for name, x in (("alibi_slopes", slopes), ("sinks", sinks)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"attention: {name} is {x.dtype}, expected a floating dtype")
    H = q.shape[-2]
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"attention: sinks has shape {tuple(sinks.shape)}, expected ({H},), one per query head")
    for name, x in given.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"attention: {name} is on {x.device}, expected {q.device}, where q is; move it there")
    for name, x, limit in zip(("q", "k"), (cu_seqlens_q, cu_seqlens_k), longest, strict=True):
        if x is not None:
            _check_bounds(name, x, limit)
    segments = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if slopes is not None and slopes.shape != (H,) and slopes.shape != (segments, H):  # `in` takes no symbolic sizes
        expected = f"expected ({H},) or ({segments}, {H}), a row for each batch row or document"
        raise ValueError(f"attention: alibi_slopes has shape {tuple(slopes.shape)}, {expected}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    dense, documents = (
        "(B, T, H, D), or (total, H, D) together with cu_seqlens_q",
        "(total, H, D) with cu_seqlens_q; of a batch give x.flatten(0, 1)",
    )
    dims, names = (3, documents) if packed else (4, dense)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise ValueError(f"attention: {name} has shape {tuple(x.shape)}, expected {names}")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[: dims - 3] != k.shape[: dims - 3]:
        raise ValueError(f"attention: {shapes} disagree; k and v have one shape, and batch and D are those of q")
    H, Hk = q.shape[-2], k.shape[-2]
    if Hk == 0 or H % Hk:
        layout = "(total, H, D)" if packed else "(B, T, H, D); of (B, H, T, D) give x.transpose(1, 2)"
        raise ValueError(f"attention: {Hk} key heads do not divide {H} query heads in {shapes}, expected {layout}")


def _check_bounds(side: str, bounds: Tensor, longest: int | None) -> None:
    name, limit = f"cu_seqlens_{side}", f"max_seqlen_{side}"
    if bounds.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention: {name} is {bounds.dtype}, expected torch.int32 or torch.int64")
    if bounds.dim() != 1:
        raise ValueError(f"attention: {name} has shape {tuple(bounds.shape)}, expected (documents + 1,)")
    if longest is None:
        return
    if not (isinstance(longest, int) or hasattr(longest, "__index__")):
        raise TypeError(f"attention: {limit} is of type {type(longest).__name__}, expected an int")
    # On a GPU nobody waits for the boundaries.
    if bounds.is_cpu and bounds.shape[0] > 1 and not torch.compiler.is_compiling() and is_ordinary(bounds):
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
    backend: str,
) -> None:
    if not isinstance(causal, int):
        raise TypeError(f"attention: causal is of type {type(causal).__name__}, expected a bool")
    numbers = {"scale": scale, "softcap": softcap, "dropout_p": dropout_p}
    for name, x in numbers.items():
        if not _is_number(x) and (x is not None or name == "dropout_p"):
            raise TypeError(f"attention: {name} is of type {type(x).__name__}, expected a number")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"attention: scale is {scale}, expected a finite number")
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap is {softcap}, expected a finite number above 0, or 0 or None for none")
    if window is not None and not _is_window(window):
        expected = "expected (left, right): numbers of keys from 0 on, None or -1 for unlimited"
        raise ValueError(f"attention: window is {window}, {expected}")
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")


def _is_number(x: object) -> bool:
    """Not a tensor: its gradient would be lost, and a GPU's waited for."""
    return isinstance(x, int | float) or (hasattr(x, "__float__") and not isinstance(x, Tensor))


def _is_window(window: object) -> bool:
    return (
        isinstance(window, tuple | list)
        and len(window) == 2
        and all(side is None or (isinstance(side, int) and side >= UNLIMITED) for side in window)
    )
