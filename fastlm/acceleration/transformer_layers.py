"""torch.nn.TransformerEncoderLayer and TransformerDecoderLayer, each norm in one pass with the residual sum before it.

    post-norm   x = norm(x + dropout(branch(x)))          pre-norm   x = x + dropout(branch(norm(x)))

In the first every norm follows a sum, in the second all but the first of a layer. Attention and norms are the modules
that the layer has: swapped themselves, or PyTorch's. PyTorch's own path for evaluation without gradients, which runs
none of them, is left to short sequences on a CPU, and to the nested tensors that no other code supports.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import fastlm.nn
from fastlm.acceleration.matching import Match, Refusal, is_pytorchs, is_watched
from fastlm.acceleration.swapped_module import Swapped
from fastlm.ops import add_layer_norm
from fastlm.ops._dispatch import TORCH, route


class EncoderLayer(nn.TransformerEncoderLayer):
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        given = src_mask, src_key_padding_mask
        is_ours = not (src.is_nested or has_blocks_of_its_own(self, nn.TransformerEncoderLayer))
        if not is_ours or is_left_to_one_call(self, src, given):
            return super().forward(src, *given, is_causal)
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        if not self.norm_first:
            x = added(attended(self.self_attn, src, src, masks), src, self.dropout1, self.norm1)[0]
            return added(feed_forward(self, x), x, self.dropout2, self.norm2)[0]
        y = self.norm1(src)
        y, x = added(attended(self.self_attn, y, y, masks), src, self.dropout1, self.norm2)
        return x + self.dropout2(feed_forward(self, y))


def is_left_to_one_call(layer: EncoderLayer, src: Tensor, masks: Sequence[Tensor | None]) -> bool:
    """Whether PyTorch's path for evaluation, batches first and without gradients, is faster or takes more than ours.

    It takes masks of any floating dtype, and gives another dtype under a CPU's autocast.
    """
    if layer.training or torch.is_grad_enabled() or not layer.self_attn.batch_first:
        return False
    if any(mask is not None and mask.dtype not in (torch.bool, src.dtype) for mask in masks):
        return True
    if torch.is_autocast_enabled(src.device.type):
        return True
    return route("encoder layer", (src,), (src.shape[-2],)).implementation == TORCH


class DecoderLayer(nn.TransformerDecoderLayer):
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if has_blocks_of_its_own(self, nn.TransformerDecoderLayer):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        own = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        cross = {
            "attn_mask": memory_mask,
            "key_padding_mask": memory_key_padding_mask,
            "is_causal": memory_is_causal,
        }
        if not self.norm_first:
            x = added(attended(self.self_attn, tgt, tgt, own), tgt, self.dropout1, self.norm1)[0]
            x = added(attended(self.multihead_attn, x, memory, cross), x, self.dropout2, self.norm2)[0]
            return added(feed_forward(self, x), x, self.dropout3, self.norm3)[0]
        y = self.norm1(tgt)
        y, x = added(attended(self.self_attn, y, y, own), tgt, self.dropout1, self.norm2)
        y, x = added(attended(self.multihead_attn, y, memory, cross), x, self.dropout2, self.norm3)
        return x + self.dropout3(feed_forward(self, y))


def attended(attention: nn.Module, x: Tensor, memory: Tensor, masks: dict[str, Any]) -> Tensor:
    return attention(x, memory, memory, need_weights=False, **masks)[0]


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))


def added(branch: Tensor, residual: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm of the sum, sum) of residual + dropout(branch): in one pass where the two modules are what they seem."""
    dtype = torch.promote_types(branch.dtype, residual.dtype)  # of the sum
    if dtype != residual.dtype or not (is_plain(dropout, nn.Dropout) and is_plain(norm, fastlm.nn.LayerNorm)):
        x = residual + dropout(branch)
        return norm(x), x
    dropout_p = dropout.p if dropout.training else 0.0
    norm_dtype = None if branch.dtype == dtype else dtype
    return add_layer_norm(
        branch, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p, dtype=norm_dtype
    )


def is_plain(module: nn.Module, layer: type[nn.Module]) -> bool:
    """Whether module is a layer, swapped or not, of which nobody hears a call: no hook, no forward of its own."""
    theirs = module.layer if isinstance(module, Swapped) else type(module)
    return theirs is layer and not is_watched(module) and not torch_module._has_any_global_hook()


THEIRS: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
BLOCKS = ("forward", "_sa_block", "_mha_block", "_ff_block")  # methods of theirs that the layers above replace
WRITTEN = {layer: {name: vars(layer)[name] for name in BLOCKS if name in vars(layer)} for layer in THEIRS}


def has_blocks_of_its_own(layer: Any, theirs: type[nn.Module]) -> bool:
    """Whether somebody put a method on the layer or its class, before accelerate or after."""
    return any(
        name in vars(layer) or getattr(layer.original, name) is not method for name, method in WRITTEN[theirs].items()
    )


def match_transformer_layer(layer: type[nn.Module], module: nn.Module) -> Match | Refusal:
    """The layer above for a module of torch.nn's class, unless it or a subclass has other blocks."""
    theirs = layer.__bases__[-1]
    for name in WRITTEN[theirs]:
        if getattr(type(module), name) is not getattr(theirs, name) or not is_pytorchs(theirs, name):
            return Refusal(f"its {name} is not PyTorch's")
    return Match(layer, None, "fastlm's attention, norms in one pass with the sum before them")
