"""MultiheadAttention: torch.nn's module, its attention computed by fastlm.ops."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import handle_torch_function

from fastlm.nn._masks import Masking, can_be_read, read
from fastlm.nn._torchscript import torch_forward
from fastlm.ops._dispatch import TORCH, is_exporting, is_plain_tensor, route
from fastlm.ops.attention import attention
from fastlm.ops.scaled_dot_product_attention import scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for torch.nn.MultiheadAttention: the same constructor, parameters, state_dict and values.

    Ours are batches with need_weights=False whose masks hide the future, padding before or behind the tokens of a row,
    or both. Masks are read by their values (fastlm/nn/_masks.py), which torch.compile and CUDA graphs do not allow:
    there only a causal mask that is_causal announces is known. PyTorch's code runs for bias_kv, add_zero_attn, weights
    and other masks, and where ops/_dispatch.py says that it is as fast.
    """

    _torch_forward = torch_forward(torch.nn.MultiheadAttention)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(result, weights) of query (B, Tq, C), key and value (B, Tk, C) if batch_first, else with B and T exchanged.

        As in PyTorch, is_causal announces that attn_mask, which must be given, is the causal one, aligned at the start.
        """
        masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        if torch.jit.is_scripting():
            return self._torch_forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if isinstance(query, Proxy):  # torch.fx makes one call of torch.nn's module too
            return handle_torch_function(attend, (query,), self, query, key, value, *masks)
        masking = None
        if not need_weights and not is_exporting() and self._is_ordinary(query, key, value):
            masking = self._masking(query, key, key_padding_mask, attn_mask, is_causal)
        if masking is None:
            return super().forward(query, key, value, *masks)
        q, k, v = map(self._split_heads, self._project(query, key, value))
        out = self._batch_first(attended(q, k, v, masking, self._dropout_p)).flatten(2)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), None

    def _is_ordinary(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether these are batches whose sizes agree; PyTorch's code refuses what fits nowhere."""
        tensors = query, key, value
        return (
            all(is_plain_tensor(x) and x.dim() == 3 for x in tensors)
            and self.bias_k is None
            and not self.add_zero_attn
            and [x.shape[-1] for x in tensors] == [self.embed_dim, self.kdim, self.vdim]
            and key.shape[:2] == value.shape[:2]
            and query.shape[not self.batch_first] == key.shape[not self.batch_first]
        )

    def _masking(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Masking | None:
        """What the masks say; None where PyTorch's code runs."""
        masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
        if not masks and not is_causal:
            return Masking()
        if attn_mask is None and is_causal:
            return None  # an error of PyTorch's
        if any(mask.dtype not in (torch.bool, query.dtype) for mask in masks):
            return None
        if key_padding_mask is None and is_causal and masks[0].dim() == 2:
            return Masking(causal=True)
        if not all(mask.device == query.device and can_be_read(mask) for mask in masks):
            return None
        (B, Tq, _), Tk = self._batch_first(query).shape, self._batch_first(key).shape[1]
        if key_padding_mask is not None:
            sizes = B, Tq, self.num_heads, self.head_dim, Tk
            by = route("padded attention", (query, key), (sizes, self._dropout_p)).implementation
            if key_padding_mask.shape != (B, Tk) or by == TORCH:
                return None
        return read(attn_mask, key_padding_mask, Tq, Tk)

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _batch_first(self, x: Tensor) -> Tensor:
        """(B, T, ...) of an input, and a result's layout of (B, T, ...)."""
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """What each head's query, key and value are cut from; one product where all three are the same tensor."""
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        weights: Sequence[Tensor] = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, T, H, D) of the features of all heads."""
        return self._batch_first(x.unflatten(-1, (self.num_heads, self.head_dim)))


def attended(q: Tensor, k: Tensor, v: Tensor, masking: Masking, dropout_p: float) -> Tensor:
    """(B, Tq, H, D) of q (B, Tq, H, D), k and v (B, Tk, H, D)."""
    if not masking.parts:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=masking.causal).transpose(1, 2)
    results = []
    for part in masking.parts:
        out = attention(
            *(x.flatten(0, 1) for x in (q, k, v)),
            causal=part.causal,
            dropout_p=dropout_p,
            cu_seqlens_q=part.cu_seqlens_q,
            cu_seqlens_k=part.cu_seqlens_k,
            max_seqlen_q=q.shape[1],
            max_seqlen_k=k.shape[1],
        )
        results.append(cast(Tensor, out).unflatten(0, q.shape[:2]))
    return results[0] if len(results) == 1 else results[0] + results[1]


def attend(module: MultiheadAttention, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """What a graph of torch.fx calls: the forward alone, for hooks are traced, and so is what a subclass adds to it."""
    return MultiheadAttention.forward(module, *arguments)
