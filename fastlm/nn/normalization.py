"""LayerNorm and RMSNorm: torch.nn's modules, computed by fastlm.ops."""

import torch
from torch import Tensor

from fastlm.nn._torchscript import torch_forward
from fastlm.ops.norm import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for torch.nn.LayerNorm: the same constructor, parameters, state_dict and values; see ops.layer_norm."""

    _torch_forward = torch_forward(torch.nn.LayerNorm)

    def forward(self, input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if torch.jit.is_scripting():
            return self._torch_forward(input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, dtype=dtype)


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for torch.nn.RMSNorm: the same constructor, parameters, state_dict and values; see ops.rms_norm."""

    _torch_forward = torch_forward(torch.nn.RMSNorm)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if torch.jit.is_scripting():
            return self._torch_forward(x)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, dtype=dtype)
