"""GELU: torch.nn's module, computed by fastlm.ops."""

import torch
from torch import Tensor

from fastlm.nn._torchscript import torch_forward
from fastlm.ops.activations import gelu


class GELU(torch.nn.GELU):
    """Drop-in for torch.nn.GELU: the same constructor and values; see ops.gelu."""

    _torch_forward = torch_forward(torch.nn.GELU)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._torch_forward(input)
        return gelu(input, self.approximate)
