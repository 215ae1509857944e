"""LayerNorm and RMSNorm: torch.nn's modules, computed by fastlm.ops."""

import torch
from torch import Tensor

from fastlm.ops.layer_norm import layer_norm
from fastlm.ops.rms_norm import rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for torch.nn.LayerNorm: the same constructor, parameters, state_dict and values; see ops.layer_norm."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for torch.nn.RMSNorm: the same constructor, parameters, state_dict and values; see ops.rms_norm."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
