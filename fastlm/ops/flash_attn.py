"""flash-attn 2's functions by their own names and arguments, computed by fastlm.ops.attention.

Names and order of the arguments: https://github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py.
"""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Proxy

from fastlm.ops._fx import recorded
from fastlm.ops.attention import attention
from fastlm.ops.attention_reference import UNLIMITED


def _window(window_size: Any) -> Any:
    """(left, right) as ints, from anything that flash-attn can index: a tensor, an array, NumPy's numbers."""
    try:
        sides = window_size.tolist() if hasattr(window_size, "tolist") else window_size
        return tuple(side if isinstance(side, int | None) else operator.index(side) for side in sides)
    except TypeError:
        return window_size  # attention says what is wrong with it


def _unstacked(function: str, x: Tensor, name: str, layout: str) -> tuple[Tensor, ...]:
    """The tensors stacked in x; the digit in the layout is how many there are."""
    if isinstance(x, Proxy):
        return x.unbind(-3)
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} is of type {type(x).__name__}, expected a tensor {layout}")
    expected = layout.strip("()").split(", ")
    if x.dim() != len(expected) or str(x.shape[-3]) != expected[-3]:
        raise ValueError(f"{function}: {name} has shape {tuple(x.shape)}, expected {layout}")
    return x.unbind(-3)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (UNLIMITED, UNLIMITED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash-attn 2's function of this name, argument for argument, of q (B, Tq, H, D), k and v (B, Tk, Hk, D).

    dropout_p           of the probabilities, its seed drawn from torch's generator
    window_size         (left, right): how many keys before and after its position a query sees; -1 is unlimited. May
                        be a tensor; reading one on a GPU waits for it
    softcap             0 for none
    deterministic       makes no difference: gradients are always deterministic
    return_attn_probs   returns (out, lse, None): lse (B, H, Tq) is float32, natural log, differentiable; the None is
                        in the place of the probabilities, which are never stored

    All else is as in attention: errors, the alignment of causal (bottom right), and more dtypes than flash-attn takes.
    """
    if isinstance(q, Proxy) or isinstance(k, Proxy) or isinstance(v, Proxy):
        return recorded(flash_attn_func, locals())
    result = attention(
        q,
        k,
        v,
        causal=causal,
        scale=softmax_scale,
        window=_window(window_size),
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
    window_size: Sequence[int] | Tensor = (UNLIMITED, UNLIMITED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash-attn 2's function of this name: sequences concatenated in q (total_q, H, D), k, v (total_k, Hk, D).

    cu_seqlens, max_seqlen   boundaries and lengths of the longest sequences, as in attention
    block_table              of a paged KV cache, which is not supported: must be None

    All else is as in flash_attn_func; lse is (H, total_q). Raises ValueError for a block_table.
    """
    if isinstance(q, Proxy) or isinstance(k, Proxy) or isinstance(v, Proxy):
        return recorded(flash_attn_varlen_func, locals())
    if block_table is not None:
        raise ValueError(
            "flash_attn_varlen_func: block_table is given, expected None: a paged KV cache is not supported; "
            "gather each sequence's pages into k and v"
        )
    result = attention(
        q,
        k,
        v,
        causal=causal,
        scale=softmax_scale,
        window=_window(window_size),
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
    """flash_attn_func of qkv (B, T, 3, H, D); the other arguments are the same."""
    q, k, v = _unstacked("flash_attn_qkvpacked_func", qkv, "qkv", "(B, T, 3, H, D)")
    return flash_attn_func(q, k, v, *options, **named)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, *options: Any, **named: Any
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_func of q and kv (B, Tk, 2, Hk, D); the other arguments are the same."""
    k, v = _unstacked("flash_attn_kvpacked_func", kv, "kv", "(B, T, 2, H, D)")
    return flash_attn_func(q, k, v, *options, **named)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *options: Any, **named: Any
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_varlen_func of qkv (total, 3, H, D), one cu_seqlens, one max_seqlen; the others are the same."""
    q, k, v = _unstacked("flash_attn_varlen_qkvpacked_func", qkv, "qkv", "(total, 3, H, D)")
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options, **named)


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, *bounds_and_options: Any, **named: Any
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_varlen_func of q and kv (total_k, 2, Hk, D); the others are the same."""
    k, v = _unstacked("flash_attn_varlen_kvpacked_func", kv, "kv", "(total, 2, H, D)")
    return flash_attn_varlen_func(q, k, v, *bounds_and_options, **named)
