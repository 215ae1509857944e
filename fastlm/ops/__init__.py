"""Functions named and ordered as in torch.nn.functional, tested against it in float64."""

from fastlm.ops._dispatch import explain
from fastlm.ops.activations import bias_gelu, geglu, gelu, swiglu
from fastlm.ops.attention import attention
from fastlm.ops.attention_schedules import AttentionSchedules
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.linear_logprobs import linear_logprobs
from fastlm.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastlm.ops.rotary import apply_rotary
from fastlm.ops.scaled_dot_product_attention import scaled_dot_product_attention
from fastlm.ops.softmax import log_softmax, softmax

__all__ = [
    "AttentionSchedules",
    "add_layer_norm",
    "add_rms_norm",
    "apply_rotary",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logprobs",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
]
