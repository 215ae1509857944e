"""PyTorch's scaled_dot_product_attention by its own name and arguments, computed by fastlm.ops.attention."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function

from fastlm.ops._dispatch import TORCH, route
from fastlm.ops._fx import recorded
from fastlm.ops.attention import attention, torch_sdpa


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
    """Drop-in for torch.nn.functional.scaled_dot_product_attention.

    query       (..., H, Tq, D)
    key         (..., H, Tk, D); with enable_gqa (..., Hk, Tk, D), where Hk divides H
    value       (..., H, Tk, Dv), or (..., Hk, Tk, Dv)
    attn_mask   broadcasts to (..., H, Tq, Tk); boolean, where True keeps, or added to the scores; may have a gradient
    is_causal   masks the keys after i for query i: aligned at the start (top left), where attention aligns at the end
    returns     (..., H, Tq, Dv)

    The kernels support (B, H, T, D) in float32, float16 or bfloat16, one form for all three, without attn_mask; causal
    only for Tq == Tk, where both alignments agree. On a CPU, C++ runs calls with dropout, and causal calls whose rows
    are neither short nor long. PyTorch's own code runs all others: results and errors are its own.
    """
    if isinstance(query, Proxy) or isinstance(key, Proxy) or isinstance(value, Proxy) or isinstance(attn_mask, Proxy):
        return recorded(scaled_dot_product_attention, locals())
    if F.scaled_dot_product_attention is not torch_sdpa and has_torch_function((attn_mask,)):
        # Someone assigned this function, or another, to F.scaled_dot_product_attention, and torch.nn.attention.bias
        # compares with what is there.
        return handle_torch_function(
            F.scaled_dot_product_attention,
            (attn_mask,),
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    implementation = route(
        "scaled_dot_product_attention", (query, key, value), (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    ).implementation
    if implementation == TORCH:
        return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = attention(q, k, v, causal=is_causal, scale=scale, dropout_p=dropout_p)
    return cast(Tensor, out).transpose(1, 2)
