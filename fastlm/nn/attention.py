"""MultiheadAttention: torch.nn's module, its attention computed by fastlm.ops."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import handle_torch_function

from fastlm.nn._torchscript import torch_forward
from fastlm.ops._dispatch import is_plain_tensor, use_triton
from fastlm.ops.scaled_dot_product_attention import scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for torch.nn.MultiheadAttention: the same constructor, parameters, state_dict and values.

    The kernels support batches with need_weights=False and no mask but the causal one that is_causal announces;
    bias_kv, add_zero_attn, other masks and weights run PyTorch's code, as does every call on a plain CPU.
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
        plain = not need_weights and key_padding_mask is None and use_triton(query)
        if not (plain and self._is_served(query, key, value, attn_mask, is_causal)):
            return super().forward(query, key, value, *masks)
        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
        dropout_p = self.dropout if self.training else 0.0
        out = scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=is_causal)
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias), None

    def _is_served(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> bool:
        """Whether these are the ordinary batches that the kernels take; PyTorch's code refuses what fits nowhere."""
        tensors = query, key, value
        announced = attn_mask is not None and attn_mask.dim() == 2 and attn_mask.dtype in (torch.bool, query.dtype)
        return (
            all(is_plain_tensor(x) and x.dim() == 3 for x in tensors)
            and (announced if is_causal else attn_mask is None)
            and self.bias_k is None
            and not self.add_zero_attn
            and [x.shape[-1] for x in tensors] == [self.embed_dim, self.kdim, self.vdim]
            and key.shape[:2] == value.shape[:2]
            and query.shape[not self.batch_first] == key.shape[not self.batch_first]
        )

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
        """(B, H, T, D) of the features of all heads."""
        heads = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)


def attend(module: MultiheadAttention, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """What a graph of torch.fx calls: the forward alone, for hooks are traced, and so is what a subclass adds to it."""
    return MultiheadAttention.forward(module, *arguments)
