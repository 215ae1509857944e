"""Drop-in modules: constructors, parameters and state_dict keys equal torch.nn's, so a checkpoint loads either way."""

from fastlm.nn.activation import GELU
from fastlm.nn.attention import MultiheadAttention
from fastlm.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from fastlm.nn.normalization import LayerNorm, RMSNorm
from fastlm.nn.softmax import LogSoftmax, Softmax

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "Softmax",
]
